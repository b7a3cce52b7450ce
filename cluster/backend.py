"""What the door needs from the cluster. `cluster/router.py` gives it over Ray; tests give it in one process.

Every method raises errors of the one tree: names and files (`InvalidName`, `BadMemoryFile`), what the store
says (`NoSuchMemory`, `VersionConflict`, `Fenced`, `Forgotten`, `StoreUnavailable`), `QueueFull` of a shard,
`ShardUnavailable` and `NotReady` of the cluster. What is none of these is a bug and answers 500.
Dicts hold JSON values alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from storage.names import UserKey

Record = dict[str, Any]
"""One JSON object."""


class Backend(Protocol):
    """A cluster of shards, seen from the door."""

    def chat(self, call: ChatCall) -> AsyncIterator[TokenEvent | DoneEvent]:
        """Token events in order, then one `DoneEvent`.

        The door closes the iterator (`aclose`) as soon as the client is gone, also in the middle of a wait:
        the request must then stop costing at once.
        """
        ...

    async def ingest(self, call: IngestCall) -> IngestOutcome:
        """Returns when the piece is durable; the same `update_id` again has the same outcome."""
        ...

    async def describe(self, key: UserKey) -> Record:
        """Version, tokens seen, chunks, surprise rate, utilisation, norm, bytes, shard, frozen, cohort."""
        ...

    async def versions(self, key: UserKey) -> list[Record]:
        """Stored versions, newest first."""
        ...

    async def rollback(self, key: UserKey, to: int | None = None) -> Record:
        """Back to stored version `to`; None is the one before the current one."""
        ...

    async def pin(self, key: UserKey) -> Record:
        """Keeps the current version from being swept away."""
        ...

    async def export(self, key: UserKey) -> bytes:
        """The user's newest memory as a `.titanmem` file."""
        ...

    async def import_(self, key: UserKey, data: bytes) -> Record:
        """Replaces the user's memory by a `.titanmem` file's; a `BadMemoryFile` changes nothing."""
        ...

    async def forget(self, key: UserKey) -> Record:
        """Erases the user everywhere; returns the receipt."""
        ...

    async def users(self, tenant: str) -> list[Record]:
        """One record a user of `tenant`, each with at least `user`."""
        ...

    async def shards(self) -> list[Record]:
        """One record a shard, each with at least `shard` and `state`."""
        ...

    async def scale(self, shards: int) -> Record:
        """Sets the wanted number of shards."""
        ...

    async def drain(self, shard: str) -> Record:
        """Moves everything off one shard."""
        ...

    async def snapshot(self, target: str | None = None) -> Record:
        """Writes a cold backup to `target` (None: the configured place); returns when its manifest stands."""
        ...

    async def readiness(self) -> tuple[bool, str]:
        """Whether requests are served now, and what is wrong: if not, why not; if so, why not as they should, such as
        a store that is away. Within a second, whatever the shards do."""
        ...

    async def shard_metrics(self) -> list[bytes]:
        """Prometheus text of each shard that answered in time."""
        ...
