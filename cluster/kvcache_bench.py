"""`titanmem bench kvcache`: one decoder with a memory and a window, and with full attention over all it has read.

Both sides read the same tokens with the same weights, float32, on the same threads. Full attention keeps every key and
value; what a piece of text costs it grows with what stands before. A piece is timed behind several depths of a cache
that is really there, the line through those times is the model, and its sum over the whole text is the time to read it.
Up to `measured_tokens` the cache is allocated and timed; beyond that the line is continued, and the result says so.

Axes: B rows (1), A heads, S cached tokens, T new tokens, Z head width, E decoder width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.config import Config
from cluster.needle_bench import HAYSTACK
from storage.segment import SEGMENT_TOKENS_MAX
from titanmem.corpus import read_text
from titanmem.decoder import Decoder
from titanmem.folder import load_decoder
from titanmem.recall import Listener
from titanmem.tokenizer import ChatTokenizer

PIECE = 256
"""Tokens that full attention reads at once."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS = 3
SAMPLE_CHARS = 2_000_000
QUESTION = "What is my dog's name?"

Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCacheOptions:
    """One comparison after `tokens` tokens."""

    tokens: int
    measured_tokens: int = 262_144
    """Longest cache that is allocated and timed; longer texts are extrapolated from it."""
    threads: int = 2
    model: Path | None = None


class FullAttention:
    """The decoder's own layers with a cache of every key and value; no memory, no window."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self.decoder, config = decoder, decoder.config
        shape = (len(decoder.stack), 2, 1, config.num_key_value_heads, tokens + PIECE, config.head_dim)
        self.cache = torch.zeros(shape)
        self.length = 0

    def fill(self, tokens: int) -> None:
        """Have `tokens` tokens behind us; attention costs the same whatever they say."""
        self.cache[..., self.length : tokens, :].normal_()
        self.length = tokens

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """int64 [T] tokens behind what is cached; logits [V] after the last. The cache stays as long as it was."""
        decoder, start, end = self.decoder, self.length, self.length + len(ids)
        x, _ = decoder.embed(ids[None], decoder.zeros(1, decoder.config.embedding_conv - 1))
        turn = decoder.turn(torch.arange(start, end))
        mask = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
        for layer, (keys, values) in zip(decoder.stack, self.cache, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            key, value = attention.keys_values(normed, turn)
            keys[:, :, start:end], values[:, :, start:end] = key, value
            query = attention.queries(normed, turn)
            x = layer.finish(x, attention.attend(query, keys[:, :, :end], values[:, :, :end], mask))
        return decoder.lm_head(decoder.norm(x[0, -1]))

    def bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return self.cache[..., :1, :].numel() * self.cache.element_size() * tokens


def run_kvcache_bench(options: KvCacheOptions, report: Report = lambda what, share: None) -> dict[str, Any]:
    """`{"tokens", "kv": {"state_bytes", "ttft_ms", "tokens_per_s"}, "nltm": {…}, "ratio": {…}, "model": {…}}`."""
    torch.set_num_threads(options.threads)
    folder = options.model or Config().model_folder
    decoder, tokenizer = load_decoder(folder), ChatTokenizer(folder)
    text = tokenizer.encode(read_text(HAYSTACK)[:SAMPLE_CHARS])
    question = torch.from_numpy(_prompt(tokenizer).astype(np.int64))
    report("memory", 0.0)
    nltm = _memory(decoder, tokenizer, text, options.tokens)
    kv, model = _full(decoder, text, question, options, report)
    return {
        "tokens": options.tokens,
        "kv": kv,
        "nltm": nltm,
        "ratio": {
            "state_bytes": nltm["state_bytes"] / kv["state_bytes"],
            "ttft": kv["ttft_ms"] / nltm["ttft_ms"],
            "tokens_per_s": nltm["tokens_per_s"] / kv["tokens_per_s"],
        },
        "model": model,
    }


def _prompt(tokenizer: ChatTokenizer) -> np.ndarray:
    parts, prompt = tokenizer.render([{"role": "user", "content": QUESTION}])
    return np.concatenate([parts[0].tokens, prompt])


def _memory(decoder: Decoder, tokenizer: ChatTokenizer, text: np.ndarray, tokens: int) -> dict[str, float]:
    """Fold the text, or as much of it as is needed: what a segment costs does not depend on what stands before."""
    listener = Listener(decoder, tokenizer)
    listener.read(text[:SEGMENT_TOKENS_MAX])  # the first call of anything is slower
    done, started = 0, time.perf_counter()
    while done < min(tokens, len(text) - SEGMENT_TOKENS_MAX):
        listener.read(text[done : done + SEGMENT_TOKENS_MAX])
        done += SEGMENT_TOKENS_MAX
    seconds = time.perf_counter() - started
    first = [_timed(lambda: listener.ask([QUESTION], most=1)) for _ in range(REPEATS)]
    config = decoder.config
    window = 2 * 4 * (config.num_hidden_layers + 1) * config.num_key_value_heads * config.head_dim
    return {
        "state_bytes": config.memory.state_bytes + window * config.memory.window,
        "ttft_ms": 1000 * median(first),
        "tokens_per_s": done / seconds,
    }


def _full(
    decoder: Decoder, text: np.ndarray, question: Tensor, options: KvCacheOptions, report: Report
) -> tuple[dict[str, float], dict[str, Any]]:
    longest = min(options.tokens, options.measured_tokens)
    side = FullAttention(decoder, longest)
    piece = torch.from_numpy(text[:PIECE].astype(np.int64))
    side.read(piece)
    depths, seconds = [], []
    for number, share in enumerate(DEPTHS):
        report(f"full attention over {int(share * longest):,} tokens", 0.2 + 0.8 * number / len(DEPTHS))
        side.fill(int(share * longest))
        depths.append(side.length)
        seconds.append(median(_timed(lambda: side.read(piece)) for _ in range(REPEATS)))
    asked = median(_timed(lambda: side.read(question)) for _ in range(REPEATS))
    slope, base = np.polyfit(depths, seconds, 1)
    pieces = options.tokens / PIECE
    whole_s = pieces * base + slope * PIECE * pieces * (pieces - 1) / 2
    kv = {
        "state_bytes": side.bytes(options.tokens),
        "ttft_ms": 1000 * asked * options.tokens / longest,
        "tokens_per_s": options.tokens / whole_s,
    }
    model = {
        "seconds_a_piece": f"{base:.4f} + {slope:.3e} * tokens before it, pieces of {PIECE} tokens",
        "timed_at": dict(zip(map(str, depths), seconds, strict=True)),
        "extrapolated": options.tokens > longest,
    }
    return kv, model


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
