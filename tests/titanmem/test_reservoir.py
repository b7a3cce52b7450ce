"""The reservoir stays in its bound, is a fair and repeatable sample, and never keeps what a correction replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanmem.consolidation import consolidate
from titanmem.reservoir import CORRECTED_OVERLAP, NAMED_OVERLAP, REPLACED_OVERLAP, Reservoir
from titanmem.spec import MemorySpec

WIDTH, ACTIVE = 512, 8
SPEC = MemorySpec(
    d_nltm=32, key_dim=16, value_dim=16, code_width=WIDTH, code_active=ACTIVE, chunk_size=16, window=16, reservoir=12
)  # fmt: skip
VOCABULARY = 400

Entries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def entries(count: int, seed: int, width: int = WIDTH) -> Entries:
    """Columns, code values, tokens and gates of `count` random codes over the first `width` units."""
    random = np.random.default_rng(seed)
    columns = np.sort(np.argsort(random.random((count, width)), axis=1)[:, :ACTIVE], axis=1)
    values = random.random((count, ACTIVE)) + 0.1
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return columns, values.astype(np.float32), random.integers(0, VOCABULARY, count), random.random(count)


def part(rows: Entries, start: int, stop: int | None = None) -> Entries:
    return tuple(row[start:stop] for row in rows)  # type: ignore[return-value]


def dense(reservoir: Reservoir) -> np.ndarray:
    """float32 [R, H]."""
    codes = np.zeros((len(reservoir), WIDTH), np.float32)
    np.put_along_axis(codes, reservoir.columns_RK, reservoir.values_RK.astype(np.float32), axis=1)
    return codes


def same(one: Reservoir, other: Reservoir) -> bool:
    return all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in Reservoir.__slots__
    )


# Codes over few units collide all the time, codes over many hardly ever.
@given(
    counts=st.lists(st.integers(0, 30), max_size=5),
    width=st.sampled_from([9, 16, WIDTH]),
    bound=st.sampled_from([0, 1, 12, 64]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_whatever_is_offered_it_stays_in_its_bound_and_holds_each_code_once(counts, width, bound, seed):
    spec = SPEC.overridden({"reservoir": bound})
    reservoir, again = Reservoir.empty(spec), Reservoir.empty(spec)
    for number, count in enumerate(counts):
        reservoir = reservoir.offered(*entries(count, seed + number, width), spec)
        again = again.offered(*entries(count, seed + number, width), spec)
        assert len(reservoir) <= bound
    assert same(reservoir, again), "no hidden state"
    overlap = np.tril(dense(reservoir) @ dense(reservoir).T, -1)
    assert not bool((overlap >= REPLACED_OVERLAP + 1e-3).any()), (
        "of two that are nearly the same, one is left"
    )
    assert reservoir.columns_RK.dtype == reservoir.token_R.dtype == np.int32
    assert reservoir.values_RK.dtype == reservoir.gate_R.dtype == np.float16


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_in_which_pieces_entries_come_does_not_matter(seed, cut):
    rows = entries(100, seed)
    at_once = Reservoir.empty(SPEC).offered(*rows, SPEC)
    in_two = Reservoir.empty(SPEC).offered(*part(rows, 0, cut), SPEC).offered(*part(rows, cut), SPEC)
    assert same(at_once, in_two)
    assert len(at_once) == 12


def test_the_sample_is_uniform_over_what_was_offered_and_in_its_order():
    spec = SPEC.overridden({"reservoir": 400})
    count = 4000
    columns, values, _, gates = entries(count, 5)
    numbers = np.arange(count)  # a token that says when it came
    reservoir = Reservoir.empty(spec)
    for start in range(0, count, 250):
        chunk = (columns, values, numbers, gates)
        reservoir = reservoir.offered(*part(chunk, start, start + 250), spec)
    assert len(reservoir) == 400
    assert bool((np.diff(reservoir.token_R) > 0).all()), "in order of arrival"
    in_each_tenth = np.histogram(reservoir.token_R, 10, (0, count))[0]
    # Each is about 40 with a standard deviation of 5.7; newest or oldest first would make it 400 and 0.
    assert in_each_tenth.min() >= 40 - 4 * 5.7
    assert in_each_tenth.max() <= 40 + 4 * 5.7


def near(values: np.ndarray, overlap: float) -> np.ndarray:
    """A code on the same units with about that overlap."""
    other = np.roll(values, 1) - (np.roll(values, 1) @ values) * values
    mixed = np.abs(overlap * values + np.sqrt(1 - overlap**2) * other / np.linalg.norm(other))
    return (mixed / np.linalg.norm(mixed)).astype(np.float32)


def correction(overlap: float) -> tuple[Entries, Entries]:
    """Old and new entry of one fact: 11, then 22, at codes of about that overlap."""
    columns, values, _, _ = entries(1, 3)
    old = (columns, values, np.array([11]), np.ones(1))
    return old, (columns, near(values[0], overlap)[None], np.array([22]), np.ones(1))


@pytest.mark.parametrize("overlap", [0.85, 0.95, 1.0])
@pytest.mark.parametrize("full", [False, True], ids=["with room", "full"])
def test_the_newer_wins(overlap, full):
    old, new = correction(overlap)
    reservoir = Reservoir.empty(SPEC).offered(*old, SPEC)
    if full:  # 11 others of a high hash, so that the old one is still there
        others = Reservoir.of(*entries(400, 8))
        best = np.argsort(others.priority_R)[-11:]
        c, v, t, g = (
            row[best] for row in (others.columns_RK, others.values_RK, others.token_R, others.gate_R)
        )
        reservoir = reservoir.offered(c, v, t, g, SPEC)
        assert len(reservoir) == 12
        assert 11 in reservoir.token_R
    reservoir = reservoir.offered(*new, SPEC)
    assert 11 not in reservoir.token_R
    assert full or reservoir.token_R.tolist() == [22]


def test_another_fact_is_no_correction():
    old, new = correction(0.5)
    reservoir = Reservoir.empty(SPEC).offered(*old, SPEC).offered(*new, SPEC)
    assert reservoir.token_R.tolist() == [11, 22]


def test_where_a_value_begins_less_is_enough():
    """The first token of a value says what the fact is about; those behind it have the word before them in common."""
    old, new = correction(0.7)
    for begins, left in ((True, [22]), (False, [11, 22])):
        reservoir = Reservoir.empty(SPEC).offered(*old, SPEC)
        reservoir = reservoir.offered(*new, SPEC, np.array([begins]))
        assert reservoir.token_R.tolist() == left
    codes = dense(Reservoir.of(*(np.concatenate(pair) for pair in zip(old, entries(200, 4), strict=True))))
    overlap = codes[1:] @ codes[0]
    alike = int(np.where(overlap < CORRECTED_OVERLAP, overlap, 0).argmax())
    assert overlap[alike] > 0.2
    other = part(entries(200, 4), alike, alike + 1)
    reservoir = Reservoir.empty(SPEC).offered(*old, SPEC).offered(*other, SPEC, np.array([True]))
    assert len(reservoir) == 2, "what only resembles it stays"


def test_what_the_text_around_a_new_value_names_gets_that_value():
    columns, values, _, _ = entries(201, 4)
    overlap = (codes := dense(Reservoir.of(*entries(201, 4))))[1:] @ codes[0]
    alike, far = int(np.where(overlap < CORRECTED_OVERLAP, overlap, 0).argmax()), int(overlap.argmin())
    assert overlap[far] < NAMED_OVERLAP < overlap[alike] < CORRECTED_OVERLAP
    rows = {name: (columns[place : place + 1], values[place : place + 1], np.array([token]), np.ones(1))
            for name, place, token in (("old", 0, 11), ("new", alike + 1, 22), ("far", far + 1, 33))}  # fmt: skip
    begins = np.array([True])
    told = Reservoir.empty(SPEC).offered(*rows["old"], SPEC)
    for name, first, named, left in (
        ("new", begins, [9, 11], [22, 22]),
        ("new", begins, [9], [11, 22]),
        ("new", ~begins, [11], [11, 22]),
        ("far", begins, [11], [11, 33]),
    ):
        reservoir = told.offered(*rows[name], SPEC, first, [np.array(named)])
        assert reservoir.token_R.tolist() == left
        parts = reservoir.columns_RK, reservoir.values_RK, reservoir.token_R, reservoir.gate_R
        assert same(reservoir, Reservoir.of(*parts)), "its place in the sample is that of what it says now"
    c, v, t, g = (np.concatenate(pair) for pair in zip(rows["old"], rows["new"], strict=True))
    reservoir = Reservoir.empty(SPEC).offered(c, v, t, g, SPEC, np.array([True, True]), [np.array([11])] * 2)
    assert reservoir.token_R.tolist() == [11, 22], "what is told beside it is no older value"


def test_consolidation_does_not_bring_back_what_was_corrected():
    """At the words in which the old value was told, the correction has the last word, however often it is replayed."""
    torch.manual_seed(0)
    values_VD = torch.nn.functional.normalize(torch.randn(VOCABULARY, SPEC.value_dim), dim=1)
    old, new = correction(0.9)
    kept = Reservoir.empty(SPEC).offered(*old, SPEC).offered(*new, SPEC)
    c, v, t, g = (np.concatenate(pair) for pair in zip(old, new, strict=True))
    both = Reservoir.of(c, v, t, g)

    def said_at_the_old_words(reservoir: Reservoir) -> int:
        slab = torch.zeros(1, WIDTH, SPEC.value_dim, dtype=torch.float16)
        consolidate(slab, 0, both, values_VD, SPEC, 1)  # one pass over both is how they were written
        consolidate(slab, 0, reservoir, values_VD, SPEC, 16)
        read_D = torch.from_numpy(dense(both)[0]) @ slab[0].float()
        return int((values_VD @ read_D).argmax())

    assert said_at_the_old_words(kept) == 22
    assert said_at_the_old_words(both) == 11, (
        "with both kept it would come back: that is what the bound is for"
    )


def test_a_file_gives_the_same_reservoir_and_a_smaller_bound_cuts_it():
    whole = Reservoir.empty(SPEC).offered(*entries(50, 1), SPEC)
    rows = (whole.columns_RK, whole.values_RK, whole.token_R, whole.gate_R)
    assert same(Reservoir.loaded(*rows, SPEC, VOCABULARY), whole)
    smaller = SPEC.overridden({"reservoir": 5})
    cut = Reservoir.loaded(*rows, smaller, VOCABULARY)
    assert same(cut, Reservoir.empty(smaller).offered(*entries(50, 1), smaller))
    other_codes = SPEC.overridden({"code_active": 4})
    assert len(Reservoir.loaded(*rows, other_codes, VOCABULARY)) == 0


@pytest.mark.parametrize(
    ("row", "value", "said"),
    [(0, WIDTH, "in a code of 512"), (0, -1, "in a code of 512"), (1, 2.0, "unit norm"), (1, -0.1, "unit norm"),
     (2, VOCABULARY, "vocabulary"), (2, -1, "vocabulary"), (3, 1.5, "gates"), (3, -0.5, "gates")],
)  # fmt: skip
def test_entries_that_no_fold_has_written_are_refused(row, value, said):
    whole = Reservoir.of(*entries(3, 1))
    rows = [whole.columns_RK, whole.values_RK, whole.token_R, whole.gate_R]
    rows[row] = rows[row].copy()
    rows[row][(1, -1) if rows[row].ndim == 2 else 1] = value
    columns, values, tokens, gates = rows
    with pytest.raises(ValueError, match=said):
        Reservoir.loaded(columns, values, tokens, gates, SPEC, VOCABULARY)


def test_units_that_do_not_rise_are_refused():
    whole = Reservoir.of(*entries(3, 1))
    columns = whole.columns_RK[:, ::-1]
    with pytest.raises(ValueError, match="rise"):
        Reservoir.loaded(columns, whole.values_RK, whole.token_R, whole.gate_R, SPEC, VOCABULARY)


def test_what_a_user_costs_is_said_by_the_spec():
    whole = Reservoir.empty(SPEC).offered(*entries(50, 1), SPEC)
    stored = whole.columns_RK.nbytes + whole.values_RK.nbytes + whole.token_R.nbytes + whole.gate_R.nbytes
    assert SPEC.state_bytes == 2 * SPEC.parameters + stored
    assert MemorySpec().state_bytes == 2_097_152 + 4096 * 198
    assert SPEC.overridden({"reservoir": 0}).state_bytes == 2 * SPEC.parameters
