"""Spam is written in part and a memory stays below its bound, and both come out the same when they are replayed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.titanmem.entries import SPEC, slab, told
from titanmem import bounds
from titanmem.bounds import FORGET_SHARE_MAX, crowded_share, forget_share, most_written, norm
from titanmem.consolidation import consolidate
from titanmem.fold import fold
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec


def test_a_fifth_of_a_chunk_is_written_and_the_rest_is_counted():
    memory = slab()
    done = fold(memory, 0, told(np.arange(64), 1), 0.0, SPEC, reservoir=Reservoir.empty(SPEC))
    assert done.chunks == 4
    assert done.tokens_written == 4 * most_written(SPEC) == 4 * 3
    assert done.passed_over == 64 - 12
    assert done.reservoir is not None
    assert len(done.reservoir) <= 12, "what was passed over is not there to be replayed"


def test_the_most_surprising_are_written():
    written = told(np.arange(16), 1)
    loud = torch.tensor([2, 7, 11])
    weight = torch.full((16,), 0.4)
    weight[loud] = 0.9
    memory = slab()
    done = fold(memory, 0, replace(written, weight_N=weight), 0.0, SPEC)
    touched = memory[0].any(-1).nonzero()[:, 0]
    assert done.tokens_written == 3
    assert set(touched.tolist()) == set(written.columns_NK[loud].flatten().tolist())


def test_the_earlier_of_two_that_are_alike_is_written():
    assert bounds.most_surprising(torch.tensor([0.5, 0.9, 0.5, 0.5]), 2).tolist() == [0, 1]


def test_a_short_turn_that_states_a_fact_is_written_whole():
    """3 of 12 tokens are a quarter of the turn, and less than a fifth of the chunk that it is."""
    done = fold(slab(), 0, told(np.array([4, 7, 11]), 1), 0.0, SPEC)
    assert done.tokens_written == 3
    assert done.passed_over == 0
    shipped = MemorySpec(chunk_size=256)
    assert most_written(shipped) == 51


def test_a_chunk_that_is_not_full_of_news_is_written_as_ever(monkeypatch):
    written, bounded, free = told(np.arange(0, 64, 8), 1), slab(), slab()
    fold(bounded, 0, written, 0.0, SPEC)
    monkeypatch.setattr(bounds, "SURPRISE_RATE_MAX", 1.0)
    fold(free, 0, written, 0.0, SPEC)
    assert torch.equal(bounded, free)


@pytest.fixture(scope="module")
def driven():
    """A memory told new things for ever under a bound of 16, with all states on the way; the same without a bound."""
    spec = replace(SPEC, max_norm=16.0)
    states, used, free, momentum, free_momentum = [slab()], [], slab(), 0.0, 0.0
    for seed in range(10):
        written = told(np.arange(90) * 16 // 3, seed)
        memory = states[-1].clone()
        done = fold(memory, 0, written, momentum, spec)
        momentum = done.momentum
        states.append(memory)
        used.append(done.utilisation)
        free_momentum = fold(free, 0, written, free_momentum, replace(SPEC, max_norm=1e6)).momentum
    return spec, states, used, free


def test_a_memory_that_is_driven_to_its_bound_stays_below_it(driven):
    spec, states, used, free = driven
    assert norm(free[0]) > spec.max_norm, "another load, or this shows nothing"
    assert max(norm(state[0]) for state in states) < spec.max_norm
    assert max(used) > bounds.UTILISATION_MAX
    last = told(np.arange(90) * 16 // 3, 9)
    read = (states[-1][0][last.columns_NK[-1]].float() * last.values_NK[-1][:, None]).sum(0)
    assert float(torch.cosine_similarity(read, last.target_ND[-1], dim=0)) > 0.5, (
        "what is new is still learned"
    )


def test_what_is_bounded_is_replayed_to_the_same_bits(driven):
    """From a state in the middle, which is all that a file has, to the end."""
    spec, states, *_ = driven
    momentum = 0.0
    for seed in range(10):
        again = states[seed].clone()
        momentum = fold(again, 0, told(np.arange(90) * 16 // 3, seed), momentum, spec).momentum
        assert torch.equal(again, states[seed + 1])


def test_a_replay_over_a_full_memory_forgets(driven):
    spec, states, *_ = driven
    written = told(np.arange(90) * 16 // 3, 9)
    rows = (written.columns_NK, written.values_NK, written.token_N, written.weight_N)
    reservoir = Reservoir.of(*(row.numpy() for row in rows))
    values = torch.zeros(300, SPEC.value_dim).index_copy(0, written.token_N, written.target_ND)
    norms = []
    for bound in (norm(states[-1][0]), 1e6):
        memory = states[-1].clone()
        consolidate(memory, 0, reservoir, values, replace(spec, max_norm=bound))
        norms.append(norm(memory[0]))
    assert norms[0] < norms[1]


def test_the_share_that_is_forgotten_rises_with_utilisation():
    shares = [forget_share(0.0, SPEC, used) for used in (0.0, 0.8, 0.85, 0.9, 1.0, 7.0)]
    assert shares[0] == shares[1] == forget_share(0.0, SPEC) < 1e-9
    assert shares == sorted(shares)
    assert shares[-2] == shares[-1] == FORGET_SHARE_MAX
    assert crowded_share(0.9) == pytest.approx(FORGET_SHARE_MAX / 2)
    assert forget_share(0.0, MemorySpec(forget_bias=-8.0), 1.0) > 0.99, (
        "the ordinary share, where it is larger"
    )


def test_the_norm_is_the_same_however_many_threads_there_are():
    layer = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0)).half()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, before):
        torch.set_num_threads(threads)
        found.append(norm(layer))
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(float(layer.double().norm()), rel=1e-6)
