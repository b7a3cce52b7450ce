"""Pending segments follow their users when buckets have moved between shards while nothing ran. No Ray here.

A journal belongs to a shard and stays on its disk. After a start with another number of shards, a journal may
hold segments of users that another shard owns now. Before any shard serves, each such user's segments,
conversation hashes, and the update ids with their outcomes, those of trimmed segments too, go to the new owner's
journal, and only when they are durable there are they removed from the old one. A crash in between leaves them in
both; the next start does it again, and a journal takes every update id once.

Only journals in this node's folder take part. With durability `replicated` or `sync` the new owner finds in the store
what a journal on another node holds, and where both know a user, the newer epoch's segments count.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.options import JOURNAL_SUFFIX, journal_path
from storage.chain import follow
from storage.errors import JournalError
from storage.journal import Update
from storage.names import UserKey

LOCK_WAIT_S = 20.0
"""A killed process takes a moment to go; its lock goes with it."""
POLL_S = 0.05
COMMIT_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class JournalLike(Protocol):
    """The part of `storage.journal.Journal` that a handover needs."""

    def append(self, segment: Any, seen: Sequence[int] = ()) -> Future[Any]: ...
    def replace(
        self, key: UserKey, segments: Sequence[Any], *, held: Sequence[Any], seen: Sequence[int] = ()
    ) -> Future[Any]: ...
    def updates(self, key: UserKey) -> list[Update]: ...
    def adopt(self, key: UserKey, updates: Sequence[Update]) -> Future[Any]: ...
    def pending(self, key: UserKey, after_chunk_id: int = 0) -> list[Any]: ...
    def seen(self, key: UserKey) -> list[int]: ...
    def users(self) -> Sequence[UserKey]: ...
    def forget(self, *keys: UserKey) -> Any: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """What one handover did."""

    journals: int
    users: int
    """With segments or without."""
    segments: int


def hand_over(
    journal_dir: Path,
    owner_of: Callable[[UserKey], str],
    open_journal: Callable[[Path], JournalLike],
    *,
    wait_s: float = LOCK_WAIT_S,
) -> Handover:
    """Brings every pending segment in `journal_dir` to the journal of its owner; call it while no shard runs.

    `owner_of` gives the shard's name. Raises `JournalError` (a journal is damaged, full, or still in use by a
    process that has not ended); nothing is removed then that is not durable in its new place.
    """
    users = segments = 0
    files = sorted(journal_dir.glob(f"*{JOURNAL_SUFFIX}"))
    with ExitStack() as stack:
        opened: dict[str, JournalLike] = {}

        def journal_of(shard: str) -> JournalLike:
            if shard not in opened:
                path = journal_path(journal_dir, shard)
                wait_until_free(path, wait_s)
                opened[shard] = open_journal(path)
                stack.callback(opened[shard].close)
            return opened[shard]

        for file in files:
            shard = file.name.removesuffix(JOURNAL_SUFFIX)
            source = journal_of(shard)
            # Those too of whom nothing waits: nobody asks this journal for them any more, nor would erase them in it.
            leaving = {key: owner for key in source.users() if (owner := owner_of(key)) != shard}
            for key, owner in leaving.items():
                segments += _move(source, journal_of(owner), key)
            if leaving:
                source.forget(*leaving)
                users += len(leaving)
    if users:
        log.info("handed %d segments of %d users to their new shards", segments, users)
    return Handover(journals=len(files), users=users, segments=segments)


def _move(source: JournalLike, target: JournalLike, key: UserKey) -> int:
    """Copies all of one user, oldest first; returns the number of segments."""
    pending = source.pending(key)
    seen, updates = source.seen(key), source.updates(key)
    there = target.pending(key)
    known = {segment.update_id for segment in there}
    if known - {segment.update_id for segment in pending}:
        # The user was here before, and one of the two journals is older: appended in turn they would be neither.
        chain = follow([*there, *pending])
        kept = {(segment.update_id, segment.epoch) for segment in chain}
        # Which hashes belong to a segment that has to go is not known: then none of its journal's says "written".
        hashes = [
            value
            for segments, values in ((there, target.seen(key)), (pending, seen))
            if all((segment.update_id, segment.epoch) in kept for segment in segments)
            for value in values
        ]
        void = {segment.update_id for segment in pending if segment not in chain}
        updates = [update for update in updates if update.update_id not in void]
        pending = [segment for segment in pending if segment in chain]
        target.replace(key, chain, held=(), seen=hashes).result(COMMIT_TIMEOUT_S)
    # The hashes go with the first segment, so that they are there as soon as any segment is.
    appended = [target.append(segment, seen if n == 0 else ()) for n, segment in enumerate(pending)]
    for future in appended:
        future.result(COMMIT_TIMEOUT_S)
    if updates:
        target.adopt(key, updates).result(COMMIT_TIMEOUT_S)
    return len(pending)


def wait_until_free(journal: Path, wait_s: float = LOCK_WAIT_S) -> None:
    """Returns when no other process has `journal` open: one that was killed takes a moment to be gone.

    Raises `JournalError` when one still has it after `wait_s`.
    """
    path = Path(f"{journal}.lock")
    deadline = time.monotonic() + wait_s
    while path.exists():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise JournalError(
                    f"{journal}: process {holder} still has this journal open after {wait_s:g} s; "
                    f"end it, or give this cluster a journal folder of its own",
                    path=str(journal),
                    holder=holder,
                ) from None
        finally:
            os.close(descriptor)
        time.sleep(POLL_S)
