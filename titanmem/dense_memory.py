"""θ_M as a whole MLP that every user owns (`written_layers = all`): the rules `titans` and `sparse`, chunk by chunk.

Pure functions of a chunk over `kernels.dense`; `NeuralMemory` brings projections, gates and state.

Axes: U users, C tokens of a chunk, D memory width, O and I rows and columns of a layer, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels import dense, ops, selection
from kernels.dense import Coefficients, Form, Forward, Gradients
from kernels.miras import RETENTIONS
from titanmem.projections import Gates
from titanmem.spec import MemorySpec
from titanmem.state import Written


def form_of(spec: MemorySpec) -> Form:
    """The kernels' view of a spec."""
    parameter = {"huber": spec.huber_delta, "lp": spec.lp_power}.get(spec.bias, 0.0)
    return Form(residual=spec.residual, norm=spec.norm, bias=spec.bias, bias_parameter=parameter)


class DenseMemory(nn.Module):
    """θ_M₀, the step sizes that training learns, and one chunk of either rule."""

    surprise_scale_L: Tensor

    def __init__(self, width: int, spec: MemorySpec) -> None:
        super().__init__()
        self.spec, self.form = spec, form_of(spec)
        self.start = nn.ParameterList(
            nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))
            for rows, columns in spec.layer_shapes
        )
        if spec.norm:
            # Keys have norm 1 and silu halves what is small: with this the norm divides by about one, not by a
            # small number that would make gradients, and rounding errors with them, as many times larger.
            with torch.no_grad():
                self.start[-1].mul_(math.sqrt(spec.d_nltm) * 2 ** (spec.depth - 1))
        self.register_buffer("surprise_scale_L", torch.ones(spec.depth))
        if spec.rule == "titans":
            self.gates = Gates(width, spec)
        else:
            self.log_lr_L = nn.Parameter(torch.full((spec.depth,), math.log(spec.lr)))

    def new_weights(self, users: int) -> list[Tensor]:
        return [W_OI.expand(users, -1, -1).clone() for W_OI in self.start]

    def new_momentum(self, users: int) -> list[Tensor]:
        if self.spec.rule == "titans":
            return [torch.zeros_like(W_UOI) for W_UOI in self.new_weights(users)]
        return [self.start[0].new_zeros(users, self.spec.depth)]

    def effective(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights that are read: what updates add to, through the retention gate."""
        gate = RETENTIONS[self.spec.retention]
        return [
            gate.weights(W_UOI.to(W_OI.dtype), W_OI, self.spec.lq_power)
            for W_UOI, W_OI in zip(weights, self.start, strict=True)
        ]

    def read(self, weights: list[Tensor], query_UCD: Tensor) -> Tensor:
        W = self.effective(weights)
        if _on_kernels(query_UCD):
            return ops.dense_read(W, *_everyone(query_UCD), self.form)
        return dense.forward(W, query_UCD, self.form).output_UCD

    def read_and_gradients(
        self, weights: list[Tensor], query_UCD: Tensor | None, key_UCD: Tensor, value_UCD: Tensor
    ) -> tuple[Tensor | None, list[Tensor], Gradients]:
        """What the queries read, the weights that were read, and the gradients of keys and values there.

        Queries and keys meet the same weights, so they share one pass.
        """
        W = self.effective(weights)
        if _on_kernels(key_UCD):
            read = None if query_UCD is None else ops.dense_read(W, *_everyone(query_UCD), self.form)
            slots_U, _, tokens_U = _everyone(key_UCD)
            return read, W, ops.dense_surprise(W, slots_U, key_UCD, value_UCD, tokens_U, self.form)
        if query_UCD is None:
            return None, W, dense.surprise(W, key_UCD, value_UCD, self.form)
        tokens = query_UCD.shape[1]
        both = dense.forward(W, torch.cat([query_UCD, key_UCD], 1), self.form)
        keys = Forward(
            output_UCD=both.output_UCD[:, tokens:],
            inputs=[x[:, tokens:] for x in both.inputs],
            before=[x[:, tokens:] for x in both.before],
        )
        return both.output_UCD[:, :tokens], W, dense.gradients(W, keys, value_UCD, self.form)

    def surprise(self, found: Gradients) -> Tensor:
        """Norm of each token's gradient over all layers, in units of `surprise_scale_L`, [U, C].

        The scale is the norm that the same model's unwritten memory shows on average text (`calibrate`), so 1 is
        `as surprising as to a memory that has learnt nothing`.
        """
        return dense.root(found.norm_LUC.square().sum(0)) / self.surprise_scale_L.norm()

    def write_titans(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        W: list[Tensor],
        found: Gradients,
        gates: tuple[Tensor, Tensor, Tensor],
        valid_UC: Tensor,
    ) -> Written:
        """Titans, eq. 9, 10 and 13, with every gradient at the chunk's start.

        Without a gradient to keep, float32 `weights` and `momentum` are changed in place.
        """
        c = self._coefficients(gates, valid_UC)
        if self.spec.bounded:
            c = dense.bounded(c, found)
        decay = self.spec.weight_decay
        steps = []
        for layer, (delta, inputs) in enumerate(zip(found.deltas, found.inputs, strict=True)):
            pair = weights[layer], momentum[layer]
            decayed = decay * W[layer] if decay else None
            if _on_kernels(delta) and (decayed is None or self.spec.retention == "decay"):
                ops.dense_step_(*pair, _slots(delta), delta, inputs, c, decay)
            elif torch.is_grad_enabled() or not all(x.dtype == delta.dtype for x in pair):
                pair = dense.step(*pair, delta, inputs, c, decayed)
            else:
                dense.step_(*pair, delta, inputs, c, decayed)
            steps.append(pair)
        return Written(
            weights=[new for new, _ in steps],
            momentum=[new for _, new in steps],
            surprise_UC=self.surprise(found) * valid_UC,
            written_UC=valid_UC,
            forget_U=1 - c.keep_U,
            changed_U=valid_UC.any(1) * self.spec.parameters,
        )

    def _coefficients(self, gates: tuple[Tensor, Tensor, Tensor], valid_UC: Tensor) -> Coefficients:
        eta_UC, theta_UC, alpha_UC = gates
        if self.spec.gates == "token":
            return dense.coefficients(eta_UC, theta_UC, alpha_UC, valid_UC)
        count_U = valid_UC.sum(1).clamp_min(1)
        eta_U, alpha_U = ((x * valid_UC).sum(1) / count_U for x in (eta_UC, alpha_UC))
        return dense.pooled_coefficients(eta_U, theta_UC, alpha_U, valid_UC)

    def write_sparse(
        self, weights: list[Tensor], momentum_UL: Tensor, found: Gradients, valid_UC: Tensor
    ) -> Written:
        """Steps 1-5 of the sparse rule; elements that are not selected keep their bits."""
        spec = self.spec
        surprise_UC = self.surprise(found) * valid_UC
        written_UC = valid_UC & (surprise_UC >= spec.surprise_threshold)
        some_U = written_UC.any(1)
        momentum_UL = surprise_momentum(
            momentum_UL, found.norm_LUC / self.surprise_scale_L[:, None, None], valid_UC, spec.momentum
        )
        alpha_UL = torch.sigmoid(spec.forget_slope * momentum_UL - spec.forget_bias) * some_U[:, None]
        weights_LUC = [size * written_UC for size in self.log_lr_L.exp()]
        if spec.bounded:
            ratio_UC = dense.step_ratio(weights_LUC, found)
            weights_LUC = [weight_UC / ratio_UC for weight_UC in weights_LUC]
        new, changed = [], 0
        for layer, W_UOI in enumerate(weights):
            weight_UC = weights_LUC[layer]
            arguments = (
                W_UOI,
                found.deltas[layer],
                found.inputs[layer],
                weight_UC,
                1 - alpha_UL[:, layer],
                spec.weight_decay * weight_UC.sum(1),
            )
            moved, count = self._selected(*arguments)
            new.append(torch.where(some_U[:, None, None], moved, W_UOI))
            changed += count
        return Written(
            weights=new,
            momentum=[momentum_UL],
            surprise_UC=surprise_UC,
            written_UC=written_UC,
            forget_U=alpha_UL.mean(1),
            changed_U=some_U * changed,
        )

    def _selected(
        self,
        W_UOI: Tensor,
        delta_UCO: Tensor,
        input_UCI: Tensor,
        weight_UC: Tensor,
        keep_U: Tensor,
        decay_U: Tensor,
    ) -> tuple[Tensor, int]:
        ratio = self.spec.top_k_ratio
        if self.spec.selection == "elements":
            places_Uk, values_Uk = selection.element_step(
                W_UOI, delta_UCO, input_UCI, weight_UC, keep_U, decay_U, ratio
            )
            moved = W_UOI.flatten(1).scatter(1, places_Uk, values_Uk.to(W_UOI.dtype)).view_as(W_UOI)
            return moved, places_Uk.shape[1]
        rows_Ur, columns_Uc = selection.selected_rows_columns(delta_UCO, input_UCI, weight_UC, ratio)
        arguments = (delta_UCO, input_UCI, weight_UC, keep_U, decay_U, rows_Ur, columns_Uc)
        if _on_kernels(delta_UCO):
            moved = W_UOI.clone()
            ops.masked_step_(moved, _slots(delta_UCO), *arguments)
        else:
            block = selection.masked_step(W_UOI, *arguments)
            moved = selection.scatter_block(W_UOI, rows_Ur, columns_Uc, block)
        return moved, rows_Ur.shape[1] * columns_Uc.shape[1]


def _on_kernels(x: Tensor) -> bool:
    """Whether the fused kernels take this: they have no gradient, so training stays with plain PyTorch."""
    return ops.uses_triton(x) and not torch.is_grad_enabled()


def _slots(x_UCD: Tensor) -> Tensor:
    """A state's users as the kernels' slots."""
    return torch.arange(len(x_UCD), device=x_UCD.device)


def _everyone(x_UCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' view of users who are all there with all their tokens: slots, x, counts of tokens."""
    slots_U = _slots(x_UCD)
    return slots_U, x_UCD, torch.full_like(slots_U, x_UCD.shape[1])


def surprise_momentum(momentum_UL: Tensor, norm_LUC: Tensor, valid_UC: Tensor, beta: float) -> Tensor:
    """S_t = β S_{t-1} + (1 - β) s_t over the valid tokens of a chunk, for every layer, [U, L]."""
    after_UC = valid_UC.flip(1).cumsum(1).flip(1) - 1
    share_UC = (1 - beta) * beta ** after_UC.clamp_min(0).float() * valid_UC
    kept_U = beta ** valid_UC.sum(1).float()
    return kept_U[:, None] * momentum_UL + (norm_LUC * share_UC).sum(-1).T
