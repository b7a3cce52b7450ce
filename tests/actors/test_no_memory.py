"""A checkpoint without memory weights chats, with memory off and said to be; what would need a memory is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import NoMemoryWeights
from actors.keeper import collect, open_keeper
from actors.messages import ChatCall, IngestCall, MemoryAccess, RenderedMessage
from actors.options import KeeperOptions
from cluster.openai import titan
from cluster.problems import problem_of
from storage.errors import NoSuchMemory
from storage.names import UserKey
from tests.tiny_model import TEXT
from titanmem.corpus import train_tokenizer
from titanmem.folder import load_base, save_memory
from titanmem.spec import MemorySpec
from titanmem.tokenizer import ChatTokenizer, write_chat_files

ALICE = UserKey("local", "alice")
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def reference():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def by_transformers(prompt: np.ndarray, count: int) -> list[int]:
    """The most likely ids after a prompt, `count` of them."""
    model, ids = reference(), torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()


@pytest.fixture
def options(tmp_path: Path) -> KeeperOptions:
    folder = tmp_path / "qwen"
    reference().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(train_tokenizer(TEXT, SIZES["vocab_size"]).to_str())
    write_chat_files(folder)
    return KeeperOptions(
        model=str(folder), store_url=f"file://{tmp_path}/store", journal_dir=f"{tmp_path}/journal", shard="shard-0",
        epoch=1, slots=2, spec_overrides={"window": 64, "chunk_size": 16}, idle_flush_s=3600.0,
    )  # fmt: skip


def call(options: KeeperOptions, memory: MemoryAccess = "read_write") -> ChatCall:
    parts, prompt = ChatTokenizer(options.model).render(
        [{"role": "user", "content": "my dog's name is Rex7."}]
    )
    return ChatCall(
        key=ALICE, request_id="r", update_id="u", generation_prompt=prompt, max_tokens=12, memory=memory,
        messages=tuple(RenderedMessage(role=p.role, tokens=p.tokens, prefix_hash=p.prefix_hash) for p in parts),
    )  # fmt: skip


def piece() -> IngestCall:
    tokens = np.arange(4, 40, dtype=np.int32)
    return IngestCall(key=ALICE, update_id="piece", conversation="book", tokens=tokens)


async def test_it_says_what_transformers_says_and_that_memory_is_off(options, caplog):
    with caplog.at_level(logging.WARNING):
        keeper = await open_keeper(options)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "actors.keeper"]
    assert f"titanmem train --model {options.model}" in line
    assert "memory is off for every request" in line
    try:
        for memory in ("read_write", "read_only", "off"):
            asked = call(options, memory)
            done = await collect(keeper.chat(asked))
            assert titan(done) == {"memory": "off", "memory_version": 0, "tokens_written": 0, "surprise": 0.0}
        assert keeper.roster.journal.users_pending() == []
        assert await keeper.users() == []
        prompt = np.concatenate([asked.messages[0].tokens, asked.generation_prompt])
        said = by_transformers(prompt, 12)
        tokenizer = ChatTokenizer(options.model)
        assert not tokenizer.stop_ids & set(said), "another seed, or this shows nothing"
        assert (done.text, done.completion_tokens) == (tokenizer.decode(said), 12)
    finally:
        await keeper.close()


async def test_what_needs_a_memory_is_refused(options):
    keeper = await open_keeper(options)
    try:
        for work in (
            keeper.ingest(piece()), keeper.describe(ALICE), keeper.versions(ALICE), keeper.export(ALICE),
            keeper.rollback(ALICE, None), keeper.pin(ALICE), keeper.import_(ALICE, b""),
        ):  # fmt: skip
            with pytest.raises(NoMemoryWeights, match=r"`titanmem train --model .*qwen` adds them") as caught:
                await work
            assert (problem_of(caught.value).status, problem_of(caught.value).code) == (
                409,
                "no_memory_weights",
            )
        assert (await keeper.forget(ALICE))["tombstone"], "to be erased is never refused"
        assert await keeper.flush() == 0
        assert (await keeper.stats())["busy"] == 0
    finally:
        await keeper.close()


async def test_with_memory_weights_beside_it_the_same_folder_remembers(options):
    spec = MemorySpec(
        d_nltm=32, key_dim=16, value_dim=16, code_width=512, code_active=8, conv=4, chunk_size=16, window=64,
        surprise_threshold=0.05,
    )  # fmt: skip
    memory = load_base(Path(options.model), spec, 1).memory
    with torch.no_grad():
        memory.gate_out.bias.fill_(2.0)
    save_memory(memory, 1, Path(options.model))
    keeper = await open_keeper(options)
    try:
        with pytest.raises(NoSuchMemory):
            await keeper.describe(ALICE)
        assert (await keeper.ingest(piece())).tokens_written > 0
        done = await collect(keeper.chat(call(options)))
        assert (done.memory, done.memory_version > 1, done.tokens_written > 0) == ("read_write", True, True)
    finally:
        await keeper.close()
