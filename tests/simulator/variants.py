"""The product, broken on purpose: each variant takes one rule away, by name, and the checker must see it.

A checker that cannot fail proves nothing. A variant is a context in which a function of the real code is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from actors import document
from actors.ownership import Gate, Owner, claim, read_owner
from actors.replicator import Replicator
from actors.roster import Roster
from actors.shard import MemoryShard
from storage.errors import Fenced
from storage.head import Head, VersionInfo
from storage.journal import Journal
from storage.records import RecordStore
from tests.simulator import fleet
from tests.simulator.disk import ProcessJournal
from tests.simulator.life import Life


def no_ownership_read() -> AbstractContextManager[object]:
    """An answer goes out without a look at the ownership record."""

    async def confirm(self: Gate) -> None:
        return

    return patch.object(Gate, "confirm", confirm)


@contextlib.contextmanager
def fenced_goes_on() -> Iterator[None]:
    """A shard hears that its epoch is over, and serves on."""
    original = Gate.confirm

    async def confirm(self: Gate) -> None:
        with contextlib.suppress(Fenced):
            await original(self)

    with (
        patch.object(Gate, "confirm", confirm),
        patch.object(MemoryShard, "_noticed", lambda self, error: None),
    ):
        yield


def epoch_reused() -> AbstractContextManager[object]:
    """Whoever starts a shard again takes the epoch that it had."""

    def again(store: Any, shard: str, **fields: Any) -> Owner:
        before = read_owner(store, shard)
        if before is None:
            return claim(store, shard, **fields)
        owner = replace(before, incarnation=fields["incarnation"], cluster=fields["cluster"], actor="")
        store.write_record(f"cluster/owners/{shard}", owner.to_record())
        return owner

    return patch.object(fleet, "claim", again)


def trimmed_before_stored() -> AbstractContextManager[object]:
    """The journal lets go of what the store does not have yet."""
    original = Roster.store

    async def store(self: Roster, resident: Any) -> bool:
        if resident.dirty:
            await asyncio.wrap_future(self.journal.trim(resident.key, resident.last_chunk_id))
        return await original(self, resident)

    return patch.object(Roster, "store", store)


def unconditional_head() -> AbstractContextManager[object]:
    """HEAD is written whatever it holds."""
    original = RecordStore.write_record

    def write(self: RecordStore, name: str, record: dict[str, Any], **conditions: Any) -> str:
        return original(self, name, record, **({} if name.endswith("/HEAD") else conditions))

    return patch.object(RecordStore, "write_record", write)


def old_epoch_may_store() -> AbstractContextManager[object]:
    """A store that does not compare epochs."""
    return patch.object(Head, "check_epoch", lambda self, key, epoch: None)


def version_name_without_epoch() -> AbstractContextManager[object]:
    """Two owners write one version under one name."""
    return patch.object(
        VersionInfo, "file", property(lambda self: f"v{self.version:012d}-e00000000.titanmem")
    )


def retry_under_a_new_id() -> AbstractContextManager[object]:
    """A lost answer is taken for a failure: the same update is sent again as another one."""
    return patch.object(Life, "name", lambda self, update_id, attempt: f"{update_id}~{attempt}")


@contextlib.contextmanager
def duplicate_not_refused() -> Iterator[None]:
    """Neither keeper nor journal know an update id again."""
    numbers = itertools.count(1)
    original = ProcessJournal.append_all

    def append_all(self: ProcessJournal, segments: Any, seen: Any = ()) -> Any:
        named = [replace(segment, update_id=f"{segment.update_id}~{next(numbers)}") for segment in segments]
        return original(self, named, seen)

    def set_outcome(self: Journal, key: Any, update_id: str, outcome: Any) -> Any:
        return self.trim(key, 0)

    with (
        patch.object(ProcessJournal, "append_all", append_all),
        patch.object(ProcessJournal, "set_outcome", set_outcome),
        patch.object(document, "update_hash", lambda update_id: next(numbers)),
    ):
        yield


def journal_ignored() -> AbstractContextManager[object]:
    """A user comes in from the newest version alone."""
    return patch.object(Journal, "pending", lambda self, key, after_chunk_id=0: [])


def journals_not_handed_over() -> AbstractContextManager[object]:
    """Buckets move, and what the journals hold of their users stays behind."""
    return patch.object(fleet, "hand_over", lambda *_, **__: None)


def sync_not_awaited() -> AbstractContextManager[object]:
    """Durability `sync`, and an answer does not wait for the store to have its segment."""

    async def durable(self: Replicator, key: Any) -> None:
        return

    return patch.object(Replicator, "durable", durable)


def replicas_not_read() -> AbstractContextManager[object]:
    """What other owners have put into the store is not brought back."""

    async def bring_back(self: Replicator, key: Any, **_: Any) -> None:
        return

    return patch.object(Replicator, "bring_back", bring_back)


VARIANTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    broken.__name__: broken
    for broken in (
        no_ownership_read, fenced_goes_on, epoch_reused, trimmed_before_stored, unconditional_head,
        old_epoch_may_store, version_name_without_epoch, retry_under_a_new_id, duplicate_not_refused, journal_ignored,
        journals_not_handed_over, sync_not_awaited, replicas_not_read,
    )
}  # fmt: skip
