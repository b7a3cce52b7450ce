"""Shape of the decoder θ_F, as `config.json` names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from titanmem.checkpoint import CONFIG, MEMORY_CONFIG, MemoryConfig, read_json
from titanmem.errors import ModelFolderError
from titanmem.huggingface import FAMILIES, decoder_values
from titanmem.rope import RopeScaling
from titanmem.spec import MemorySpec

MODEL_TYPE = "titanmem_llama"


SERVED: dict[str, tuple[str, ...]] = {"rule": ("sparse",), "mode": ("mac", "mag", "mal")}
"""What this decoder, and with it the server, has of the library's rules and modes."""

UNUSED = frozenset(
    ("width", "expansion", "persistent_tokens", "lr", "weight_decay", "huber_delta", "lp_power", "lq_power")
)
"""Numeric knobs of `MemorySpec` that mean nothing to it: setting one would be ignored, so it is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A Llama-family decoder with a memory between its lower and upper layers; the defaults are the shipped layout,
    Qwen3's and a convolution on the embeddings. `titanmem.huggingface` says what other families set.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True
    """RMSNorm on each head's queries and keys."""
    qkv_bias: bool = False
    o_bias: bool = False
    """Bias on what attention gives back."""
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    """The head's weights are the embeddings."""
    embedding_conv: int = 4
    """Taps of a causal depthwise convolution on the embeddings, tokens; 1 is none."""
    window_max: int = 65536
    """Tokens that the checkpoint's own attention sees: `memory.window` is at most that."""
    remembers: bool = True
    """Whether the checkpoint has a memory. Without one, `memory` says the window and nothing else."""
    memory_layer: int = 3
    """First layer that sees the memory. Layers below never read it, so keys, values and gates of any number of
    tokens are computed in parallel and ingest runs these layers alone."""
    modes: tuple[str, ...] = SERVED["mode"]
    """Modes that the weights were trained for; a request may ask for any of them."""
    memory: MemorySpec = field(default_factory=MemorySpec)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "embedding_conv"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 1_000_000:
                raise ValueError(f"config.json: {name} = {value!r}: must be a whole number from 1 to 1000000")
        for name in ("qk_norm", "qkv_bias", "o_bias", "mlp_bias", "tie_word_embeddings", "remembers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config.json: {name} = {getattr(self, name)!r}: must be true or false")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e12:
                raise ValueError(f"config.json: {name} = {value!r}: must be a number above 0")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim = {self.head_dim}: must be even, for rotary positions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_key_value_heads = {self.num_key_value_heads}: must divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        self._check_memory()

    def _check_memory(self) -> None:
        if self.remembers and not 1 <= self.memory_layer < self.num_hidden_layers:
            raise ValueError(
                f"config.json: memory_layer = {self.memory_layer}: must be from 1 to {self.num_hidden_layers - 1}"
            )
        if not self.modes or set(self.modes) - set(SERVED["mode"]):
            raise ValueError(
                f"config.json: modes = {list(self.modes)}: must be some of {list(SERVED['mode'])}"
            )
        for name, served in SERVED.items():
            if getattr(self.memory, name) not in served:
                raise ValueError(
                    f"memory.{name} = {getattr(self.memory, name)!r}: the decoder serves {', '.join(served)}; "
                    "the others are in the library (titanmem.attach)"
                )
        if self.memory.writes_all:
            raise ValueError("memory.written_layers = 'all': the decoder serves last")
        if self.memory.window > self.window_max:
            raise ValueError(
                f"memory.window = {self.memory.window}: the checkpoint's attention sees {self.window_max} tokens"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """From the parsed `config.json` of ours or of `FAMILIES`; unknown names are left to other readers of it."""
        family = values.get("model_type")
        if family in FAMILIES:
            return cls(**decoder_values(values))
        if family != MODEL_TYPE:
            raise ValueError(
                f"config.json: model_type = {family!r}: this release reads {MODEL_TYPE}, {', '.join(FAMILIES)}"
            )
        own = {name: values[name] for name in cls.__slots__ if name in values and name != "memory"}
        own["modes"] = tuple(values.get("modes", SERVED["mode"]))
        if own.get("rope_scaling"):
            own["rope_scaling"] = RopeScaling.from_dict(own["rope_scaling"])
        return cls(**own, memory=MemorySpec().overridden(values.get("memory", {})))

    @classmethod
    def load_alone(cls, folder: Path) -> DecoderConfig:
        """Read `config.json` of a model folder, whatever memory lies beside it.

        Raises ModelFolderError naming the file and what is wrong.
        """
        values = read_json(folder / CONFIG)
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ModelFolderError(
                f"{folder / CONFIG}: {str(error).removeprefix('config.json: ')}"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> DecoderConfig:
        """The same, and `titanmem.json` if it is there (`titanmem.checkpoint`)."""
        config, found = cls.load_alone(folder), MemoryConfig.load(folder)
        if found is None:
            return config
        path = folder / MEMORY_CONFIG
        if config.remembers:
            raise ModelFolderError(f"{path}: this checkpoint has a memory of its own; move this file away")
        try:
            return config.with_memory(found.memory, found.memory_layer)
        except (ValueError, TypeError) as error:
            raise ModelFolderError(f"{path}: {str(error).removeprefix('config.json: ')}") from error

    def with_memory(self, spec: MemorySpec, memory_layer: int) -> DecoderConfig:
        """The same decoder with such a memory, its window clipped to the checkpoint's own."""
        return replace(self, memory=self._clipped(spec), memory_layer=memory_layer, remembers=True)

    def overridden(self, knobs: Mapping[str, Any]) -> DecoderConfig:
        """With an operator's knobs of the memory, the window clipped likewise; ValueError for one that is unfit."""
        return replace(self, memory=self._clipped(self.memory.overridden(knobs)))

    def _clipped(self, spec: MemorySpec) -> MemorySpec:
        window = min(spec.window, self.window_max)
        return (
            spec
            if window == spec.window
            else replace(spec, window=window, chunk_size=min(spec.chunk_size, window))
        )

    def served(self, mode: str, folder: Path) -> str:
        """`mode` itself. Raises ModelFolderError for one that the weights were not trained for."""
        if mode not in self.modes:
            raise ModelFolderError(
                f"{folder}: mode {mode!r}: this checkpoint was trained for {', '.join(self.modes)}"
            )
        return mode

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.json`."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "memory"}
        return {
            "architectures": ["TitanmemForCausalLM"],
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            "sliding_window": self.memory.window,
            "torch_dtype": "float16",
            **own,
            "modes": list(self.modes),
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_dict(),
            "memory": self.memory.to_dict(),
        }
