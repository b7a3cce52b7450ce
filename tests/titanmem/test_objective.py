"""The contrast of keys and queries, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from titanmem.objective import Weights, _contrast

WEIGHTS = Weights()


def contrast(cosine_QN: Tensor, known: list[bool]) -> tuple[float, float, float, float, float]:
    """`_contrast` of queries whose own key is that of their number; those not known ask for what nobody told."""
    known_Q = torch.tensor(known)
    same_QN = torch.eye(*cosine_QN.shape, dtype=torch.bool) & known_Q[:, None]
    own_QN = torch.ones_like(same_QN)
    weight_Q = torch.ones(len(known))
    contrast, share, align, found, refused = _contrast(
        cosine_QN, same_QN, known_Q, ~known_Q, own_QN, weight_Q, WEIGHTS
    )
    return float(contrast), float(share), float(align), found, refused


@pytest.mark.parametrize("other", [0.0, 0.3, 0.6])
def test_what_is_missing_of_the_share_is_what_the_others_add(other):
    _, share, align, found, _ = contrast(torch.tensor([[0.9, other, other]]), [True])
    scale = WEIGHTS.share_temperature
    assert share == pytest.approx(-math.log(1 / (1 + 2 * math.exp(scale * (other - 0.9)))), abs=1e-5)
    assert align == pytest.approx(0.1)
    assert found == 1.0


def test_keys_that_the_contrast_takes_for_apart_are_still_drawn_apart_by_the_share():
    cosine_QN = torch.tensor([[0.9, 0.55]], requires_grad=True)
    same_QN = torch.tensor([[True, False]])
    rows = (same_QN.any(1), ~same_QN.any(1), torch.ones_like(same_QN), torch.ones(1))
    apart, share, *_ = _contrast(cosine_QN, same_QN, *rows, WEIGHTS)
    assert float(apart.detach()) < 0.01 < 0.05 < float(share.detach())
    (gradient,) = torch.autograd.grad(share, cosine_QN)
    assert float(gradient[0, 1]) > 0.1, "the other key's cosine is to fall"


def test_a_question_for_what_nobody_told_has_no_share_and_is_refused_below_the_bound():
    near, far = WEIGHTS.nothing + 0.1, WEIGHTS.nothing - 0.1
    _, share, align, found, refused = contrast(torch.tensor([[near, 0.0], [far, 0.0]]), [False, False])
    assert (share, align, found) == (0.0, 0.0, 0.0)
    assert refused == 0.5


def test_a_query_of_more_weight_counts_as_if_there_were_more_of_it():
    cosine_QN = torch.tensor([[0.9, 0.2], [0.6, 0.5]])
    same_QN = torch.tensor([[True, False], [False, True]])
    known_Q, own_QN = torch.tensor([True, True]), torch.ones(2, 2, dtype=torch.bool)
    heavy = _contrast(cosine_QN, same_QN, known_Q, ~known_Q, own_QN, torch.tensor([1.0, 2.0]), WEIGHTS)
    twice = torch.tensor([0, 1, 1])
    rows = (cosine_QN[twice], same_QN[twice], known_Q[twice], ~known_Q[twice], own_QN[twice], torch.ones(3))
    for one, other in zip(heavy[:3], _contrast(*rows, WEIGHTS)[:3], strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6)
