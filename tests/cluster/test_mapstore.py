"""The shard map's record: made once, planned anew at a cold start, epochs that only rise."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.mapstore import MAP_RECORD, TRIES_MAX, read_map, record_epoch, settle
from cluster.shardmap import first_map, moved
from storage.errors import Fenced, StoreError, VersionConflict
from storage.store import MemoryStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return open_store(f"file://{tmp_path}")


def test_a_cold_start_makes_the_map_and_the_next_one_keeps_it(store: MemoryStore) -> None:
    assert read_map(store) is None
    made = settle(store, 2)
    assert made == first_map(2)
    assert settle(store, 2) == made
    assert read_map(store) == made


def test_a_cold_start_with_more_shards_moves_buckets_and_keeps_epochs(store: MemoryStore) -> None:
    settle(store, 2)
    before = record_epoch(store, 0, 7)
    after = settle(store, 3)
    assert after.version == before.version + 1
    assert after.epochs == (7, 0, 0)
    assert 0 < moved(before, after) <= 1.1 * 4096 / 3


def test_epochs_only_rise(store: MemoryStore) -> None:
    settle(store, 2)
    assert record_epoch(store, 1, 5).epochs == (0, 5)
    assert record_epoch(store, 1, 5).version == 2, "the same again changes nothing"
    with pytest.raises(Fenced, match="epoch 4 is over"):
        record_epoch(store, 1, 4)
    with pytest.raises(Fenced):
        record_epoch(store, 2, 9)


def test_a_race_is_run_again_on_what_the_other_wrote(store: MemoryStore) -> None:
    settle(store, 2)

    class Racing:
        races = 3

        def read_record(self, name: str):
            found = store.read_record(name)
            if self.races:
                self.races -= 1
                record_epoch(store, 0, 10 - self.races)
            return found

        def write_record(self, *args, **kwargs):
            return store.write_record(*args, **kwargs)

        def next_epoch(self) -> int:
            return store.next_epoch()

    assert record_epoch(Racing(), 1, 20).epochs == (10, 20)


def test_a_store_that_never_lets_us_win_is_reported(store: MemoryStore) -> None:
    settle(store, 1)

    class Hopeless:
        tries = 0

        def read_record(self, name: str):
            return store.read_record(name)

        def write_record(self, *args, **kwargs):
            self.tries += 1
            raise VersionConflict("no")

        def next_epoch(self) -> int:
            return 1

    hopeless = Hopeless()
    with pytest.raises(VersionConflict, match="races in a row"):
        record_epoch(hopeless, 0, 3)
    assert hopeless.tries == TRIES_MAX


def test_a_foreign_record_is_refused(store: MemoryStore) -> None:
    store.write_record(MAP_RECORD, {"format": 9}, if_absent=True)
    with pytest.raises(StoreError, match="cluster/shardmap: shard map: format 1 expected"):
        read_map(store)
