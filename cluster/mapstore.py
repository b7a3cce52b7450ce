"""The shard map at rest: the record `cluster/shardmap`, changed by compare-and-set alone. No Ray here."""

from __future__ import annotations

from typing import Any

from actors.ownership import Records
from cluster.shardmap import ShardMap, first_map, plan, shard_name
from storage.errors import Fenced, StoreError, VersionConflict

MAP_RECORD = "cluster/shardmap"
TRIES_MAX = 16
"""Each lost race means that somebody else made progress; more than a few in a row means a broken store."""


def read_map(store: Records) -> ShardMap | None:
    """The newest map, None when the store has none; raises `StoreError` when the record cannot be read."""
    return _read(store)[0]


def settle(store: Records, shards: int) -> ShardMap:
    """The map for a cold start with `shards` shards: read, made or planned anew, and written."""

    def change(current: ShardMap | None) -> ShardMap:
        return first_map(shards) if current is None else plan(current, shards)

    return _change(store, change)


def record_epoch(store: Records, shard: int, epoch: int) -> ShardMap:
    """The map after `shard` was claimed under `epoch`; raises `Fenced` when it has a newer one already."""

    def change(current: ShardMap | None) -> ShardMap:
        if current is None or shard >= current.shards or current.epochs[shard] > epoch:
            raise Fenced(
                f"{shard_name(shard)}: epoch {epoch} is over: the shard map has moved on", epoch=epoch
            )
        return current if current.epochs[shard] == epoch else current.with_epoch(shard, epoch)

    return _change(store, change)


def _change(store: Records, change: Any) -> ShardMap:
    for _ in range(TRIES_MAX):
        current, tag = _read(store)
        after = change(current)
        if after is current:
            return after
        try:
            if tag is None:
                store.write_record(MAP_RECORD, after.to_dict(), if_absent=True)
            else:
                store.write_record(MAP_RECORD, after.to_dict(), if_tag=tag)
            return after
        except VersionConflict:
            continue
    raise VersionConflict(f"{MAP_RECORD}: lost {TRIES_MAX} races in a row: is another cluster on this store?")


def _read(store: Records) -> tuple[ShardMap | None, str | None]:
    found = store.read_record(MAP_RECORD)
    if found is None:
        return None, None
    try:
        return ShardMap.from_dict(found[0]), found[1]
    except ValueError as error:
        raise StoreError(f"{MAP_RECORD}: {error}") from None
