"""Checkpoints of other makers give transformers' logits, and a folder that cannot be served says why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from titanmem.cache import Cache
from titanmem.checkpoint import base_hash, decoder_hash
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.folder import check_folder, load_base, load_decoder, save_memory
from titanmem.spec import MemorySpec

SAME = 1e-4
"""Float32 through three layers, summed in other orders; logits are of size 1 to 10."""
WINDOW = 16
VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-head": ("Llama", {"head_dim": 16}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9e3}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "beta_fast": 8}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, **MSCALE}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-3}),
    "qwen2-sliding": ("Qwen2", {**SLIDING, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3", {"attention_bias": True, "head_dim": 16, **SLIDING}),
}  # fmt: skip


def reference(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model of transformers, every weight and bias away from its start value."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.dim() == 2 else 0.5))
            if "norm" in name:
                weight.add_(1.0)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def changed(folder: Path, **values: Any) -> Path:
    """The folder with other values in its config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def served(folder: Path, window: int = WINDOW) -> Decoder:
    """As the server loads it, with an operator's window."""
    knobs = {"window": window, "chunk_size": min(16, window)}
    return load_decoder(folder, DecoderConfig.load(folder).overridden(knobs))


def tokens_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def by_blocks(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of whole rows."""
    x, _ = decoder.lower_blocks(tokens)
    read = torch.zeros(*tokens.shape, 0)
    return decoder.logits(decoder.upper_blocks(x, read), read, torch.zeros(VOCABULARY, 0))


def by_steps(decoder: Decoder, tokens: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Logits of one conversation: prefilled in pieces, then token by token."""
    cache, outs, start = Cache(decoder.config, 1), [], 0
    for cut in [*cuts, *range(cuts[-1] + 1, tokens.shape[1] + 1)]:
        part = tokens[:, start:cut]
        cache.begin(torch.tensor([part.shape[1]]), part.shape[1])
        x, query = decoder.lower_cached(part, cache)
        read = torch.zeros(1, part.shape[1], query.shape[-1])
        out = decoder.upper_cached(x, read, cache)
        cache.advance()
        outs.append(decoder.logits(out, read, torch.zeros(VOCABULARY, query.shape[-1])))
        start = cut
    return torch.cat(outs, 1)


def wanted(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    kind, options = MODELS[name]
    model = reference(kind, **options)
    decoder = served(saved(model, tmp_path))
    assert decoder.config.memory.window == WINDOW
    for count in (5, WINDOW - 1, WINDOW):  # below the window attention is full in every kind
        tokens = tokens_of(count)
        target = wanted(model, tokens)
        assert 1 < target.abs().max() < 100
        assert (by_blocks(decoder, tokens) - target).abs().max() < SAME, count
        assert (by_steps(decoder, tokens, (3,)) - target).abs().max() < SAME, count
    wide = served(tmp_path, 64)  # clipped to the checkpoint's own where it has one
    assert wide.config.memory.window == (16 if "sliding" in name or name == "qwen3-biased" else 64)
    tokens = tokens_of(64)
    target = wanted(model, tokens)
    assert (by_blocks(wide, tokens) - target).abs().max() < SAME
    assert (by_steps(wide, tokens, (16, 32, 40)) - target).abs().max() < SAME


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("count", [WINDOW + 1, 2 * WINDOW, 3 * WINDOW, 61])
def test_above_the_window_logits_are_those_of_a_sliding_model(kind, count, tmp_path):
    slides = {"sliding_window": WINDOW} if kind == "Mistral" else SLIDING
    model = reference(kind, **slides)
    decoder = served(saved(model, tmp_path))
    tokens = tokens_of(count)
    target = wanted(model, tokens)
    if count % WINDOW == 0:
        assert (by_blocks(decoder, tokens) - target).abs().max() < SAME
    for cuts in ((1,), (WINDOW,), (WINDOW - 1, WINDOW + 1)):
        assert (by_steps(decoder, tokens, cuts) - target).abs().max() < SAME


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_model_with_full_attention_is_served_as_if_it_slid(kind, tmp_path):
    """The window is the operator's: the same weights in transformers with that sliding_window say the same."""
    model = reference(kind, head_dim=8)
    decoder = served(saved(model, tmp_path))
    twin, slides = ("Mistral", {"sliding_window": WINDOW}) if kind == "Llama" else (kind, SLIDING)
    sliding = reference(twin, head_dim=8, **slides)
    sliding.load_state_dict(model.state_dict())
    tokens = tokens_of(3 * WINDOW)
    target = wanted(sliding, tokens)
    assert (by_blocks(decoder, tokens) - target).abs().max() < SAME
    assert (by_steps(decoder, tokens, (WINDOW,)) - target).abs().max() < SAME
    assert (wanted(model, tokens) - target).abs().max() > 100 * SAME, "the window matters here"
