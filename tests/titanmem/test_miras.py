"""MIRAS: every closed-form gradient against autograd, and every refused pair shown to be unstable."""

from __future__ import annotations

import pytest
import torch

from kernels.miras import BIASES, RETENTIONS
from titanmem import MemorySpec, NeuralMemory
from titanmem.spec import UNSTABLE

EXACT = 1e-12
"""Both sides are float64."""
PARAMETERS = {"l2": [0.0], "huber": [0.1, 1.0, 10.0], "lp": [1.5, 2.0, 3.0, 4.0], "dot": [0.0]}


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, ps in PARAMETERS.items() for p in ps])
def test_a_bias_gradient_is_that_of_its_loss(name, parameter):
    generator = torch.Generator().manual_seed(1)
    y, v = (torch.randn(5, 3, 17, generator=generator, dtype=torch.float64) for _ in range(2))
    y.requires_grad_()
    bias = BIASES[name]
    (wanted,) = torch.autograd.grad(bias.loss(y, v, parameter).sum(), y)
    got = bias.gradient(y, v, parameter).detach()
    assert float((got - wanted).abs().max()) < EXACT * float(wanted.abs().max())


@pytest.mark.parametrize("name", list(RETENTIONS))
def test_a_retention_gradient_is_the_chain_rule(name):
    generator = torch.Generator().manual_seed(2)
    accumulator, start, gradient = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 9, 7), (9, 7), (3, 9, 7))
    )
    accumulator.requires_grad_()
    gate = RETENTIONS[name]
    weights = gate.weights(accumulator, start, 4.0)
    (wanted,) = torch.autograd.grad((weights * gradient).sum(), accumulator)
    got = gate.gradient(gradient, accumulator, start, 4.0).detach()
    assert float((got - wanted).abs().max()) < EXACT * max(1.0, float(wanted.abs().max()))


def test_what_each_retention_promises():
    generator = torch.Generator().manual_seed(3)
    accumulator, start = torch.randn(2, 6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    norm = RETENTIONS["norm"].weights(accumulator, start, 0.0)
    assert torch.allclose(norm.norm(dim=2), start.norm(dim=1).expand(2, -1), atol=1e-5)
    kl = RETENTIONS["kl"].weights(accumulator, start, 0.0)
    assert torch.allclose(kl.sum(2), torch.ones(2, 6), atol=1e-6)
    assert bool((kl > 0).all())
    size = accumulator.abs().pow(4).sum((1, 2)).pow(0.25)
    lq = RETENTIONS["lq"].weights(accumulator, start, 4.0)
    assert torch.allclose(lq, accumulator / size[:, None, None] ** 2, atol=1e-6)


@pytest.mark.parametrize(("bias", "retention"), list(UNSTABLE))
def test_an_unstable_pair_is_refused_and_the_reason_is_true(bias, retention, monkeypatch):
    with pytest.raises(
        ValueError, match=f"memory.bias = '{bias}' with retention = '{retention}': refused, the gradient"
    ):
        MemorySpec(rule="titans", bias=bias, retention=retention)

    monkeypatch.setattr("titanmem.spec.UNSTABLE", {})

    def answer_and_weights(bias: str, retention: str) -> tuple[float, float]:
        """Tell the same 64 tokens over and over; the answer's size and the weights' distance from where they began."""
        torch.manual_seed(0)
        spec = MemorySpec(
            width=16, d_nltm=16, depth=1, rule="titans", bias=bias, retention=retention, chunk_size=16,
            conv=1, lr=0.2, forget_bias=32.0, lp_power=4.0, bounded=False,
        )  # fmt: skip
        memory = NeuralMemory(spec)
        x, state = 3 * torch.randn(1, 64, 16), memory.new_state(1)
        with torch.no_grad():
            assert memory.dense is not None
            for _ in range(40):
                if bool(memory.update(state, x).refused.any()):
                    return float("inf"), float("inf")
            weights = memory.dense.effective(state.weights)[0]
            return float(memory.read(state, x).norm()), float(weights.amax())

    wrong, stable = (
        answer_and_weights(bias, retention),
        answer_and_weights("dot" if bias == "dot" else "l2", "norm"),
    )
    if retention == "lq":
        assert wrong[0] < 0.05 * stable[0], "the weights fade"
    elif retention == "kl":
        assert wrong[1] > 0.999, "a row is one element"
    else:
        assert wrong[0] > 20 * stable[0], "the weights grow without end"
