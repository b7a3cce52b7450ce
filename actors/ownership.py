"""Who may write: one record a shard in the store, claimed by compare-and-set. No Ray here.

A record is `cluster/owners/<shard>` = {epoch, actor, node, incarnation, cluster}. Whoever starts a shard
claims the store's next epoch and puts it into the record; from then on the shard that ran before is fenced:
it reads the record before each acknowledgement, finds another epoch than its own, and acknowledges no more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from storage.errors import Fenced, StoreError, StoreUnavailable, VersionConflict

OWNERS_PREFIX = "cluster/owners/"
RETIRED = "retired"
"""Incarnation in the record of a shard that the map does not have any more."""

log = logging.getLogger(__name__)


class Records(Protocol):
    """The part of `storage.store.MemoryStore` that ownership needs."""

    def read_record(self, name: str) -> tuple[dict[str, Any], str] | None: ...

    def write_record(
        self, name: str, record: dict[str, Any], *, if_tag: str | None = None, if_absent: bool = False
    ) -> str: ...

    def next_epoch(self) -> int: ...


class ListedRecords(Records, Protocol):
    """The same, with their names."""

    def record_names(self, prefix: str) -> Iterator[str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who owns a shard's buckets."""

    shard: str
    epoch: int
    incarnation: str
    """Names this one start of the shard: its Ray actor's name, by which it is found."""
    cluster: str
    """Names the cluster whose coordinator claimed: another one's shard is not ours to start again."""
    actor: str = ""
    node: str = ""

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, shard: str, record: Mapping[str, Any]) -> Owner:
        """Raises `StoreError` that names the record when it cannot be read."""
        try:
            owner = cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})
        except TypeError as error:
            raise StoreError(f"{OWNERS_PREFIX}{shard}: not an ownership record: {error}") from None
        if not isinstance(owner.epoch, int) or owner.epoch < 1 or owner.shard != shard:
            raise StoreError(f"{OWNERS_PREFIX}{shard}: not an ownership record of {shard}")
        return owner


def read_owner(store: Records, shard: str) -> Owner | None:
    """Who owns `shard` now; None if it was never started on this store."""
    found = store.read_record(OWNERS_PREFIX + shard)
    return None if found is None else Owner.from_record(shard, found[0])


def owners(store: ListedRecords) -> list[Owner]:
    """All records that there are, of shards that run or ran once."""
    names = (name.removeprefix(OWNERS_PREFIX) for name in store.record_names(OWNERS_PREFIX))
    return [owner for owner in (read_owner(store, shard) for shard in names) if owner is not None]


def claim(
    store: Records, shard: str, *, cluster: str, incarnation: str, take_over: bool, epoch_min: int = 0
) -> Owner:
    """Takes `shard` under the store's next epoch (over `epoch_min`); the owner before is fenced from now on.

    `take_over`: also from another cluster, as a cold start does; a restart does not, for then two clusters on
    one store would start over each other for ever. Raises `Fenced` when it is another's, or somebody else
    claims at the same time.
    """
    name = OWNERS_PREFIX + shard
    found = store.read_record(name)
    before = None if found is None else Owner.from_record(shard, found[0])
    if before is not None and not take_over and before.cluster != cluster:
        raise Fenced(f"{shard} belongs to another cluster since epoch {before.epoch}", seen=before.epoch)
    epoch = store.next_epoch()
    while epoch <= max(epoch_min, before.epoch if before else 0):
        epoch = store.next_epoch()
    owner = Owner(shard=shard, epoch=epoch, incarnation=incarnation, cluster=cluster)
    try:
        if found is None:
            store.write_record(name, owner.to_record(), if_absent=True)
        else:
            store.write_record(name, owner.to_record(), if_tag=found[1])
    except VersionConflict:
        raise Fenced(f"{shard}: somebody else has claimed it at the same time", epoch=epoch) from None
    return owner


