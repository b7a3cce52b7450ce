"""Attention says the same whichever way it takes, with a gradient or without."""

from __future__ import annotations

import pytest
import torch

from titanmem.attention import attended

SAME = 1e-5
"""Float32 over at most 24 keys, summed in two orders."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 24])
def test_both_ways_are_softmax_over_the_keys_that_are_seen(queries, masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=generator) for n in (queries, 24, 24))
    mask = torch.rand(queries, 24, generator=generator) < 0.5 if masked else None
    score = (query.double() @ key.double().transpose(-1, -2)) / 4
    if mask is not None:
        mask[:, 0] = True
        score[:, :, ~mask] = float("-inf")
    expected = score.softmax(-1) @ value.double()
    assert (attended(query, key, value, mask) - expected).abs().max() < SAME
    assert (attended(query.requires_grad_(), key, value, mask) - expected).abs().max() < SAME
