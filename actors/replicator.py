"""Segments on their way to the shared store, and back from it: what `durability` promises beyond this node's disk.

The journal says which segments the store does not hold yet. Each user who has some has one task, which writes them as
one object and asks again, for as long as it takes, when the store does not answer; `sync` waits for it before an answer
ends (`durable`), `replicated` does not. When a user comes in, what the store holds beyond the journal goes into the
journal first (`bring_back`), and from there everything is as if it had never been away. Runs on the shard's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

from actors.figures import Figures
from actors.options import KeeperOptions
from storage.chain import Seal, follow
from storage.errors import JournalCorrupt, NotReplicated, StoreError, TitanmemError
from storage.journal import Journal
from storage.names import UserKey
from storage.segment import Segment
from storage.segments import SEGMENTS_MAX, Packet, Piece, SegmentStore

logger = logging.getLogger(__name__)

WRITES_MAX = 8
"""Objects that are written or read at once."""
RETRY_MIN_S, RETRY_MAX_S = 0.05, 2.0


@dataclass(kw_only=True, eq=False)
class _Backlog:
    """A user's segments that the store does not hold yet; the segments themselves are in the journal."""

    since_s: float
    last_chunk_id: int = 0
    segments: int = 0
    seen: list[int] = field(default_factory=list)
    resumed: bool = False
    """Of an earlier start: which hashes belong to it is not known any more, so all that the journal has go along. The
    user has not come in yet, so none of them is of a segment that does not."""
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    writing: Future[Piece] | None = None
    task: asyncio.Task[None] | None = None


