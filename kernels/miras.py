"""MIRAS (arXiv 2504.13173): attentional biases and retention gates, each a loss and its closed-form gradient.

A bias says how far what the memory answers, y = M(k), is from the value v; its gradient in y is what an update sends
back through the memory. A retention gate maps the accumulator that updates add to onto the weights that are read.

Axes: D value width; U users, O and I rows and columns of one layer; any axes before them are free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Bias:
    """Attentional bias: its `loss` and the `gradient` of that in y."""

    loss: Callable[[Tensor, Tensor, float], Tensor]
    """(y [..., D], v [..., D], parameter) -> [...]."""
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    """(y [..., D], v [..., D], parameter) -> [..., D]."""


def _norm(e: Tensor) -> Tensor:
    return (e.square().sum(-1, keepdim=True) + TINY).sqrt()


def _l2_loss(y: Tensor, v: Tensor, _: float) -> Tensor:
    return (y - v).square().sum(-1)


def _l2_gradient(y: Tensor, v: Tensor, _: float) -> Tensor:
    return 2 * (y - v)


def _huber_loss(y: Tensor, v: Tensor, delta: float) -> Tensor:
    size = _norm(y - v)[..., 0]
    return torch.where(size <= delta, size.square(), 2 * delta * size - delta * delta)


def _huber_gradient(y: Tensor, v: Tensor, delta: float) -> Tensor:
    e = y - v
    return 2 * e * (delta / _norm(e)).clamp_max(1.0)


def _lp_loss(y: Tensor, v: Tensor, power: float) -> Tensor:
    return (y - v).abs().pow(power).sum(-1)


def _lp_gradient(y: Tensor, v: Tensor, power: float) -> Tensor:
    e = y - v
    return power * e.sign() * e.abs().pow(power - 1)


def _dot_loss(y: Tensor, v: Tensor, _: float) -> Tensor:
    return -(y * v).sum(-1)


def _dot_gradient(y: Tensor, v: Tensor, _: float) -> Tensor:
    return -v.expand_as(y)


BIASES: dict[str, Bias] = {
    "l2": Bias(loss=_l2_loss, gradient=_l2_gradient),
    "huber": Bias(loss=_huber_loss, gradient=_huber_gradient),
    "lp": Bias(loss=_lp_loss, gradient=_lp_gradient),
    "dot": Bias(loss=_dot_loss, gradient=_dot_gradient),
}
"""`l2` |e|^2 (Titans, eq. 12); `huber` the same up to |e| = delta and linear beyond (Yaad, experimental);
`lp` sum |e|^p (Moneta, experimental); `dot` -<y, v> (LaCT, arXiv 2505.23884)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Retention gate: the weights that an accumulator stands for."""

    weights: Callable[[Tensor, Tensor, float], Tensor]
    """(accumulator [..., O, I], start [O, I], parameter) -> weights [..., O, I]."""
    gradient: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(gradient in the weights, accumulator, start, parameter) -> gradient in the accumulator, [..., O, I]."""


def _decay(accumulator: Tensor, _start: Tensor, _: float) -> Tensor:
    return accumulator


def _decay_gradient(gradient: Tensor, _accumulator: Tensor, _start: Tensor, _: float) -> Tensor:
    return gradient


def _row_norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + TINY).sqrt()


def _norm_weights(accumulator: Tensor, start: Tensor, _: float) -> Tensor:
    return accumulator * (_row_norm(start) / _row_norm(accumulator))


def _norm_gradient(gradient: Tensor, accumulator: Tensor, start: Tensor, _: float) -> Tensor:
    size = _row_norm(accumulator)
    unit = accumulator / size
    along = (gradient * unit).sum(-1, keepdim=True)
    return (gradient - along * unit) * (_row_norm(start) / size)


def _lq_size(accumulator: Tensor, power: float) -> Tensor:
    return accumulator.abs().pow(power).sum((-2, -1), keepdim=True).pow(1 / power).clamp_min(TINY)


def _lq_weights(accumulator: Tensor, _start: Tensor, power: float) -> Tensor:
    return accumulator * _lq_size(accumulator, power).pow(2 - power)


def _lq_gradient(gradient: Tensor, accumulator: Tensor, _start: Tensor, power: float) -> Tensor:
    size = _lq_size(accumulator, power)
    along = (gradient * accumulator).sum((-2, -1), keepdim=True)
    slope = accumulator.sign() * (accumulator.abs() / size).pow(power - 1)
    return size.pow(2 - power) * (gradient + (2 - power) / size * along * slope)


def _kl_weights(accumulator: Tensor, _start: Tensor, _: float) -> Tensor:
    return accumulator.softmax(-1)


def _kl_gradient(gradient: Tensor, accumulator: Tensor, _start: Tensor, _: float) -> Tensor:
    weights = accumulator.softmax(-1)
    return weights * (gradient - (gradient * weights).sum(-1, keepdim=True))


RETENTIONS: dict[str, Retention] = {
    "decay": Retention(weights=_decay, gradient=_decay_gradient),
    "norm": Retention(weights=_norm_weights, gradient=_norm_gradient),
    "lq": Retention(weights=_lq_weights, gradient=_lq_gradient),
    "kl": Retention(weights=_kl_weights, gradient=_kl_gradient),
}
"""What updates add to is decayed in each case. `decay` reads it as it is; `norm` scales each row to the norm it
started with (LaCT); `lq` W = A / |A|_q^(q-2) (Moneta, experimental); `kl` W = softmax(log-weights) a row (Memora,
experimental: a row's normaliser is a constant that the next softmax removes, so log W may be kept unnormalised).
MIRAS adds the gradient in W to the accumulator, mirror-descent fashion; `gradient` is the chain rule, for checks
and for training through it."""
