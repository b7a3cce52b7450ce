"""A model folder of a few thousand random weights, for tests of everything around a model."""

from __future__ import annotations

from pathlib import Path

import torch

from titanmem.corpus import train_tokenizer
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.folder import save_decoder
from titanmem.spec import MemorySpec

TEXT = [f"my dog's name is Rex{n}. What is the name of my dog? Your {n} times table. " * 3 for n in range(50)]


def tiny_config(vocab_size: int = 400, lookback: int = 0) -> DecoderConfig:
    """Two lower layers, two upper ones, a window of 16."""
    memory = MemorySpec(
        d_nltm=32, key_dim=16, value_dim=16, code_width=512, code_active=8, conv=4, chunk_size=16, window=16,
        lookback=lookback,
    )  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, memory_layer=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, memory=memory,
    )  # fmt: skip


def tiny_decoder(seed: int = 0, gate_bias: float = 0.0, lookback: int = 0) -> Decoder:
    """Random weights; with `gate_bias` 0 about half of all tokens are offered to the memory; none is skimmed over."""
    torch.manual_seed(seed)
    decoder = Decoder(tiny_config(lookback=lookback))
    with torch.no_grad():
        decoder.embed_conv.normal_(std=0.3)
        decoder.memory.gate_out.bias.fill_(gate_bias)
        decoder.memory.gate_out.weight.mul_(3.0)
        decoder.memory.skim.bias.fill_(99.0)
        decoder.memory.mag_proj.weight.normal_()
        decoder.memory.around_proj.weight.normal_(std=0.05)
        decoder.memory.lookahead.o_proj.weight.normal_(std=0.05)
        if lookback:
            decoder.memory.behind_proj.weight.normal_(std=0.1)
            decoder.memory.lookback.o_proj.weight.normal_(std=0.05)
    return decoder.eval().requires_grad_(False)


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """A whole model folder."""
    tokenizer = train_tokenizer(TEXT, tiny_config().vocab_size)
    save_decoder(tiny_decoder(seed), path, tokenizer.to_str())
    return path
