"""Plain PyTorch twins of the dense kernels: a user's θ_M is a whole MLP, read and written for many users at once.

M(k): a_0 = k, z_l = W_l a_{l-1}, a_l = silu(z_l) below the last layer; y = z_L, then optionally divided by its root
mean square and added to k. Every gradient of a chunk is taken at the weights of the chunk's start, in closed form:
the gradient of token t in W_l is δ_l,t a_{l-1,t}^T, so that no gradient of weight size is made for one token.

Axes: U users, C tokens of a chunk, I and O a layer's input and output width, L layers.
`W_UOI` are the weights of these users, already gathered from a slab; see `ops` for slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.miras import BIASES

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What the MLP does around its layers, and the loss that its gradients descend."""

    residual: bool = False
    norm: bool = False
    bias: str = "l2"
    bias_parameter: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """One pass through the memory, with what the gradients need."""

    output_UCD: Tensor
    inputs: list[Tensor]
    """a_{l-1} of each layer, [U, C, I]."""
    before: list[Tensor]
    """z_l of each layer, [U, C, O]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """The gradients of a chunk as factors: token t's gradient in W_l is `deltas[l][:, t]` outer `inputs[l][:, t]`."""

    deltas: list[Tensor]
    inputs: list[Tensor]
    norm_LUC: Tensor
    """|δ_l| |a_{l-1}|: the norm of each token's gradient in each layer."""


