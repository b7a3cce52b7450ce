"""A checkpoint of another maker, made by transformers: a small Llama of random weights with a tokenizer of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from titanmem.corpus import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def foreign_folder(folder: Path, texts: Iterable[str], *, vocab_size: int, width: int, layers: int) -> Path:
    """A folder as `save_pretrained` leaves it, in three shards."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=f"{4 * vocab_size * width // 1000 + 2}KB")
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, vocab_size).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
