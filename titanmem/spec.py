"""`MemorySpec`: every knob of one memory, with its default, range and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

RANGES: dict[str, tuple[float, float]] = {
    "depth": (3, 3),
    "d_nltm": (16, 1024),
    "key_dim": (8, 1024),
    "value_dim": (8, 1024),
    "code_width": (64, 65536),
    "code_active": (1, 256),
    "conv": (1, 64),
    "surprise_threshold": (0.05, 0.5),
    "top_k_ratio": (0.002, 0.05),
    "chunk_size": (16, 8192),
    "window": (16, 65536),
    "momentum": (0.0, 0.99),
    "forget_slope": (0.0, 8.0),
    "forget_bias": (-8.0, 32.0),
    "max_norm": (1.0, 1e6),
}
"""Inclusive range of each numeric knob."""

CHOICES: dict[str, tuple[str, ...]] = {"rule": ("sparse",), "mode": ("mac",)}
"""What this release implements of each word-valued knob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySpec:
    """Shape and update rule of a neural long-term memory (Titans, arXiv 2501.00663, sections 3.1 and 4.1).

    A wrong value is a ValueError that names field, value and range. A checkpoint carries its own spec; what an
    operator sets wins over it, within the ranges (`overridden`).
    """

    rule: str = "sparse"
    """Update rule: `sparse`, the gated delta rule on the columns that a token's sparse code selects."""
    mode: str = "mac"
    """How memory meets attention: `mac`, memory as context."""
    depth: int = 3
    """Layers of θ_M. The first two are features that all users share, the last one is the user's state."""
    d_nltm: int = 256
    """Width of the first hidden layer, units."""
    key_dim: int = 128
    """Width of keys and queries."""
    value_dim: int = 128
    """Width of values."""
    code_width: int = 8192
    """H: units of the second hidden layer. H x value_dim elements are a user's state."""
    code_active: int = 32
    """K: units of a code that are not zero."""
    conv: int = 16
    """Taps of the causal depthwise convolution over keys and queries, tokens."""
    surprise_threshold: float = 0.15
    """Normalised gradient norm under which a token is not written. Values and codes have unit norm, so the norm
    w |v - M(k)| lies in [0, 2] for every model and 1 means `never heard of it`."""
    top_k_ratio: float = 0.02
    """Largest share of θ_M's written elements that one update may change; a chunk with more takes several updates."""
    chunk_size: int = 256
    """Tokens of one update. A segment's end also ends a chunk."""
    window: int = 256
    """Tokens that attention sees."""
    momentum: float = 0.9
    """β of the surprise that the forget gate sees: S_t = β S_{t-1} + (1 - β) s_t."""
    forget_slope: float = 0.8
    """λ of α_t = σ(λ S_t - γ), the share that is forgotten of the elements an update rewrites."""
    forget_bias: float = 4.0
    """γ of the same. The notes' 0.2 forgets 45 % of a rewritten element; see docs/log.md."""
    max_norm: float = 256.0
    """|θ_M| at which the utilisation that metrics and the guard watch is 1."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"memory.{name} = {value!r}: must be a number from {low} to {high}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"memory.{name} = {getattr(self, name)!r}: this release has {', '.join(choices)}"
                )
        if self.chunk_size > self.window:
            raise ValueError(
                f"memory.chunk_size = {self.chunk_size}: must be at most window = {self.window}, "
                "for a token must reach the memory before it leaves the window"
            )
        if self.code_active >= self.code_width:
            raise ValueError(
                f"memory.code_active = {self.code_active}: must be below code_width = {self.code_width}"
            )
        if self.tokens_per_update < 1:
            raise ValueError(
                f"memory.top_k_ratio = {self.top_k_ratio}: one token touches {self.code_active} of "
                f"{self.code_width} columns, which is more"
            )

    @property
    def written_shape(self) -> tuple[int, int]:
        """Shape of the written layer at rest: (H, D), one row a code unit."""
        return (self.code_width, self.value_dim)

    @property
    def parameters(self) -> int:
        """Elements of one user's state."""
        return self.code_width * self.value_dim

    @property
    def tokens_per_update(self) -> int:
        """Tokens whose columns together stay within `top_k_ratio` of the elements."""
        return int(self.top_k_ratio * self.code_width) // self.code_active

    def overridden(self, values: Mapping[str, Any]) -> MemorySpec:
        """The same spec with an operator's values; an unknown name is a ValueError."""
        known = {field.name for field in fields(self)}
        for name in values:
            if name not in known:
                raise ValueError(f"memory.{name}: unknown; the knobs are {', '.join(sorted(known))}")
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)
