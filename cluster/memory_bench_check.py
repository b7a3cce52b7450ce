"""Whether the memory that is about to be timed is right: a small run of each path, recomputed token by token.

In float64, from the equations, with gradients by autograd. The test suite holds the whole of it
(tests/titanmem/test_memory.py); this is what a benchmark asks before it says how fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import ops
from titanmem import MemorySpec, NeuralMemory

TOLERANCE = 1e-5
"""Of float32 results, relative to the largest element."""


def mistakes() -> list[str]:
    """One line for each path whose result is not what the equations give; empty when all is right."""
    kept = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        found = [
            f"{name}: off by {error:.1e}"
            for name, error in (
                ("titans, expansion 1", _titans_error(1)),
                ("titans, expansion 4", _titans_error(4)),
                ("sparse codes", _sparse_error()),
            )
            if not error < TOLERANCE
        ]
    finally:
        torch.set_rng_state(kept)
    return found


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


def _titans_error(expansion: int) -> float:
    """Pooled gates, residual and norm as in the comparison, 100 tokens in chunks of 64, two users."""
    spec = MemorySpec(
        width=60, d_nltm=60, depth=2, expansion=expansion, rule="titans", gates="chunk", chunk_size=64,
        residual=True, norm=True, conv=1, lr=1e-3, bounded=False,
    )  # fmt: skip
    memory = NeuralMemory(spec)
    assert memory.dense is not None
    torch.nn.init.normal_(memory.dense.gates.linear.weight, std=0.1)
    x = torch.randn(2, 100, 60)
    state = memory.new_state(2)
    with torch.no_grad():
        y, _ = memory(state, x)
    errors = []
    for user in range(2):
        y_wanted, W_wanted = _titans_by_hand(memory, x[user].double())
        errors.append(_error(y[user], y_wanted))
        errors += [_error(W[user], wanted) for W, wanted in zip(state.weights, W_wanted, strict=True)]
    return max(errors)


def _titans_by_hand(memory: NeuralMemory, x_TE: Tensor) -> tuple[Tensor, list[Tensor]]:
    p = {name: value.detach().double() for name, value in memory.state_dict().items()}

    def projected(name: str) -> Tensor:
        z = x_TE @ p[f"{name}.linear.weight"].T
        return z / (1 + (-z).exp())

    q, k = (z / z.norm(dim=1, keepdim=True) for z in (projected("query"), projected("key")))
    v, gates = (
        projected("value"),
        torch.sigmoid(x_TE @ p["dense.gates.linear.weight"].T + p["dense.gates.linear.bias"]),
    )
    W = [p["dense.start.0"], p["dense.start.1"]]
    S = [torch.zeros_like(w) for w in W]

    def answer(weights: list[Tensor], a: Tensor) -> Tensor:
        z = weights[0] @ a
        z = weights[1] @ (z / (1 + (-z).exp()))
        return a + z / (z.square().mean() + 1e-6).sqrt()

    out = []
    for start in range(0, len(x_TE), 64):
        chunk = range(start, min(start + 64, len(x_TE)))
        out += [answer(W, q[t]) for t in chunk]
        total = [torch.zeros_like(w) for w in W]
        for t in chunk:
            leaves = [w.clone().requires_grad_() for w in W]
            with torch.enable_grad():
                loss = (answer(leaves, k[t]) - v[t]).square().sum()
            for whole, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
                whole += gates[t, 1] * gradient
        eta, _, alpha = gates[chunk.start : chunk.stop].mean(0)
        S = [eta * s - whole for s, whole in zip(S, total, strict=True)]
        W = [(1 - alpha) * w + s for w, s in zip(W, S, strict=True)]
    return torch.stack(out), W


def _sparse_error() -> float:
    """Unequal numbers of tokens of four users, each read and written once, row by row."""
    users, width, dim, active = 4, 512, 60, 9
    tokens_U = torch.tensor([1, 0, 3, 5])
    rows = int(tokens_U.sum())
    slab = 0.3 * torch.randn(users, width, dim)
    columns, values = ops.sparse_code(torch.randn(rows, width), active)
    target, weight = torch.nn.functional.normalize(torch.randn(rows, dim), dim=1), torch.rand(rows)
    alpha_U, slots_U = torch.tensor([0.1, 0.0, 0.3, 0.5]), torch.tensor([2, 0, 3, 1])
    slots_N = slots_U.repeat_interleave(tokens_U)
    wanted, row = slab.double(), 0
    read_wanted = []
    for slot, count, alpha in zip(slots_U.tolist(), tokens_U.tolist(), alpha_U.tolist(), strict=True):
        before = wanted[slot].clone()
        for _ in range(count):
            code = torch.zeros(width, dtype=torch.float64).scatter(0, columns[row], values[row].double())
            read_wanted.append(code @ before)
            error = target[row].double() - code @ wanted[slot]
            wanted[slot] += float(weight[row]) * code[:, None] * error
            row += 1
        touched = columns[row - count : row].unique()
        wanted[slot, touched] -= alpha * before[touched]
    read = ops.sparse_read(slab, slots_N, columns, values)
    ops.sparse_apply(
        slab, *ops.sparse_update(slab, slots_U, tokens_U, columns, values, target, weight, alpha_U)
    )
    return max(_error(slab, wanted), _error(read, torch.stack(read_wanted)))