class Replicator:
    """Of one shard, under its epoch. With durability `local` it writes nothing, and still brings back what is there."""

    def __init__(
        self, journal: Journal, segments: SegmentStore, options: KeeperOptions, figures: Figures, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._journal, self._segments, self._figures, self._clock = journal, segments, figures, clock
        self._options = options
        self._active, self._sync = options.durability != "local", options.durability == "sync"
        self._pause_s = 0.0 if self._sync else options.replicate_interval_s / 4
        self._pool = ThreadPoolExecutor(WRITES_MAX, "replicate")
        self._backlogs: dict[UserKey, _Backlog] = {}
        self._pieces: dict[UserKey, set[Piece]] = {}
        """Objects of residents in the store, so that trimming needs no listing."""
        self._problem = "it takes longer than that"
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with what an earlier start of this shard has left unreplicated, whoever asks for it or not."""
        if self._active:
            self._watch = asyncio.create_task(self._alert())
            for key, (count, last_chunk_id) in self._journal.users_unreplicated().items():
                self._resume(key, count, last_chunk_id).resumed = True

    # -- to the store -----------------------------------------------------------------------------------------

    def add(self, segment: Segment, seen: Sequence[int]) -> None:
        """Takes note of a segment, and the hashes written with it, that the journal has committed."""
        if self._active:
            backlog = self._backlog(segment.key)
            backlog.last_chunk_id = segment.last_chunk_id
            backlog.segments += 1
            backlog.seen += seen

    async def durable(self, key: UserKey) -> None:
        """Returns when an answer to the user may end: with `sync`, when the store holds all that was added so far.

        Raises NotReplicated when that takes too long; the writing goes on.
        """
        backlog = self._backlogs.get(key)
        if not self._sync or backlog is None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        backlog.waiting.append(done)
        try:
            async with asyncio.timeout(self._options.sync_timeout_s):
                await done
        except TimeoutError:
            raise NotReplicated(
                f"{key}: what was told is in the journal of {self._options.shard}, and was not in the store within "
                f"{self._options.sync_timeout_s:g} s ({self._problem}). Ask again with the same Idempotency-Key: "
                "nothing is written twice.",
                key=str(key), retry_after_s=RETRY_MAX_S,
            ) from None  # fmt: skip

    def _backlog(self, key: UserKey) -> _Backlog:
        backlog = self._backlogs.get(key)
        if backlog is None:
            backlog = self._backlogs[key] = _Backlog(since_s=self._clock())
            backlog.task = asyncio.create_task(self._replicate(key, backlog))
        return backlog

    def _resume(self, key: UserKey, count: int, last_chunk_id: int) -> _Backlog:
        """A backlog of what the journal has and nobody added here."""
        backlog = self._backlog(key)
        backlog.segments, backlog.last_chunk_id = count, last_chunk_id
        return backlog

    async def _replicate(self, key: UserKey, backlog: _Backlog) -> None:
        """Until the store holds everything: the oldest segments as one object, again after a failure."""
        pause_s = self._pause_s
        while True:
            await asyncio.sleep(pause_s)
            started_s, last_chunk_id = self._clock(), backlog.last_chunk_id
            try:
                more = await self._write(key, backlog, last_chunk_id)
            except TitanmemError as error:
                self._figures.store_errors.add("segments")
                self._problem = str(error)
                pause_s = min(RETRY_MAX_S, max(RETRY_MIN_S, 2 * pause_s)) * (0.5 + random.random() / 2)
                continue
            pause_s = 0.0 if more else self._pause_s
            if more:
                continue
            backlog.since_s = started_s
            if backlog.last_chunk_id == last_chunk_id:
                self._backlogs.pop(key)
                _release(backlog.waiting)
                return

    async def _write(self, key: UserKey, backlog: _Backlog, last_chunk_id: int) -> bool:
        """One object of segments up to a chunk; whether there are more of these. What waited for them goes on."""
        found = self._journal.unreplicated(key, SEGMENTS_MAX)
        segments = [segment for segment in found if segment.last_chunk_id <= last_chunk_id]
        more = len(segments) == SEGMENTS_MAX
        # Hashes say that something was written: they must not be in the store before it is.
        waiting, seen = ([], []) if more else (backlog.waiting, backlog.seen)
        if not more:
            backlog.waiting, backlog.seen = [], []
        try:
            if segments:
                hashes = self._journal.seen(key) if backlog.resumed and not more else seen
                epoch = self._options.epoch
                backlog.writing = self._pool.submit(self._segments.put, key, segments, hashes, epoch=epoch)
                piece = await asyncio.wrap_future(backlog.writing)
                if key in self._pieces:
                    self._pieces[key].add(piece)
                await asyncio.wrap_future(self._journal.mark_replicated(segments))
        except BaseException:
            backlog.waiting, backlog.seen = waiting + backlog.waiting, seen + backlog.seen
            raise
        # What is not in the journal any more was trimmed: stored versions hold it.
        backlog.segments = max(0, backlog.segments - len(segments)) if segments else 0
        _release(waiting)
        return more

    # -- back from the store ----------------------------------------------------------------------------------

    async def bring_back(self, key: UserKey, *, after_chunk_id: int, epoch: int) -> None:
        """Makes the journal hold what continues the version that ends with a chunk and was stored under `epoch`.

        `epoch` 0: there is no version. The caller holds the user's turn. Raises JournalCorrupt when an object that is
        needed is damaged, StoreUnavailable when it cannot be read.
        """
        before = await self._stop(key) or _Backlog(since_s=self._clock())
        missing: list[Segment] = []
        try:
            missing = await self._bring_back(key, after_chunk_id, epoch)
        except BaseException:
            missing = self._journal.unreplicated(key)
            raise
        finally:
            if self._active and missing:
                backlog = self._resume(key, len(missing), missing[-1].last_chunk_id)
                backlog.seen, backlog.since_s = self._journal.seen(key), before.since_s
                backlog.waiting = before.waiting
            else:
                _release(before.waiting)

    async def _bring_back(self, key: UserKey, after_chunk_id: int, epoch: int) -> list[Segment]:
        """The same; returns the segments that the store lacks."""
        pieces = await self._in_pool(self._segments.pieces, key)
        self._pieces[key] = set(pieces)
        behind = [p for p in pieces if p.seal is None and p.last_chunk_id > after_chunk_id]
        packets, damaged = await self._in_pool(self._read, key, behind)
        local = self._journal.pending(key, after_chunk_id)
        seals = [seal for seal in (piece.seal for piece in pieces) if seal is not None]
        remote = [segment for packet in packets for segment in packet.segments]
        chain = follow([*local, *remote], after_chunk_id=after_chunk_id, epoch=epoch, seals=seals)
        if not epoch and chain and chain[0].first_chunk_id > 1 and _id(chain[0]) not in _ids(local):
            logger.error("%s: segments from chunk %d on are left over from a memory that is gone: they are not read",
                         key, chain[0].first_chunk_id)  # fmt: skip
            chain, packets, remote = local, [], []
        reach = chain[-1].last_chunk_id if chain else after_chunk_id
        for piece, error in damaged:
            newest = max([epoch, *(s.epoch for s in seals if s.first_chunk_id <= piece.first_chunk_id)])
            if piece.last_chunk_id > reach and piece.epoch >= newest:
                raise error
        held = [segment for segment in chain if _id(segment) in _ids(remote)]
        await self._settle(key, local, chain, held, packets, after_chunk_id)
        if self._active:
            begun = {epoch, *(seal.epoch for seal in seals), *(segment.epoch for segment in remote)}
            if self._options.epoch not in begun and (chain or epoch):
                seal = Seal(first_chunk_id=reach + 1, epoch=self._options.epoch)
                self._pieces[key].add(await self._in_pool(self._segments.seal, key, seal))
        return [segment for segment in chain if _id(segment) not in _ids(held)]

    def _read(
        self, key: UserKey, pieces: Iterable[Piece]
    ) -> tuple[list[Packet], list[tuple[Piece, JournalCorrupt]]]:
        """The packets that can be read, and what is wrong with the others."""
        packets: list[Packet] = []
        damaged: list[tuple[Piece, JournalCorrupt]] = []
        for piece in pieces:
            try:
                packet = self._segments.read(key, piece)
            except JournalCorrupt as error:
                logger.error("%s", error)
                damaged.append((piece, error))
                continue
            if packet is not None:
                packets.append(packet)
        return packets, damaged

    async def _settle(
        self, key: UserKey, local: list[Segment], chain: list[Segment], held: list[Segment], packets: list[Packet],
        after_chunk_id: int,
    ) -> None:  # fmt: skip
        """Puts the chain into the journal, with the marks of what the store holds, unless it is there already."""
        unmarked = _ids(s for s in self._journal.unreplicated(key) if s.last_chunk_id > after_chunk_id)
        if _ids(local) == _ids(chain) and unmarked == _ids(chain) - _ids(held):
            return
        wanted = _ids(chain)
        taken = [packet for packet in packets if _ids(packet.segments) & wanted]
        seen = [value for packet in taken for value in packet.seen]
        replaced = self._journal.replace(key, chain, held=held, seen=seen, after_chunk_id=after_chunk_id)
        await asyncio.wrap_future(replaced)
        if wanted - _ids(local):
            logger.info("%s: %d segments came back from the store", key, len(wanted - _ids(local)))

    def users(self) -> set[UserKey]:
        """Users with segments in the store. Blocking."""
        return set(self._segments.users())

    # -- going ------------------------------------------------------------------------------------------------

    async def trim(self, key: UserKey, last_chunk_id: int) -> None:
        """Removes objects that durable versions hold; what cannot be removed now stays until the next time."""
        pieces = self._pieces.get(key, set())
        for piece in [piece for piece in pieces if piece.last_chunk_id <= last_chunk_id]:
            try:
                await self._in_pool(self._segments.delete, key, piece)
            except StoreError as error:
                logger.warning("%s of %s is left behind for now: %s", piece.file, key, error)
                return
            pieces.discard(piece)

    def leave(self, key: UserKey) -> None:
        """The user is not resident any more; what is to be replicated still is."""
        self._pieces.pop(key, None)

    async def forget(self, key: UserKey) -> None:
        """Stops all writing for a user; nothing of theirs is on its way to the store when it returns."""
        self.leave(key)
        stopped = await self._stop(key)
        _release(stopped.waiting if stopped else ())

    async def _stop(self, key: UserKey) -> _Backlog | None:
        """Ends a user's task and what it is writing; returns what it had."""
        backlog = self._backlogs.pop(key, None)
        if backlog is None:
            return None
        assert backlog.task is not None, "a backlog has a task from the start"
        backlog.task.cancel()
        await asyncio.gather(backlog.task, return_exceptions=True)
        if backlog.writing is not None:
            await asyncio.to_thread(wait, [backlog.writing])
        return backlog

    async def close(self) -> None:
        """Stop; what is not replicated yet is in the journal, and is taken up at the next start."""
        tasks = [
            task for task in (self._watch, *(b.task for b in self._backlogs.values())) if task is not None
        ]
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    # -- being watched ----------------------------------------------------------------------------------------

    def lag_s(self) -> float:
        """Age of the oldest journalled segment that the store does not hold, 0 when it holds all."""
        now = self._clock()
        return max((now - backlog.since_s for backlog in self._backlogs.values()), default=0.0)

    def backlog(self) -> int:
        """Segments that the store does not hold yet."""
        return sum(backlog.segments for backlog in self._backlogs.values())

    async def _alert(self) -> None:
        """One line when the interval is missed, one when the store has caught up."""
        interval_s, late = self._options.replicate_interval_s, False
        while True:
            await asyncio.sleep(interval_s / 2)
            lag_s = self.lag_s()
            if lag_s > interval_s and not late:
                logger.error(
                    "%s: %d segments of %d users are not in the store after %.1f s (replicate_interval_s is %g): the "
                    "loss of this node's disk now would lose them: %s",
                    self._options.shard, self.backlog(), len(self._backlogs), lag_s, interval_s, self._problem,
                )  # fmt: skip
            elif late and lag_s <= interval_s:
                logger.warning("%s: the store holds everything again", self._options.shard)
            late = lag_s > interval_s

    async def _in_pool(self, work, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


def _release(waiting: Iterable[asyncio.Future[None]]) -> None:
    for done in waiting:
        if not done.done():
            done.set_result(None)


def _id(segment: Segment) -> tuple[str, int, int]:
    """What makes two copies of a segment the same one."""
    return segment.update_id, segment.last_chunk_id, segment.epoch


def _ids(segments: Iterable[Segment]) -> set[tuple[str, int, int]]:
    return {_id(segment) for segment in segments}
