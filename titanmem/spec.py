"""`MemorySpec`: every knob of one memory, with its default, range and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

RANGES: dict[str, tuple[float, float]] = {
    "width": (0, 65536),
    "depth": (1, 4),
    "d_nltm": (16, 1024),
    "expansion": (1, 8),
    "key_dim": (8, 1024),
    "value_dim": (8, 1024),
    "code_width": (64, 65536),
    "code_active": (1, 256),
    "conv": (1, 64),
    "lookback": (0, 256),
    "persistent_tokens": (0, 256),
    "surprise_threshold": (0.05, 0.5),
    "read_floor": (0.0, 0.9),
    "top_k_ratio": (0.002, 0.05),
    "chunk_size": (16, 8192),
    "window": (16, 65536),
    "lr": (1e-5, 1.0),
    "momentum": (0.0, 0.99),
    "forget_slope": (0.0, 8.0),
    "forget_bias": (-8.0, 32.0),
    "weight_decay": (0.0, 1e-3),
    "huber_delta": (0.01, 10.0),
    "lp_power": (1.5, 4.0),
    "lq_power": (3.5, 8.0),
    "max_norm": (1.0, 1e6),
    "reservoir": (0, 65536),
}
"""Inclusive range of each numeric knob."""

CHOICES: dict[str, tuple[str, ...]] = {
    "rule": ("sparse", "titans"),
    "mode": ("mac", "mag", "mal", "lmm"),
    "gates": ("token", "chunk"),
    "selection": ("rows_columns", "elements"),
    "bias": ("l2", "huber", "lp", "dot"),
    "retention": ("decay", "norm", "lq", "kl"),
}
"""What each word-valued knob may say."""

FLAGS = ("residual", "norm", "bounded")

UNSTABLE: dict[tuple[str, str], str] = {
    (
        "dot",
        "decay",
    ): "the gradient of -<M(k), v> never vanishes, so without `norm` the weights grow with every token",
    (
        "dot",
        "lq",
    ): "the gradient of -<M(k), v> never vanishes: the accumulator grows and W = A / |A|^(q-2) fades to 0",
    (
        "dot",
        "kl",
    ): "the gradient of -<M(k), v> never vanishes, so every row of softmax weights collapses on one element",
    (
        "lp",
        "decay",
    ): "the gradient grows like |e|^(p-1), so one large error overshoots into a larger one; take `norm` or `lq`",
}
"""Pairs of `bias` and `retention` that are refused, with the reason (tests/titanmem/test_miras.py shows each)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySpec:
    """Shape and update rule of a neural long-term memory (Titans, arXiv 2501.00663; MIRAS, arXiv 2504.13173).

    A wrong value is a ValueError that names field, value and range. A checkpoint carries its own spec; what an
    operator sets wins over it, within the ranges (`overridden`).
    """

    rule: str = "sparse"
    """Update rule. `titans`: momentum and forgetting gated token by token (section 3.1). `sparse`: only surprising
    tokens are written, and an update changes only the elements it selects."""
    mode: str = "mac"
    """How memory meets attention (sections 4.1-4.3): `mac` as context, `mag` as gate, `mal` as layer, `lmm` alone."""
    written_layers: str | None = None
    """Layers of θ_M that inference writes: `all`, or `last` over features and sparse codes that all users share.
    None is `last` for the rule `sparse` and `all` for `titans`, which needs it."""
    width: int = 0
    """Width of the hidden states that are read and written; 0 is the decoder's own."""
    depth: int = 3
    """Layers of θ_M. With `last` there are always three: two of shared features, one written."""
    d_nltm: int = 256
    """Width of θ_M's input and output (`all`), or of its first hidden layer (`last`), units."""
    expansion: int = 1
    """Hidden layers of θ_M are expansion x d_nltm wide (`all`)."""
    residual: bool = False
    """M(k) = k + MLP(k) (`all`)."""
    norm: bool = False
    """The MLP's output is divided by its root mean square (`all`)."""
    key_dim: int = 128
    """Width of keys and queries (`last`)."""
    value_dim: int = 128
    """Width of values (`last`)."""
    code_width: int = 8192
    """H: units of the second hidden layer (`last`). H x value_dim elements are a user's state."""
    code_active: int = 32
    """K: units of a code that are not zero (`last`)."""
    conv: int = 16
    """Taps of the causal depthwise convolution over queries, keys and values, tokens; 1 is none."""
    lookback: int = 0
    """Tokens that a query gathers by attention beside that convolution, itself included; 0 is none (`last`). For
    checkpoints whose own layers were not trained to gather a question."""
    persistent_tokens: int = 0
    """Learned tokens that stand before everything that attention sees in mode `mac` (section 3.3)."""
    surprise_threshold: float = 0.15
    """Normalised gradient norm under which a token is not written (`sparse`). 1 is `as surprising as to a memory
    that has learnt nothing`, for every model."""
    read_floor: float = 0.0
    """Norm of what is read up to which it counts as nothing (`last`): what was told in the same words reads at 1, what
    was never told as what resembles it. Higher: fewer answers, and fewer wrong ones."""
    top_k_ratio: float = 0.02
    """Largest share of θ_M's written elements that one update may change (`sparse`)."""
    selection: str = "rows_columns"
    """How these are selected with `all`: whole `rows_columns` by gradient energy, or single `elements`."""
    chunk_size: int = 256
    """Tokens of one update. A segment's end also ends a chunk."""
    window: int = 256
    """Tokens that attention sees."""
    gates: str = "token"
    """Gates of `titans`: one of each per `token`, or momentum and forgetting pooled per `chunk` (cheaper, coarser)."""
    lr: float = 1e-2
    """η of `sparse` with `all`, and the largest θ of `titans`; both are start values of what training learns."""
    momentum: float = 0.9
    """β of the surprise that the forget gate sees (`sparse`), S_t = β S_{t-1} + (1 - β) s_t; for `titans` the start
    value of its learned gate η."""
    forget_slope: float = 0.8
    """λ of α_t = σ(λ S_t - γ), the share that is forgotten of the elements an update rewrites (`sparse`)."""
    forget_bias: float = 4.0
    """γ of the same, and minus the start bias of the forget gate of `titans`. See docs/log.md on the notes' 0.2."""
    bounded: bool = True
    """Steps are shortened where tokens of one chunk push the same way and would overshoot together (`all`); False is
    the papers to the letter, which diverges on long chunks of real text (docs/library.md has the figures)."""
    weight_decay: float = 0.0
    """β_w: L2 on θ_M inside the gradient (`all`)."""
    bias: str = "l2"
    """Attentional bias (MIRAS): `l2`; `huber` (Yaad, robust); `lp` (Moneta); `dot` (LaCT)."""
    huber_delta: float = 1.0
    """|e| above which `huber` is linear."""
    lp_power: float = 3.0
    """p of `lp`."""
    retention: str = "decay"
    """Retention gate (MIRAS): `decay`; `norm` (rows keep their start norm); `lq` (Moneta); `kl` (Memora)."""
    lq_power: float = 4.0
    """q of `lq`."""
    max_norm: float = 256.0
    """|θ_M| at which the utilisation that metrics and the guard watch is 1."""
    reservoir: int = 4096
    """Written entries that are kept for consolidation and for the guard's probes, 0 = none (`last`). One costs a user
    6 bytes for each active unit of its code and 6 more, whether it is there yet or not."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"memory.{name} = {value!r}: must be a number from {low} to {high}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"memory.{name} = {getattr(self, name)!r}: must be one of {', '.join(choices)}"
                )
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"memory.{name} = {getattr(self, name)!r}: must be true or false")
        if self.written_layers not in (None, "last", "all"):
            raise ValueError(f"memory.written_layers = {self.written_layers!r}: must be last, all or nothing")
        if self.chunk_size > self.window:
            raise ValueError(
                f"memory.chunk_size = {self.chunk_size}: must be at most window = {self.window}, "
                "for a token must reach the memory before it leaves the window"
            )
        if reason := UNSTABLE.get((self.bias, self.retention)):
            raise ValueError(
                f"memory.bias = {self.bias!r} with retention = {self.retention!r}: refused, {reason}"
            )
        self._check_rule()
        if not self.writes_all:
            self._check_codes()

    def _check_rule(self) -> None:
        if self.rule == "titans" and not self.writes_all:
            raise ValueError("memory.written_layers = 'last': the rule titans writes all layers; say all")
        if self.rule == "sparse" and self.retention != "decay":
            raise ValueError(
                f"memory.retention = {self.retention!r}: rescales elements that a sparse update did not select; "
                "the rule sparse has decay"
            )

    def _check_codes(self) -> None:
        if self.bias != "l2":
            raise ValueError(
                f"memory.bias = {self.bias!r}: sparse codes are written by the delta rule, the gradient of l2; "
                "written_layers = all has the others"
            )
        if self.depth != 3:
            raise ValueError(f"memory.depth = {self.depth}: with written_layers = last there are always 3")
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
    def writes_all(self) -> bool:
        """Whether every layer of θ_M is a user's own, rather than the last one over shared codes."""
        return self.written_layers == "all" or (self.written_layers is None and self.rule == "titans")

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each layer of θ_M (`all`)."""
        hidden = self.d_nltm * self.expansion
        widths = [self.d_nltm, *[hidden] * (self.depth - 1), self.d_nltm]
        return list(zip(widths[1:], widths[:-1], strict=True))

    @property
    def written_shape(self) -> tuple[int, int]:
        """Shape of the written layer at rest (`last`): (H, D), one row a code unit."""
        return (self.code_width, self.value_dim)

    @property
    def history(self) -> int:
        """Hidden states before a token that its query needs (`last`)."""
        return max(self.conv, self.lookback)

    @property
    def parameters(self) -> int:
        """Elements of one user's θ_M that inference writes."""
        if self.writes_all:
            return sum(rows * columns for rows, columns in self.layer_shapes)
        return self.code_width * self.value_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of one user's state: θ_M in float16, and with `last` the reservoir when it is full."""
        entry = 6 * self.code_active + 6
        return 2 * self.parameters + (0 if self.writes_all else self.reservoir * entry)

    @property
    def tokens_per_update(self) -> int:
        """Tokens whose columns together stay within `top_k_ratio` of the elements (`last`)."""
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
