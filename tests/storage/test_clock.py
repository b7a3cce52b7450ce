"""Clocks that are an hour off, either way, and jump: what is erased stays so, and what is told afterwards is kept."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from storage.clock import TICK, SteadyClock
from storage.memory import Memory
from storage.segment import Segment
from storage.store import MemoryStore
from tests.storage.samples import ALICE, make_memory

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def memory(store: MemoryStore) -> Memory:
    """One that is made now, as the store's clock has it."""
    return replace(make_memory(version=1), created_at=store.now())


def segment(epoch: int) -> Segment:
    ids = np.arange(4, dtype=np.int32)
    return Segment(
        key=ALICE, update_id="u", conversation="c", role="user", context=ids, tokens=ids, first_chunk_id=1,
        last_chunk_id=1, epoch=epoch,
    )  # fmt: skip


def test_a_clock_that_is_set_back_stands_almost_still() -> None:
    times = [NOON, NOON, NOON - HOUR, NOON + HOUR, NOON - HOUR]
    steady = SteadyClock(lambda: times.pop(0))
    assert [steady() for _ in range(5)] == [
        NOON,
        NOON + TICK,
        NOON + 2 * TICK,
        NOON + HOUR,
        NOON + HOUR + TICK,
    ]


@pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["set back", "set forward"])
@pytest.mark.parametrize("restart", [False, True], ids=["same process", "after a restart"])
def test_what_is_told_after_an_erasure_is_kept_whatever_the_clock_does(
    folder_store: MemoryStore, jump: timedelta, restart: bool
) -> None:
    now, epoch = [NOON], 3
    store = MemoryStore(folder_store.objects, clock=lambda: now[0])
    store.put(memory(store), epoch=epoch)
    old = store.segments.put(ALICE, [segment(epoch)], (), epoch=epoch)
    late = store.objects.get(f"journal/local/alice/{old.file}") or (b"", "")
    store.delete(ALICE, epoch=epoch)
    now[0] += jump
    if restart:
        epoch += 1
        store = MemoryStore(folder_store.objects, clock=lambda: now[0])
    piece = store.segments.put(ALICE, [segment(epoch)], (), epoch=epoch)
    assert store.segments.read(ALICE, piece) is not None, (
        "acknowledged under sync: nobody may take it for an old one"
    )
    store.clear_tombstone(ALICE, epoch)
    assert store.segments.read(ALICE, piece) is not None
    store.put(memory(store), epoch=epoch)
    store.objects.delete("users/local/alice/HEAD")
    assert [info.version for info in store.rebuild_head(ALICE, epoch=epoch)] == [1]
    store.segments.delete(ALICE, piece)
    store.objects.put(f"journal/local/alice/{old.file}", late[0])
    assert store.segments.read(ALICE, old) is None, (
        "what was on its way when the user was erased stays erased"
    )


@pytest.mark.parametrize("off", [-HOUR, HOUR], ids=["behind", "ahead"])
def test_an_older_owner_brings_nothing_back_whatever_its_clock_says(
    folder_store: MemoryStore, off: timedelta
) -> None:
    old = MemoryStore(folder_store.objects, clock=lambda: NOON + off)
    new = MemoryStore(folder_store.objects, clock=lambda: NOON)
    old.put(memory(old), epoch=2)
    file = old.objects.get(f"users/local/alice/{old.versions(ALICE)[0].file}")
    name = f"users/local/alice/{old.versions(ALICE)[0].file}"
    new.delete(ALICE, epoch=3)
    piece = old.segments.put(ALICE, [segment(2)], (), epoch=2)
    assert new.segments.read(ALICE, piece) is None
    assert file is not None
    new.objects.put(name, file[0])
    assert new.rebuild_head(ALICE, epoch=3) == []
