"""Copies and rivals of segments become one line."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storage.chain import Seal, follow
from storage.segment import Segment
from tests.storage.samples import make_segment


def segment(chunk: int, epoch: int) -> Segment:
    return replace(make_segment(chunk, update_id=f"{chunk}-{epoch}"), epoch=epoch)


def names(chain: list[Segment]) -> list[str]:
    return [segment.update_id for segment in chain]


def test_copies_count_once_and_in_order() -> None:
    line = [segment(chunk, 1) for chunk in (3, 1, 2, 2, 1)]
    assert names(follow(line)) == ["1-1", "2-1", "3-1"]
    assert names(follow(line, after_chunk_id=2, epoch=1)) == ["3-1"]


def test_where_two_epochs_disagree_the_newer_one_counts() -> None:
    old, new = [segment(chunk, 1) for chunk in (1, 2, 3, 4)], [segment(3, 2)]
    assert names(follow([*old, *new])) == ["1-1", "2-1", "3-2"], "chunk 4 followed the old chunk 3"


def test_a_version_voids_what_older_epochs_have_after_it() -> None:
    line = [segment(6, 1), segment(7, 2)]
    assert names(follow(line, after_chunk_id=5, epoch=2)) == ["7-2"]
    assert names(follow(line, after_chunk_id=5, epoch=3)) == []


def test_segments_from_before_there_were_epochs_continue_any_version() -> None:
    assert names(follow([segment(6, 0)], after_chunk_id=5, epoch=9)) == ["6-0"]


def test_a_seal_voids_what_arrives_later() -> None:
    seals = [Seal(first_chunk_id=2, epoch=5)]
    assert names(follow([segment(1, 1), segment(2, 1), segment(3, 0)], seals=seals)) == ["1-1"]
    assert names(follow([segment(1, 1), segment(2, 5)], seals=seals)) == ["1-1", "2-5"]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), max_size=20),
    st.tuples(st.integers(0, 9), st.integers(1, 4)),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), max_size=3),
)
def test_any_heap_gives_a_rising_line(
    found: list[tuple[int, int]], version: tuple[int, int], sealed: list[tuple[int, int]]
) -> None:
    seals = [Seal(first_chunk_id=chunk, epoch=epoch) for chunk, epoch in sealed]
    heap = [segment(chunk, epoch) for chunk, epoch in found]
    chain = follow(heap, after_chunk_id=version[0], epoch=version[1], seals=seals)
    chunks, epochs = [s.first_chunk_id for s in chain], [s.epoch for s in chain]
    assert chunks == sorted(set(chunks))
    assert epochs == sorted(epochs)
    assert all(
        chunk > version[0] and epoch >= version[1] for chunk, epoch in zip(chunks, epochs, strict=True)
    )
    assert not any(
        s.epoch < seal.epoch and s.first_chunk_id >= seal.first_chunk_id for s in chain for seal in seals
    )
    backwards = follow(heap[::-1], after_chunk_id=version[0], epoch=version[1], seals=seals)
    assert names(chain) == names(backwards), "the order in which they are found does not matter"
