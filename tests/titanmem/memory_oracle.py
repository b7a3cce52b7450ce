"""The judge of `NeuralMemory`: one user, token by token, in float64, straight from the equations.

No production code but the parameters. Gradients come from autograd on the loss as the papers write it, one token at
a time, so that the closed forms are checked too. Equation numbers: Titans (arXiv 2501.00663), MIRAS (2504.13173).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titanmem.memory import NeuralMemory
from titanmem.spec import MemorySpec

WIDE = torch.float64


@dataclass
class Judge:
    """One user's memory."""

    memory: NeuralMemory
    weights: list[Tensor] = field(default_factory=list)
    momentum: list[Tensor] = field(default_factory=list)
    surprise_momentum: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec: MemorySpec = self.memory.spec
        self.p = {name: value.detach().to(WIDE) for name, value in self.memory.state_dict().items()}
        self.weights = [self.p[f"dense.start.{layer}"].clone() for layer in range(self.spec.depth)]
        self.start = [W.clone() for W in self.weights]
        self.momentum = [torch.zeros_like(W) for W in self.weights]
        self.surprise_momentum = [0.0] * self.spec.depth

    def projected(self, x_TE: Tensor, name: str, normalised: bool) -> Tensor:
        """Linear, causal depthwise convolution, SiLU, L2 norm (Titans, section 4.4), nothing before the first token."""
        z = x_TE.to(WIDE) @ self.p[f"{name}.linear.weight"].T
        taps = self.p.get(f"{name}.taps")
        if taps is not None:
            mixed = torch.zeros_like(z)
            for t in range(len(z)):
                for age in range(min(t + 1, taps.shape[1])):
                    mixed[t] += taps[:, -1 - age] * z[t - age]
            z = mixed
        z = z * torch.sigmoid(z)
        return z / z.norm(dim=-1, keepdim=True) if normalised else z

    def read_weights(self) -> list[Tensor]:
        spec, out = self.spec, []
        for A, W0 in zip(self.weights, self.start, strict=True):
            if spec.retention == "norm":
                A = A / A.norm(dim=1, keepdim=True) * W0.norm(dim=1, keepdim=True)
            elif spec.retention == "lq":
                size = A.abs().pow(spec.lq_power).sum() ** (1 / spec.lq_power)
                A = A / size ** (spec.lq_power - 2)
            elif spec.retention == "kl":
                A = torch.exp(A - A.amax(1, keepdim=True))
                A = A / A.sum(1, keepdim=True)
            out.append(A)
        return out

    def answer(self, weights: list[Tensor], k: Tensor) -> Tensor:
        a = k
        for layer, W in enumerate(weights):
            a = W @ (a if layer == 0 else a * torch.sigmoid(a))
        if self.spec.norm:
            a = a / (a.square().mean() + 1e-6).sqrt()
        return k + a if self.spec.residual else a

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        spec, e = self.spec, y - v
        if spec.bias == "l2":
            return e.square().sum()
        if spec.bias == "lp":
            return e.abs().pow(spec.lp_power).sum()
        if spec.bias == "dot":
            return -(y * v).sum()
        size, delta = e.norm(), spec.huber_delta
        return size**2 if size <= delta else 2 * delta * size - delta**2

    def gradient(self, weights: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [W.clone().requires_grad_() for W in weights]
        return list(torch.autograd.grad(self.loss(self.answer(leaves, k), v), leaves))

    @torch.enable_grad()
    def walk(self, x_TE: Tensor, *, reads: bool = True) -> Tensor:
        """Every chunk: read, then write. Returns y [T, E]."""
        spec = self.spec
        q, k = (self.projected(x_TE, name, True) for name in ("query", "key"))
        v = self.projected(x_TE, "value", False)
        out = []
        for start in range(0, len(x_TE), spec.chunk_size):
            chunk = range(start, min(start + spec.chunk_size, len(x_TE)))
            at_start = self.read_weights()
            out += [self.answer(at_start, q[t]) for t in chunk]
            gradients = [self.gradient(at_start, k[t], v[t]) for t in chunk]
            if spec.rule == "titans":
                part = slice(chunk.start, chunk.stop)
                self.titans(x_TE[part].to(WIDE), k[part], gradients, at_start)
            else:
                self.sparse(k[chunk.start : chunk.stop], gradients, at_start)
        y = torch.stack(out).detach()
        return y @ self.p["out.weight"].T if "out.weight" in self.p else y

    def titans(
        self, x_CE: Tensor, k_CD: Tensor, gradients: list[list[Tensor]], at_start: list[Tensor]
    ) -> None:
        """S_t = η S - θ ∇l, M_t = (1 - α) M + S_t (eq. 9, 10, 13), token by token, or pooled a chunk."""
        spec = self.spec
        gates = torch.sigmoid(
            x_CE @ self.p["dense.gates.linear.weight"].T + self.p["dense.gates.linear.bias"]
        )
        self.surprise += [
            float(sum(g.square().sum() for g in gradient) ** 0.5 / self.scale().norm())
            for gradient in gradients
        ]
        self.written += [True] * len(gradients)
        held = [self.held(gates, j) for j in range(len(gates))]
        ratios = self.ratios([held] * spec.depth, k_CD, gradients, at_start)
        for layer in range(spec.depth):
            S, M = self.momentum[layer], self.weights[layer]
            l2 = spec.weight_decay * at_start[layer]
            if spec.gates == "token":
                for (eta, theta, alpha), gradient, r in zip(gates, gradients, ratios, strict=True):
                    S = eta * S - theta / r * (gradient[layer] + l2)
                    M = (1 - alpha) * M + S
            else:
                eta, _, alpha = gates.mean(0)
                S = eta * S
                for (_, theta, _), gradient, r in zip(gates, gradients, ratios, strict=True):
                    S = S - theta / r * (gradient[layer] + l2)
                M = (1 - alpha) * M + S
            self.momentum[layer], self.weights[layer] = S, M

    def held(self, gates: Tensor, j: int) -> float:
        """How much of token j's gradient the end of its chunk holds."""
        if self.spec.gates == "chunk":
            return float(gates[j, 1])
        S, M = 0.0, 0.0
        for t, (eta, theta, alpha) in enumerate(gates.tolist()):
            S = eta * S + (theta if t == j else 0.0)
            M = (1 - alpha) * M + S
        return M

    def ratios(
        self, held: list[list[float]], k_CD: Tensor, gradients: list[list[Tensor]], at_start: list[Tensor]
    ) -> list[float]:
        """How much each token's step is shortened (docs/library.md): max(1, 2 Σ_l |δ_l|^2 / |δ_L|^2 a_t . Σ c a)."""
        if not self.spec.bounded:
            return [1.0] * len(gradients)
        inputs = [k_CD]
        for W in at_start[:-1]:
            z = inputs[-1] @ W.T
            inputs.append(z * torch.sigmoid(z))
        # A token's gradient is δ a^T, so |δ| is its norm over |a|.
        deltas = [
            [float(gradient[layer].norm() / inputs[layer][t].norm()) for layer in range(len(inputs))]
            for t, gradient in enumerate(gradients)
        ]
        out = []
        for t, delta in enumerate(deltas):
            total = 0.0
            for layer, a in enumerate(inputs):
                together = (torch.tensor(held[layer], dtype=WIDE)[:, None] * a).sum(0)
                total += (delta[layer] / max(delta[-1], 1e-15)) ** 2 * float(a[t] @ together)
            out.append(max(1.0, 2 * total))
        return out

    def scale(self) -> Tensor:
        return self.p["dense.surprise_scale_L"]

    def sparse(self, k_CD: Tensor, gradients: list[list[Tensor]], at_start: list[Tensor]) -> None:
        """Surprise, momentum, threshold, selection, masked decay (docs/memory.md, rule `sparse`)."""
        spec, scale = self.spec, self.scale()
        surprise = [
            float(sum(g.square().sum() for g in gradient) ** 0.5 / scale.norm()) for gradient in gradients
        ]
        written = [s >= spec.surprise_threshold for s in surprise]
        self.surprise += surprise
        self.written += written
        held = [[float(lr) * keep for keep in written] for lr in self.p["dense.log_lr_L"].exp()]
        ratios = self.ratios(held, k_CD, gradients, at_start)
        for layer in range(spec.depth):
            S = self.surprise_momentum[layer]
            for gradient in gradients:
                S = spec.momentum * S + (1 - spec.momentum) * float(gradient[layer].norm() / scale[layer])
            self.surprise_momentum[layer] = S
            if not any(written):
                continue
            alpha = float(torch.sigmoid(torch.tensor(spec.forget_slope * S - spec.forget_bias, dtype=WIDE)))
            steps = [step / ratio for step, ratio in zip(held[layer], ratios, strict=True)]
            chosen = [step * g[layer] for g, step in zip(gradients, steps, strict=True)]
            W = self.weights[layer]
            whole = torch.stack(chosen).sum(0)
            if spec.selection == "elements":
                count = max(1, int(spec.top_k_ratio * W.numel()))
                mask = torch.zeros(W.numel(), dtype=torch.bool)
                mask[whole.abs().flatten().topk(count).indices] = True
                mask = mask.view_as(W)
            else:
                energy = torch.stack([g.square() for g in chosen]).sum(0)
                rows = energy.sum(1).topk(max(1, int(spec.top_k_ratio**0.5 * len(W)))).indices
                columns = energy.sum(0).topk(max(1, int(spec.top_k_ratio**0.5 * W.shape[1]))).indices
                mask = torch.zeros(W.shape, dtype=torch.bool)
                mask[rows[:, None], columns] = True
            step = whole + sum(steps) * spec.weight_decay * W
            self.weights[layer] = torch.where(mask, (1 - alpha) * W - step, W)
