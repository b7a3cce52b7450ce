"""Shape of the decoder θ_F, as `config.json` names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titanmem.errors import ModelFolderError
from titanmem.spec import MemorySpec

MODEL_TYPE = "titanmem_llama"


SERVED: dict[str, tuple[str, ...]] = {"rule": ("sparse",), "mode": ("mac",)}
"""What this decoder, and with it the server, has of the library's rules and modes."""

UNUSED = frozenset(
    ("width", "expansion", "persistent_tokens", "lr", "weight_decay", "huber_delta", "lp_power", "lq_power")
)
"""Numeric knobs of `MemorySpec` that mean nothing to it: setting one would be ignored, so it is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A Llama-family decoder with query-key norm (the Qwen3 layout) and a memory between its lower and upper layers."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    embedding_conv: int = 4
    """Taps of a causal depthwise convolution on the embeddings, tokens; 1 is none."""
    memory_layer: int = 2
    """First layer that sees the memory. Layers below never read it, so keys, values and gates of any number of
    tokens are computed in parallel and ingest runs these layers alone."""
    memory: MemorySpec = field(default_factory=MemorySpec)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "embedding_conv"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 1_000_000:
                raise ValueError(f"config.json: {name} = {value!r}: must be a whole number from 1 to 1000000")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_key_value_heads = {self.num_key_value_heads}: must divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if not 1 <= self.memory_layer < self.num_hidden_layers:
            raise ValueError(
                f"config.json: memory_layer = {self.memory_layer}: must be from 1 to {self.num_hidden_layers - 1}"
            )
        for name, served in SERVED.items():
            if getattr(self.memory, name) not in served:
                raise ValueError(
                    f"memory.{name} = {getattr(self.memory, name)!r}: the decoder serves {', '.join(served)}; "
                    "the others are in the library (titanmem.attach)"
                )
        if self.memory.writes_all:
            raise ValueError("memory.written_layers = 'all': the decoder serves last")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """From the parsed `config.json`; unknown names are left to other readers of the file."""
        if values.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"config.json: model_type = {values.get('model_type')!r}: this release reads {MODEL_TYPE}"
            )
        own = {name: values[name] for name in cls.__slots__ if name in values and name != "memory"}
        return cls(**own, memory=MemorySpec().overridden(values.get("memory", {})))

    @classmethod
    def load(cls, folder: Path) -> DecoderConfig:
        """Read `config.json` of a model folder; ModelFolderError names the file and what is wrong."""
        path = folder / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError as error:
            raise ModelFolderError(f"{folder}: config.json is missing") from error
        except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ModelFolderError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.json`."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "memory"}
        return {
            "architectures": ["TitanmemForCausalLM"],
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            "sliding_window": self.memory.window,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            **own,
            "memory": self.memory.to_dict(),
        }