def forward(weights: Sequence[Tensor], x_UCD: Tensor, form: Form) -> Forward:
    """y = M(x) for every user's own weights (Titans, eq. 15)."""
    inputs, before, hidden = [], [], x_UCD
    for layer, W_UOI in enumerate(weights):
        if layer:
            hidden = F.silu(hidden)
        inputs.append(hidden)
        hidden = torch.bmm(hidden, W_UOI.to(hidden.dtype).transpose(1, 2))
        before.append(hidden)
    if form.norm:
        hidden = hidden * (hidden.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    if form.residual:
        hidden = x_UCD + hidden
    return Forward(output_UCD=hidden, inputs=inputs, before=before)


def root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0: a token that is not there has norm 0, and no NaN may come back from it."""
    return square.clamp_min(1e-30).sqrt()


def silu_slope(z: Tensor) -> Tensor:
    """Derivative of silu."""
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate))


def output_delta(done: Forward, value_UCD: Tensor, form: Form) -> Tensor:
    """Gradient of the loss in z_L: the bias's own, sent back through the norm."""
    delta = BIASES[form.bias].gradient(done.output_UCD, value_UCD, form.bias_parameter)
    if form.norm:
        z = done.before[-1]
        scale = (z.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        delta = scale * (delta - z * scale.square() * (delta * z).mean(-1, keepdim=True))
    return delta


def gradients(weights: Sequence[Tensor], done: Forward, value_UCD: Tensor, form: Form) -> Gradients:
    """Factors of every token's gradient, and its norm by |g_t|^2 = sum_l |δ_l|^2 |a_{l-1}|^2: no gradient is made."""
    delta = output_delta(done, value_UCD, form)
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        delta = torch.bmm(delta, weights[layer].to(delta.dtype)) * silu_slope(done.before[layer - 1])
        deltas.insert(0, delta)
    norms = [
        torch.linalg.vector_norm(delta, dim=-1) * torch.linalg.vector_norm(inputs, dim=-1)
        for delta, inputs in zip(deltas, done.inputs, strict=True)
    ]
    return Gradients(deltas=deltas, inputs=done.inputs, norm_LUC=torch.stack(norms))


def surprise(weights: Sequence[Tensor], key_UCD: Tensor, value_UCD: Tensor, form: Form) -> Gradients:
    """Forward, residual, deltas and norms of a chunk (Titans, section 3.1: the gradient is the surprise)."""
    return gradients(weights, forward(weights, key_UCD, form), value_UCD, form)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """A chunk of gated steps as one linear map (the identity beside `coefficients`)."""

    keep_U: Tensor
    """Of M_0 in M_C."""
    carry_U: Tensor
    """Of S_0 in M_C."""
    momentum_U: Tensor
    """Of S_0 in S_C."""
    write_UC: Tensor
    """Of each token's gradient in M_C, with a minus: θ_t p_t."""
    push_UC: Tensor
    """Of each token's gradient in S_C, with a minus: θ_t r_t."""


def reverse_scan(gain_UC: Tensor, bias_UC: Tensor) -> Tensor:
    """x_t = bias_t + gain_t x_{t+1} with x_C = 0, for all t in log2(C) steps (Hillis and Steele, CACM 1986)."""
    step, tokens = 1, gain_UC.shape[1]
    while step < tokens:
        ahead_gain, ahead_bias = (F.pad(x[:, step:], (0, step)) for x in (gain_UC, bias_UC))
        bias_UC = bias_UC + gain_UC * ahead_bias
        gain_UC = gain_UC * ahead_gain
        step *= 2
    return bias_UC


def suffix_products(x_UC: Tensor) -> Tensor:
    """prod_{l >= t} x_l for every t: a reversed cumulative product, which has a gradient also where x is 0."""
    return x_UC.flip(1).cumprod(1).flip(1)


def coefficients(eta_UC: Tensor, theta_UC: Tensor, alpha_UC: Tensor, valid_UC: Tensor) -> Coefficients:
    """S_t = η_t S_{t-1} - θ_t u_t, M_t = (1 - α_t) M_{t-1} + S_t over a chunk, as scalars for each token.

    With gradients u_t at the chunk's start, both recurrences are linear, so no scan over weights is needed:

        M_C = Π(1 - α) M_0 + η_1 p_1 S_0 - Σ θ_t p_t u_t        S_C = Π η S_0 - Σ θ_t r_t u_t
        p_t = Π_{l>t} (1 - α_l) + η_{t+1} p_{t+1}               r_t = Π_{l>t} η_l

    A token that is not valid is no step at all: it has η = 1, α = 0, θ = 0 and adds no S to M.
    """
    valid = valid_UC.to(eta_UC.dtype)
    eta = torch.where(valid_UC, eta_UC, torch.ones_like(eta_UC))
    kept = 1 - alpha_UC * valid
    theta = theta_UC * valid
    kept_from, eta_from = suffix_products(kept), suffix_products(eta)
    one = torch.ones_like(kept_from[:, :1])
    kept_after = torch.cat([kept_from[:, 1:], one], 1)
    eta_after = torch.cat([eta_from[:, 1:], one], 1)
    next_eta = torch.cat([eta[:, 1:], torch.zeros_like(one)], 1)
    p = reverse_scan(next_eta, valid * kept_after)
    return Coefficients(
        keep_U=kept_from[:, 0],
        carry_U=eta[:, 0] * p[:, 0],
        momentum_U=eta_from[:, 0],
        write_UC=theta * p,
        push_UC=theta * eta_after,
    )


def step_ratio(weights: Sequence[Tensor], found: Gradients) -> Tensor:
    """By how much the steps of a chunk are too long together, at least 1, [U, C]; `weights` [U, C] a layer.

    A chunk's gradients are all taken at its start, so tokens that push the same way overshoot together. Under |e|^2 the
    answer to token t moves by -2 Σ_j K_tj w_j e_j, K_tj = Σ_l (a_t . a_j) J_l,t J_l,j^T over the layers l with
    J = dy / dz, and diverges once the largest eigenvalue of 2 K w passes 2. Its largest row says how large it may be
    (Gershgorin), with |J^T e|^2 / |e|^2 = |δ_l|^2 / |δ_L|^2 for J J^T: r_t = max(1, 2 Σ_l |δ_l|^2 / |δ_L|^2
    a_t . Σ_j w_j a_j). A chunk whose steps are small together keeps them to the bit.
    """
    last_UC = found.deltas[-1].square().sum(-1).clamp_min(1e-30)
    total_UC = torch.zeros_like(last_UC)
    for weight_UC, delta_UCO, input_UCI in zip(weights, found.deltas, found.inputs, strict=True):
        # Sums, not products with one row: the BLAS has its own routine for these, whose bits depend on the batch.
        together_UI = (weight_UC[..., None] * input_UCI).sum(1)
        alike_UC = (input_UCI * together_UI[:, None]).sum(-1)
        total_UC = total_UC + delta_UCO.square().sum(-1) / last_UC * alike_UC
    return total_UC.mul(2).clamp_min(1.0)


def bounded(c: Coefficients, found: Gradients) -> Coefficients:
    """The same coefficients with each token's step divided by its `step_ratio`."""
    ratio_UC = step_ratio([c.write_UC] * len(found.deltas), found)
    write_UC = c.write_UC / ratio_UC
    push_UC = write_UC if c.push_UC is c.write_UC else c.push_UC / ratio_UC
    return replace(c, write_UC=write_UC, push_UC=push_UC)


def pooled_coefficients(eta_U: Tensor, theta_UC: Tensor, alpha_U: Tensor, valid_UC: Tensor) -> Coefficients:
    """One step a chunk: S_C = η S_0 - Σ θ_t u_t, M_C = (1 - α) M_0 + S_C; a chunk without a token is no step."""
    theta = theta_UC * valid_UC
    some = valid_UC.any(1)
    zero, one = torch.zeros_like(eta_U), torch.ones_like(eta_U)
    return Coefficients(
        keep_U=torch.where(some, 1 - alpha_U, one),
        carry_U=torch.where(some, eta_U, zero),
        momentum_U=torch.where(some, eta_U, one),
        write_UC=theta,
        push_UC=theta,
    )


def outer(factor_UC: Tensor, delta_UCO: Tensor, input_UCI: Tensor) -> Tensor:
    """Σ_t factor_t δ_t a_t^T, [U, O, I], in the wider dtype of the three."""
    weighted_UCO = factor_UC[..., None] * delta_UCO
    return torch.bmm(weighted_UCO.transpose(1, 2), input_UCI.to(weighted_UCO.dtype))


def scaled(factor_U: Tensor, W_UOI: Tensor) -> Tensor:
    return factor_U[:, None, None] * W_UOI


def step(
    W_UOI: Tensor,
    S_UOI: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    c: Coefficients,
    decayed_UOI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One chunk of one layer: the new accumulator and momentum. `decayed_UOI` is β_w W, the L2 part of a gradient."""
    shared = c.write_UC is c.push_UC
    pushed = outer(c.push_UC, delta_UCO, input_UCI)
    written = pushed if shared else outer(c.write_UC, delta_UCO, input_UCI)
    if decayed_UOI is not None:
        pushed = pushed + scaled(c.push_UC.sum(1), decayed_UOI)
        written = pushed if shared else written + scaled(c.write_UC.sum(1), decayed_UOI)
    return (
        scaled(c.keep_U, W_UOI) + scaled(c.carry_U, S_UOI) - written,
        scaled(c.momentum_U, S_UOI) - pushed,
    )


def step_(
    W_UOI: Tensor,
    S_UOI: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    c: Coefficients,
    decayed_UOI: Tensor | None = None,
) -> None:
    """`step` in place and without a gradient: each sum rides on its GEMM, so a chunk passes over the weights seldom.

    User by user, since a BLAS call has one pair of scalars.
    """
    shared = c.write_UC is c.push_UC
    push_UCO = c.push_UC[..., None] * delta_UCO
    write_UCO = push_UCO if shared else c.write_UC[..., None] * delta_UCO
    keep, carry, momentum = c.keep_U.tolist(), c.carry_U.tolist(), c.momentum_U.tolist()
    for user, (W, S) in enumerate(zip(W_UOI, S_UOI, strict=True)):
        push_OC, write_OC, inputs = push_UCO[user].T, write_UCO[user].T, input_UCI[user]
        if not shared:
            W.addmm_(write_OC, inputs, beta=keep[user], alpha=-1).add_(S, alpha=carry[user])
            S.addmm_(push_OC, inputs, beta=momentum[user], alpha=-1)
        else:
            # One step: M_C = keep M_0 + S_C where there was a token, and S_C is the momentum as it becomes.
            S.addmm_(push_OC, inputs, beta=momentum[user], alpha=-1)
            if carry[user]:
                torch.add(S, W, alpha=keep[user], out=W)
        if decayed_UOI is not None:
            W.sub_(decayed_UOI[user], alpha=float(c.write_UC[user].sum()))
            S.sub_(decayed_UOI[user], alpha=float(c.push_UC[user].sum()))
