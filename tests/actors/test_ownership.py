"""Claims, the check before an acknowledgement, and how reads are shared."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from actors.ownership import (
    OWNERS_PREFIX,
    Gate,
    Grace,
    Owner,
    announce,
    claim,
    confirm,
    read_owner,
    retire,
)
from storage.errors import Fenced, StoreError, StoreUnavailable
from storage.store import MemoryStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return open_store(f"file://{tmp_path}")


def take(store: MemoryStore, *, cluster: str = "a", take_over: bool = True) -> Owner:
    return claim(store, "shard-0", cluster=cluster, incarnation="i", take_over=take_over)


def test_each_claim_has_a_newer_epoch_and_fences_the_one_before(store: MemoryStore) -> None:
    assert read_owner(store, "shard-0") is None
    first = take(store)
    confirm(store, "shard-0", first.epoch)
    second = take(store)
    assert second.epoch > first.epoch
    confirm(store, "shard-0", second.epoch)
    with pytest.raises(Fenced, match=f"epoch {first.epoch} is over: the store has seen {second.epoch}"):
        confirm(store, "shard-0", first.epoch)


def test_a_lost_record_fences(store: MemoryStore) -> None:
    with pytest.raises(Fenced, match="the record is gone"):
        confirm(store, "shard-0", 1)


def test_epochs_rise_over_the_record_even_if_the_counter_was_lost(store: MemoryStore) -> None:
    old = Owner(shard="shard-0", epoch=5, incarnation="i", cluster="a")
    store.write_record(OWNERS_PREFIX + "shard-0", old.to_record(), if_absent=True)
    assert take(store).epoch == 6


def test_a_restart_leaves_another_clusters_shard_alone(store: MemoryStore) -> None:
    mine = take(store, cluster="a")
    take(store, cluster="b")
    with pytest.raises(Fenced, match="belongs to another cluster"):
        take(store, cluster="a", take_over=False)
    with pytest.raises(Fenced):
        announce(store, mine, actor="x", node="y")
    assert take(store, cluster="b", take_over=False).epoch > mine.epoch


def test_two_claims_at_once_have_one_winner(store: MemoryStore) -> None:
    class Racing:
        """Another claims between this one's read and its write."""

        def read_record(self, name: str):
            return store.read_record(name)

        def write_record(
            self, name: str, record: dict, *, if_tag: str | None = None, if_absent: bool = False
        ):
            return store.write_record(name, record, if_tag=if_tag, if_absent=if_absent)

        def next_epoch(self) -> int:
            epoch = store.next_epoch()
            take(store, cluster="b")
            return epoch

    with pytest.raises(Fenced, match="at the same time"):
        claim(Racing(), "shard-0", cluster="a", incarnation="i", take_over=True)
    owner = read_owner(store, "shard-0")
    assert owner is not None
    assert owner.cluster == "b"


def test_announce_says_where_it_runs_and_keeps_the_epoch(store: MemoryStore) -> None:
    owner = take(store)
    announce(store, owner, actor="actor", node="node")
    found = read_owner(store, "shard-0")
    assert found is not None
    assert (found.epoch, found.actor, found.node) == (owner.epoch, "actor", "node")


@pytest.mark.parametrize("record", [{}, {"shard": "shard-0", "epoch": "1", "incarnation": "", "cluster": ""}])
def test_a_foreign_record_is_refused(store: MemoryStore, record: dict) -> None:
    store.write_record(OWNERS_PREFIX + "shard-0", record, if_absent=True)
    with pytest.raises(StoreError, match="cluster/owners/shard-0: not an ownership record"):
        read_owner(store, "shard-0")


async def test_waiting_confirmations_share_a_read_that_begins_after_they_ask() -> None:
    begun, go = threading.Event(), threading.Event()

    def read() -> None:
        begun.set()
        assert go.wait(5)

    gate = Gate(read, Grace())
    first = asyncio.create_task(gate.confirm())
    assert await asyncio.to_thread(begun.wait, 5)
    later = [asyncio.create_task(gate.confirm()) for _ in range(50)]
    await asyncio.sleep(0.02)
    assert gate.reads == 1
    go.set()
    await asyncio.gather(first, *later)
    assert gate.reads == 2


