"""Checkpoints of other makers: what a Llama-family `config.json` and its tensors' names mean to our decoder.

Pure functions from names and plain values; no file is read here, and no torch.

| `model_type` | what is its own |
| --- | --- |
| `llama` | `attention_bias` on all four projections, `mlp_bias` |
| `mistral` | every layer slides over `sliding_window` |
| `qwen2` | bias on queries, keys and values, none on the output; some layers may slide |
| `qwen3` | query-key norm, a head width of its own, `attention_bias`; some layers may slide |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanmem.rope import RopeScaling
from titanmem.spec import MemorySpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` that are read beside our own."""

WINDOW = 1024
"""Tokens that attention sees where a checkpoint has no memory and nobody says otherwise; less if the checkpoint does.
The rings of keys and values have this size for every conversation."""

_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""What transformers takes where `config.json` names no `num_key_value_heads`; for Llama as many as query heads."""
_SLIDING_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28
_PREFIX = "model."
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias")
"""Ends of names that old checkpoints hold and that follow from the config."""


def decoder_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` for a parsed `config.json` of one of `FAMILIES`, without memory.

    Raises ValueError naming the field that this release does not read.
    """
    family = values["model_type"]
    _check(values)
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    theta, scaling = _rope(values)
    window_max = _sliding_window(family, values)
    window = min(w for w in (WINDOW, window_max, values.get("max_position_embeddings")) if w)
    spec = MemorySpec()
    own = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "num_key_value_heads": values.get("num_key_value_heads", _KEY_VALUE_HEADS.get(family)) or heads,
        "head_dim": values.get("head_dim", 128 if family == "qwen3" else None)
        or values["hidden_size"] // heads,
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2" or _biased(family, values),
        "o_bias": _biased(family, values),
        "mlp_bias": family == "llama" and values.get("mlp_bias", False),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "embedding_conv": 1,
        "memory_layer": max(1, layers // 2),
        "remembers": False,
        "memory": spec.overridden({"window": window, "chunk_size": min(spec.chunk_size, window)}),
    }
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        **{name: values[name] for name in same},
        **own,
        **({"window_max": window_max} if window_max else {}),
    }


def own_name(name: str) -> str | None:
    """Our name of a tensor of the file; None for what is not read."""
    return None if name.endswith(_DERIVED) else name.removeprefix(_PREFIX)


def file_name(name: str) -> str:
    """The name that a file of one of `FAMILIES` gives to our tensor `name`."""
    return name if name.startswith("lm_head.") else _PREFIX + name


def _check(values: Mapping[str, Any]) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if type(values.get(name)) is not int or values[name] < 1:
            raise ValueError(f"{name} = {values.get(name)!r}: must be a whole number from 1 on")
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
        value = values.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} = {value!r}: must be a whole number from 1 on, or null")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act = {values['hidden_act']!r}: this release reads silu")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise ValueError(
            f"quantization_config: {method!r} weights are not read; take float16, bfloat16 or float32"
        )


def _biased(family: str, values: Mapping[str, Any]) -> bool:
    return family in ("llama", "qwen3") and values.get("attention_bias", False)


def _sliding_window(family: str, values: Mapping[str, Any]) -> int | None:
    """The least number of tokens that a layer of the checkpoint sees, itself included; None is all of them.

    transformers lets token i see the tokens from i - sliding_window + 1 on, which is our window.
    """
    if family == "llama":
        return None
    window = values.get("sliding_window", _SLIDING_WINDOW)
    if family == "mistral":
        return window
    window = window if values.get("use_sliding_window", False) else None
    layers = values["num_hidden_layers"]
    full = values.get("max_window_layers", _MAX_WINDOW_LAYERS)
    kinds = values.get("layer_types") or [
        "sliding_attention" if window and layer >= full else "full_attention" for layer in range(layers)
    ]
    if len(kinds) != layers:
        raise ValueError(f"layer_types: {len(kinds)} for num_hidden_layers = {layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types: {kind!r}: this release reads full_attention and sliding_attention"
            )
    if "sliding_attention" not in kinds:
        return None
    if window is None:
        raise ValueError("layer_types: sliding_attention, but use_sliding_window and sliding_window say none")
    return window


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """θ and the scaling: `rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of those before."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError("rope_parameters: one set for all layers is read, not one for each kind of layer")
    theta = given.get("rope_theta") or values.get("rope_theta") or 10000.0
    factor = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor = {factor!r}: this release reads 1")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    longest = values.get("max_position_embeddings")
    first = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    scaling = {**given, "rope_type": kind, "original_max_position_embeddings": first or longest}
    if kind == "yarn" and scaling.get("factor") is None and first and longest:
        scaling["factor"] = longest / first
    return theta, RopeScaling.from_dict(scaling)
