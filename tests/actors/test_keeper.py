"""A whole shard without Ray on a tiny random model: what is acknowledged stays, bit for bit, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.errors import QueueFull
from actors.keeper import MemoryKeeper, collect, open_keeper
from actors.messages import ChatCall, IngestCall, RenderedMessage, TokenEvent
from actors.options import KeeperOptions
from actors.roster import SEGMENTS_MAX
from storage.errors import BadMemoryFile, Fenced, NoSuchMemory, StoreError, WrongBase
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot_manifest import new_snapshot_id
from tests.tiny_model import tiny_folder
from titanmem.decoder_config import SERVED
from titanmem.tokenizer import ChatTokenizer

ALICE, BOB, CAROL = (UserKey("local", name) for name in ("alice", "bob", "carol"))


@asynccontextmanager
async def opened(options: KeeperOptions, **changes) -> AsyncIterator[MemoryKeeper]:
    keeper = await open_keeper(replace(options, **changes))
    try:
        yield keeper
    finally:
        await keeper.close()


async def crash(keeper: MemoryKeeper) -> None:
    """Leave as a killed process would: nothing is flushed."""
    keeper._idle.cancel()
    with suppress(asyncio.CancelledError):
        await keeper._idle
    keeper.engine.close()
    await keeper.roster.close()
    keeper.roster.journal.close()


def chat(model: Path, key: UserKey, *said: tuple[str, str], update_id: str = "u1", **fields) -> ChatCall:
    parts, prompt = ChatTokenizer(model).render([{"role": role, "content": text} for role, text in said])
    return ChatCall(
        key=key, request_id=update_id, update_id=update_id, generation_prompt=prompt,
        messages=tuple(RenderedMessage(role=p.role, tokens=p.tokens, prefix_hash=p.prefix_hash) for p in parts),
        **{"max_tokens": 12, **fields},
    )  # fmt: skip


def piece(key: UserKey, seed: int, count: int = 50, **fields) -> IngestCall:
    tokens = np.random.default_rng(seed).integers(4, 300, count).astype(np.int32)
    return IngestCall(key=key, update_id=f"piece{seed}", conversation="book", tokens=tokens, **fields)


async def state(keeper: MemoryKeeper, key: UserKey) -> tuple:
    async with keeper.roster.turn(key) as r:
        slot = keeper.roster.slab.written_SHD[r.slot].clone()
        return slot, r.momentum, r.memory_version, r.last_chunk_id, r.tokens_seen, r.tail.tolist(), r.tail_of


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


async def live(keeper: MemoryKeeper, model: Path) -> None:
    """Some life of alice: documents and two turns of a conversation."""
    await keeper.ingest(piece(ALICE, 1))
    first = ("user", "my dog's name is Rex7.")
    done = await collect(keeper.chat(chat(model, ALICE, first)))
    await keeper.ingest(piece(ALICE, 2))
    more = [first, ("assistant", done.text), ("user", "What is the name of my dog? " * 4)]
    await collect(keeper.chat(chat(model, ALICE, *more, update_id="u2")))
    await keeper.ingest(piece(ALICE, 3, 7))


async def test_a_crash_changes_no_bit(options, model):
    keeper = await open_keeper(options)
    await live(keeper, model)
    before = await state(keeper, ALICE)
    assert bool(before[0].any()), "the tiny model writes"
    await crash(keeper)
    async with opened(options, epoch=2) as again:
        assert same(await state(again, ALICE), before)


async def test_rest_eviction_and_return_change_no_bit(options, model, tmp_path):
    async with opened(options) as undisturbed:
        await live(undisturbed, model)
        wanted = await state(undisturbed, ALICE)
    other = replace(options, store_url=f"file://{tmp_path}/store2", journal_dir=f"{tmp_path}/journal2")
    async with opened(other) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        for user in (BOB, CAROL):  # two slots: alice has to go
            await keeper.ingest(piece(user, 9))
        assert keeper.roster.slab.get(ALICE) is None
        first = ("user", "my dog's name is Rex7.")
        done = await collect(keeper.chat(chat(model, ALICE, first)))
        await keeper.ingest(piece(ALICE, 2))
    async with opened(other, epoch=2) as keeper:
        more = [first, ("assistant", done.text), ("user", "What is the name of my dog? " * 4)]
        await collect(keeper.chat(chat(model, ALICE, *more, update_id="u2")))
        await keeper.ingest(piece(ALICE, 3, 7))
        assert same(await state(keeper, ALICE), wanted)


async def test_neighbours_change_nothing_of_an_answer(options, model):
    question = ("user", "What is the name of my dog?")
    async with opened(options, slots=8) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        alone = await collect(keeper.chat(chat(model, ALICE, question, memory="read_only")))
        users = [UserKey("local", f"n{n}") for n in range(6)]
        for n, user in enumerate(users):
            await keeper.ingest(piece(user, n))
        crowd = [collect(keeper.chat(chat(model, u, ("user", f"Your {u.user} " * 3)))) for u in users]
        again = collect(keeper.chat(chat(model, ALICE, question, memory="read_only")))
        answers = await asyncio.gather(*crowd, again)
    assert alone.completion_tokens == 12
    assert answers[-1].text == alone.text


async def test_conversations_of_three_modes_are_decoded_side_by_side(options, model):
    question = ("user", "What is the name of my dog?")

    def asked(mode: str) -> ChatCall:
        return chat(model, ALICE, question, update_id=mode, memory="read_only", mode=mode)

    async with opened(options, slots=8) as keeper:
        for n in range(3):
            await keeper.ingest(piece(ALICE, n, 150))
        alone = {mode: (await collect(keeper.chat(asked(mode)))).text for mode in SERVED["mode"]}
        together = await asyncio.gather(*(collect(keeper.chat(asked(mode))) for mode in SERVED["mode"]))
    assert {mode: done.text for mode, done in zip(SERVED["mode"], together, strict=True)} == alone
    assert len(set(alone.values())) == 3, "another seed, or this shows nothing"


async def test_history_that_comes_again_is_not_written_twice(options, model):
    first = ("user", "my dog's name is Rex7.")
    async with opened(options) as keeper:
        done = await collect(keeper.chat(chat(model, ALICE, first)))
        seen = (await state(keeper, ALICE))[4]
        more = [first, ("assistant", done.text), ("user", "Hi.")]
        call = chat(model, ALICE, *more, update_id="u2", max_tokens=1)
        await collect(keeper.chat(call))
        added = (await state(keeper, ALICE))[4] - seen
        assert added == len(call.messages[-1].tokens) + len(call.generation_prompt) + 1


async def test_what_is_said_again_is_written_again_but_a_retry_is_not(options, model):
    said = ("user", "my dog's name is Rex7.")
    async with opened(options) as keeper:
        call = chat(model, ALICE, said, max_tokens=1)
        grown = []
        for update_id in ("u1", "u2", "u2"):
            before = keeper.roster.slab.get(ALICE)
            seen = before.tokens_seen if before else 0
            await collect(keeper.chat(replace(call, update_id=update_id)))
            grown.append((await state(keeper, ALICE))[4] - seen)
        assert grown == [grown[0], grown[0], 0]
        assert grown[0] == len(call.messages[0].tokens) + len(call.generation_prompt) + 1


async def test_a_repeated_piece_returns_its_first_outcome(options):
    async with opened(options) as keeper:
        first = await keeper.ingest(piece(ALICE, 1))
        await keeper.ingest(piece(ALICE, 2))
        before = await state(keeper, ALICE)
        again = await keeper.ingest(piece(ALICE, 1))
        assert again == replace(first, duplicates=1)
        assert same(await state(keeper, ALICE), before)


async def test_a_cancelled_reply_stops_and_is_still_written(options, model):
    async with opened(options) as keeper:
        events = keeper.chat(chat(model, ALICE, ("user", "my dog's name is Rex7."), max_tokens=4000))
        async for event in events:
            assert isinstance(event, TokenEvent)
            break
        await events.aclose()
        async with asyncio.timeout(10):
            await asyncio.gather(*keeper._turns)
        made = keeper.engine.generated_tokens
        assert 0 < made < 4000
        await asyncio.sleep(0.05)
        assert keeper.engine.generated_tokens == made
        assert (await state(keeper, ALICE))[2] == 2, "both sides of the turn are folded"


async def test_memory_off_and_read_only_write_nothing(options, model):
    async with opened(options) as keeper:
        for memory in ("off", "read_only"):
            done = await collect(keeper.chat(chat(model, ALICE, ("user", "my dog is Rex7."), memory=memory)))
            assert done.tokens_written == 0
        assert await keeper.users() == []
        with pytest.raises(NoSuchMemory, match="alice"):
            await keeper.describe(ALICE)


async def test_stop_strings_end_a_reply(options, model):
    call = chat(model, ALICE, ("user", "What is the name of my dog?"), max_tokens=30, memory="off")
    async with opened(options) as keeper:
        whole = (await collect(keeper.chat(call))).text
        stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
        done = await collect(keeper.chat(replace(call, stop=(stop,))))
        assert done.finish_reason == "stop"
        assert done.text == whole[: whole.index(stop)]


async def test_versions_rollback_pin_export_import_forget(options, model):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        await keeper.flush()
        one = await state(keeper, ALICE)
        await keeper.ingest(piece(ALICE, 2))
        await keeper.flush()
        two = await state(keeper, ALICE)
        assert [v["version"] for v in await keeper.versions(ALICE)] == [2, 1]
        assert (await keeper.pin(ALICE))["pinned"] is True
        assert (await keeper.rollback(ALICE, None))["memory_version"] == 3
        back = await state(keeper, ALICE)
        assert torch.equal(back[0], one[0])
        assert not torch.equal(back[0], two[0])
        file = await keeper.export(ALICE)
        await keeper.import_(BOB, file)
        assert torch.equal((await state(keeper, BOB))[0], one[0])
        with pytest.raises(BadMemoryFile):
            await keeper.import_(BOB, file[:-40])
        assert torch.equal((await state(keeper, BOB))[0], one[0])
        receipt = await keeper.forget(ALICE)
        assert any(name.endswith(".titanmem") for name in receipt["removed"])
        with pytest.raises(NoSuchMemory):
            await keeper.describe(ALICE)
        await keeper.ingest(piece(ALICE, 3))
        await keeper.flush()
        assert (await keeper.describe(ALICE))["memory_version"] == 1, "an erased user may begin anew"
    async with opened(options, epoch=2) as keeper:
        assert torch.equal((await state(keeper, BOB))[0], one[0])


async def test_a_damaged_newest_version_costs_nothing(options, tmp_path):
    async with opened(options) as keeper:
        for seed in (1, 2, 3):
            await keeper.ingest(piece(ALICE, seed))
            await keeper.flush()
        before = await state(keeper, ALICE)
    newest = max((tmp_path / "store" / "users").rglob("*.titanmem"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data)
    async with opened(options, epoch=2) as keeper:
        after = await state(keeper, ALICE)
        assert torch.equal(after[0], before[0])
        assert after[3:] == before[3:]
        assert b'titan:rollbacks_total{reason="' in await keeper.metrics(), "the damage is counted"
        await keeper.ingest(piece(ALICE, 4))
        await keeper.flush()


async def test_another_model_is_refused(options, tmp_path):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
    other = str(tiny_folder(tmp_path / "other", seed=5))
    with pytest.raises(
        WrongBase, match=r"/store: its memories are of the model that is served: .* a store and a journal"
    ):
        await open_keeper(replace(options, model=other, epoch=2))
    elsewhere = replace(options, store_url=f"file://{tmp_path}/store2", journal_dir=f"{tmp_path}/journal2")
    async with opened(elsewhere, model=other) as keeper:
        await keeper.ingest(piece(BOB, 2))
    (tmp_path / "store2" / "users" / "local" / "bob").rename(tmp_path / "store" / "users" / "local" / "bob")
    async with opened(options, model=other, epoch=2) as keeper:  # some are its own
        with pytest.raises(WrongBase):
            await keeper.ingest(piece(ALICE, 2))


async def test_many_short_messages_are_stored_so_that_a_crash_costs_a_short_replay(options):
    async with opened(options, persist_tokens=65536, idle_flush_s=3600.0) as keeper:
        for seed in range(SEGMENTS_MAX):
            assert not keeper.roster.vault.store.versions(ALICE)
            await keeper.ingest(piece(ALICE, seed, 5))
        resident = keeper.roster.slab.peek(ALICE)
        assert resident is not None
        async with asyncio.timeout(20):
            while resident.dirty:  # noqa: ASYNC110 (a background task stores, and tells nobody)
                await asyncio.sleep(0.01)
        assert len(await keeper.versions(ALICE)) == 1
        await keeper.ingest(piece(ALICE, SEGMENTS_MAX, 5))
        await asyncio.sleep(0.05)
        assert len(await keeper.versions(ALICE)) == 1, "not after each one from then on"


async def test_an_older_epoch_cannot_store(options, tmp_path):
    async with opened(options) as old:
        await old.ingest(piece(ALICE, 1))
        await old.flush()
        newer = replace(options, epoch=2, journal_dir=f"{tmp_path}/journal2")
        async with opened(newer) as new:
            await new.ingest(piece(ALICE, 2))
        await old.ingest(piece(ALICE, 3))
        with pytest.raises(Fenced):
            await old.flush()
        with pytest.raises(Fenced):
            await old.ingest(piece(ALICE, 4))
        resident = old.roster.slab.get(ALICE)
        assert resident is not None
        resident.stored_version = 10**6  # nothing more to flush at the end


async def test_a_store_that_is_gone_does_not_stop_whoever_is_resident(options, model, tmp_path):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        (tmp_path / "store").rename(tmp_path / "unmounted")
        (tmp_path / "store").write_text("a file where the folder should be")
        with pytest.raises(StoreError):
            await keeper.flush()
        done = await collect(keeper.chat(chat(model, ALICE, ("user", "Hi."), max_tokens=2)))
        assert done.memory_version == 3
        assert b'titan:store_errors_total{op="put"' in await keeper.metrics()
        before = await state(keeper, ALICE)
        (tmp_path / "store").unlink()
        (tmp_path / "unmounted").rename(tmp_path / "store")
        assert await keeper.flush() == 1
    async with opened(options, epoch=2) as keeper:
        assert same(await state(keeper, ALICE), before)


async def test_a_full_queue_is_refused(options, model):
    async with opened(options, queue_max=1) as keeper:
        events = keeper.chat(chat(model, ALICE, ("user", "Hi."), max_tokens=500))
        await anext(events)
        with pytest.raises(QueueFull):
            await keeper.ingest(piece(BOB, 1))
        await events.aclose()


async def test_a_long_prompt_is_journalled_in_whole_chunks(options, model):
    text = "my dog's name is Rex7. " * 300
    keeper = await open_keeper(options)
    await collect(keeper.chat(chat(model, ALICE, ("user", text), max_tokens=3)))
    before = await state(keeper, ALICE)
    await crash(keeper)
    async with opened(options, epoch=2) as again:
        assert same(await state(again, ALICE), before)


async def test_a_part_holds_the_shards_users_and_the_model(options, tmp_path, model):
    target = f"file://{tmp_path}/snapshots"
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        from datetime import UTC, datetime

        part = await keeper.snapshot_part(new_snapshot_id(datetime.now(UTC)), target, True)
        assert part["users"] == 1
        assert part["model_files"] >= 4
        assert open_objects(target).get(part["name"]) is not None
        keeper.options = replace(options, buckets=frozenset())
        assert await keeper.users() == []