def retire(store: ListedRecords, shards: Collection[str], *, cluster: str) -> list[str]:
    """Ends the ownership of all but `shards`, those of the map; returns whom it fenced.

    A shard that the map does not have any more is claimed by nobody: one that was away, frozen or on another disk,
    would go on under its record when it comes back, for users whom others own by then. Raises `Fenced` as `claim`.
    """
    gone = [it.shard for it in owners(store) if it.shard not in shards and it.incarnation != RETIRED]
    for shard in gone:
        claim(store, shard, cluster=cluster, incarnation=RETIRED, take_over=True)
    return gone


def announce(store: Records, owner: Owner, *, actor: str, node: str) -> Owner:
    """Adds where the shard runs to its record, for people; raises `Fenced` if it is no longer `owner`'s."""
    name = OWNERS_PREFIX + owner.shard
    found = store.read_record(name)
    if found is None or Owner.from_record(owner.shard, found[0]).epoch != owner.epoch:
        raise Fenced(f"{owner.shard}: epoch {owner.epoch} is over", epoch=owner.epoch)
    placed = replace(owner, actor=actor, node=node)
    try:
        store.write_record(name, placed.to_record(), if_tag=found[1])
    except VersionConflict:
        raise Fenced(f"{owner.shard}: epoch {owner.epoch} is over", epoch=owner.epoch) from None
    return placed


def confirm(store: Records, shard: str, epoch: int) -> None:
    """Raises `Fenced` unless the record of `shard` still holds `epoch`."""
    owner = read_owner(store, shard)
    if owner is None or owner.epoch != epoch:
        seen = 0 if owner is None else owner.epoch
        what = "the record is gone" if owner is None else f"the store has seen {seen}"
        raise Fenced(f"{shard}: epoch {epoch} is over: {what}", epoch=epoch, seen=seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grace:
    """When answers may go out although the ownership record cannot be read; docs/operations.md has the argument."""

    seconds: float = math.inf
    """For so long after the last read that found our epoch. A clock is no proof of ownership: it bounds a loss."""
    held: Callable[[], bool] = lambda: True
    """Whether our journal is still locked by us under its name: then no other owner has opened it."""


class Gate:
    """What every acknowledgement passes: a read of the record that began after its tokens were durable.

    Reads are shared: all who wait while one read runs share the next one, so the number of reads is bounded
    by their own speed and not by the traffic.

    While the store cannot be reached, nobody here can know whether another owner has begun: `Grace` says when answers
    go out all the same, and `unconfirmed` counts them.
    """

    def __init__(
        self, read: Callable[[], None], grace: Grace, *, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        """`read` blocks, and raises `Fenced` when the epoch is over; it runs in a thread. It has just been done."""
        self._read, self._grace, self._clock = read, grace, clock
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._confirmed_at_s = clock()
        self.unconfirmed = 0
        self.reads = 0

    async def look(self) -> None:
        """For an answer that has written nothing, and promises nothing: raises `Fenced`, and else goes on."""
        with suppress(StoreUnavailable):
            await self._shared_read()

    async def confirm(self) -> None:
        """Returns when the caller may acknowledge; raises `Fenced`, and `StoreUnavailable` beyond the grace."""
        try:
            await self._shared_read()
        except StoreUnavailable:  # the store's health has said it in the log
            since_s = self._clock() - self._confirmed_at_s
            if since_s >= self._grace.seconds or not self._grace.held():
                raise
            self.unconfirmed += 1

    async def watch(self, interval_s: float) -> None:
        """Looks when nobody else has for `interval_s`: a grace begins with the outage and not with the last answer
        before it, and a shard where nobody speaks hears of its successor too. Ends by raising `Fenced`.
        """
        while True:
            await asyncio.sleep(interval_s)
            if self._clock() - self._confirmed_at_s >= interval_s:
                try:
                    await self.look()
                except Fenced:
                    raise
                except StoreError as error:
                    log.warning("%s", error)

    async def _shared_read(self) -> None:
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
        await asyncio.shield(self._next)

    async def _after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        self.reads += 1
        began_at_s = self._clock()
        await asyncio.to_thread(self._read)
        self._confirmed_at_s = began_at_s