async def test_a_read_that_was_running_does_not_count_for_a_later_question() -> None:
    """The epoch ends while a read is under way that still found it: who asks after that must hear of it."""
    over = threading.Event()
    begun, go = threading.Event(), threading.Event()

    def read() -> None:
        found = over.is_set()
        begun.set()
        assert go.wait(5)
        if found:
            raise Fenced("over")

    gate = Gate(read, Grace())
    before = asyncio.create_task(gate.confirm())
    assert await asyncio.to_thread(begun.wait, 5)
    over.set()
    after = asyncio.create_task(gate.confirm())
    await asyncio.sleep(0.01)
    go.set()
    await before
    with pytest.raises(Fenced):
        await after


async def test_one_that_gives_up_does_not_take_the_read_from_the_others() -> None:
    go = threading.Event()

    def read() -> None:
        assert go.wait(5)

    gate = Gate(read, Grace())
    impatient, patient = asyncio.create_task(gate.confirm()), asyncio.create_task(gate.confirm())
    await asyncio.sleep(0.01)
    impatient.cancel()
    go.set()
    await patient
    with pytest.raises(asyncio.CancelledError):
        await impatient


def away() -> None:
    raise StoreUnavailable("away")


async def test_without_a_grace_nobody_is_let_through_who_may_be_fenced() -> None:
    gate = Gate(away, Grace(seconds=0.0))
    with pytest.raises(StoreUnavailable, match="away"):
        await gate.confirm()
    assert gate.unconfirmed == 0
    await gate.look()
    assert gate.reads == 2, "what promises nothing goes on, and has asked"


async def test_a_store_that_is_away_is_counted_and_does_not_stop_the_answer() -> None:
    gate = Gate(away, Grace())
    await gate.confirm()
    await gate.confirm()
    assert gate.unconfirmed == 2


async def test_a_journal_that_another_may_have_opened_ends_the_grace() -> None:
    held = [True]
    gate = Gate(away, Grace(held=lambda: held[0]))
    await gate.confirm()
    held[0] = False
    with pytest.raises(StoreUnavailable):
        await gate.confirm()
    assert gate.unconfirmed == 1


async def test_a_grace_ends_some_time_after_the_last_read_that_found_our_epoch_began() -> None:
    now, fails = [0.0], [False]

    def read() -> None:
        now[0] += 5.0  # it takes long: what it found may be as old as its beginning
        if fails[0]:
            away()

    gate = Gate(read, Grace(seconds=60.0), clock=lambda: now[0])
    now[0] = 100.0
    await gate.confirm()
    fails[0] = True
    now[0] = 154.9
    await gate.confirm()
    assert gate.unconfirmed == 1
    with pytest.raises(StoreUnavailable):
        await gate.confirm()
    await gate.look()
    fails[0] = False
    await gate.confirm()
    fails[0] = True
    await gate.confirm()
    assert gate.unconfirmed == 2, "a new outage, a new grace"


async def test_an_answer_that_has_written_nothing_needs_no_grace_and_hears_of_a_new_owner() -> None:
    await Gate(away, Grace(seconds=0.0)).look()

    def over() -> None:
        raise Fenced("over")

    with pytest.raises(Fenced):
        await Gate(over, Grace()).look()


async def test_who_rests_asks_too_where_a_grace_has_an_end() -> None:
    reads = 0

    def read() -> None:
        nonlocal reads
        reads += 1
        if reads == 2:
            away()
        if reads == 3:
            raise Fenced("over")

    async with asyncio.timeout(10):
        with pytest.raises(Fenced):
            await Gate(read, Grace()).watch(0.02)
    assert reads == 3


def test_shards_that_the_map_has_no_more_are_fenced_once(store: MemoryStore) -> None:
    """A map of four was settled anew for two; the record of one of the four was never written."""
    taken = {
        name: claim(store, name, cluster="old", incarnation="i", take_over=True)
        for name in ("shard-0", "shard-1", "shard-3")
    }
    assert retire(store, ["shard-0", "shard-1"], cluster="new") == ["shard-3"]
    assert retire(store, ["shard-0", "shard-1"], cluster="newer") == []
    for name in ("shard-0", "shard-1"):
        confirm(store, name, taken[name].epoch)
    with pytest.raises(Fenced):
        confirm(store, "shard-3", taken["shard-3"].epoch)
    with pytest.raises(Fenced, match="another cluster"):
        claim(store, "shard-3", cluster="old", incarnation="i", take_over=False)
    again = claim(store, "shard-3", cluster="newest", incarnation="i", take_over=True)
    confirm(store, "shard-3", again.epoch)
    assert retire(store, ["shard-0", "shard-1", "shard-3"], cluster="newest") == []
