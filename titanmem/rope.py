"""How a checkpoint stretches its rotary positions to texts longer than those it was first trained on. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """`rope_scaling` of a `config.json` (`rope_parameters` since transformers 5), of the kinds that are read.

    A wrong value is a ValueError that names it.
    """

    rope_type: str
    """`linear`: all angles divided by `factor` (arXiv 2306.15595). `llama3`: slow ones only (Llama 3.1). `yarn`: the
    same by a ramp over the dimensions, with a temperature (arXiv 2309.00071)."""
    factor: float
    original_max_position_embeddings: int = 0
    """Tokens of the texts that the model was first trained on (`llama3`, `yarn`)."""
    low_freq_factor: float = 1.0
    """Turns within such a text below which an angle is divided by the whole factor (`llama3`)."""
    high_freq_factor: float = 4.0
    """Turns above which it stays as it is (`llama3`)."""
    beta_fast: float = 32.0
    """The same turns for `yarn`, above."""
    beta_slow: float = 1.0
    """… and below."""
    attention_factor: float | None = None
    """What cosine and sine are multiplied with (`yarn`); None is 0.1 ln(factor) + 1."""
    mscale: float | None = None
    """With `mscale_all_dim`: other weights of that logarithm (`yarn`, when `attention_factor` is None)."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the ramp begins and ends at whole dimensions (`yarn`)."""

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(
                f"rope scaling of type {self.rope_type!r}: this release reads default, {', '.join(KINDS)}"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e6:
                raise ValueError(f"rope scaling: {name} = {value!r}: must be a number above 0")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 <= value <= 1e6):
                raise ValueError(f"rope scaling: {name} = {value!r}: must be a number or null")
        positions = self.original_max_position_embeddings
        if self.rope_type != "linear" and (not isinstance(positions, int) or positions < 1):
            raise ValueError(
                f"rope scaling: original_max_position_embeddings = {positions!r}: must be tokens"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("rope scaling: low_freq_factor must be below high_freq_factor")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """From a mapping that names `rope_type` and `factor`; null is the default, other names are left alone."""
        known = {name: values[name] for name in cls.__slots__ if values.get(name) is not None}
        if "factor" not in known:
            raise ValueError(f"rope scaling of type {values.get('rope_type')!r}: names no factor")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def scaled(self, frequencies: list[float], theta: float) -> list[float]:
        """The frequencies of the pairs of dimensions, radians a token, as this kind changes them."""
        if self.rope_type == "linear":
            return [frequency / self.factor for frequency in frequencies]
        if self.rope_type == "llama3":
            kept = [self._kept_by_turns(frequency) for frequency in frequencies]
        else:
            kept = self._kept_by_ramp(len(frequencies), theta)
        return [f * (share + (1 - share) / self.factor) for f, share in zip(frequencies, kept, strict=True)]

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def _kept_by_turns(self, frequency: float) -> float:
        """Share of the frequency that is not divided: 0 for slow ones, 1 for fast ones, a ramp over turns between."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return min(1.0, max(0.0, share))

    def _kept_by_ramp(self, pairs: int, theta: float) -> list[float]:
        """The same for `yarn`, whose ramp is over the number of the pair."""

        def pair_of(turns: float) -> float:
            return (
                pairs
                * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
                / math.log(theta)
            )

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001
        return [1.0 - min(1.0, max(0.0, (pair - low) / (high - low))) for pair in range(pairs)]
