"""Signs are fixed for ever, runs of tokens have numbers of their own, and a question stays while a value is recited."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titanmem.binding import PREFIX, held, later, mixed, prefixes, signs


def test_signs_are_what_they_were():
    # Files on disk hold codes of bound keys: these numbers may never change.
    assert mixed(torch.tensor([0, 1, -1])).tolist() == [0, 6238072747940578789, -5417735806833148549]
    assert signs(torch.tensor([7]), 12)[0].tolist() == [-1, -1, -1, 1, -1, 1, -1, -1, -1, 1, -1, -1]
    assert signs(torch.tensor([0]), 5)[0].tolist() == [1.0] * 5


def test_signs_of_different_numbers_are_nearly_orthogonal():
    rows = signs(torch.arange(1, 400), 256) / 16
    cosine = rows @ rows.T - torch.eye(len(rows))
    assert cosine.abs().max() < 0.4
    assert cosine.square().mean().sqrt() < 0.07


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 29))
def test_a_run_has_the_same_number_wherever_a_step_begins(tokens, cut):
    """Token by token or all at once; 0 is a token outside a value."""
    said = torch.tensor([tokens])
    whole = prefixes(said)
    cut = min(cut, len(tokens))
    before = torch.cat([torch.zeros(1, PREFIX - 1, dtype=torch.int64), said[:, :cut]], 1)[:, -(PREFIX - 1) :]
    assert torch.equal(prefixes(said[:, cut:], before), whole[:, cut:])
    assert torch.equal(whole == 0, said == 0)
    runs = {}
    for place, number in enumerate(whole[0].tolist()):
        run = []
        while len(run) < PREFIX and place - len(run) >= 0 and tokens[place - len(run)]:
            run.append(tokens[place - len(run)])
        assert runs.setdefault(tuple(run), number) == number
    assert len(set(runs.values())) == len(runs), "different runs, different numbers"


def test_what_is_held_is_that_of_the_last_place_outside():
    x = torch.arange(1.0, 7)[None, :, None]
    inside = torch.tensor([[True, False, True, True, False, True]])
    got = held(x, inside, torch.tensor([[9.0]]))
    assert got[0, :, 0].tolist() == [9, 2, 2, 2, 5, 5]


def test_later_moves_rows_back():
    assert later(torch.tensor([[3, 4, 5]])).tolist() == [[0, 3, 4]]
