"""One shard's life, seen from the coordinator: claim, start, watch, start again under a new epoch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError

from actors.options import ShardOptions
from actors.ownership import announce, claim, read_owner
from cluster.handles import Handle, ask, unwrap
from cluster.processes import Processes, kill
from storage.errors import Fenced, TitanmemError
from storage.store import MemoryStore

PING_INTERVAL_S = 0.5
PING_TIMEOUT_S = 1.0
PING_MISSES_MAX = 3
"""A process that does not answer for three seconds is frozen: a busy one answers from a thread that has nothing else to
do. More than one miss, so that a coordinator that was frozen itself asks again when it wakes. The end of a process is
noticed at once anyhow."""
ADOPT_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 60.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.2, 15.0

log = logging.getLogger(__name__)


class Watcher:
    """Keeps one shard running.

    `state` is one of starting, ready, draining, restarting, stopped, failed (could not be started, and is
    tried again), and fenced (another cluster owns the shard now, and it is left alone).
    """

    def __init__(
        self,
        shard: str,
        *,
        store: MemoryStore,
        processes: Processes,
        cluster: str,
        take_over: bool,
        options: Callable[[int], Awaitable[ShardOptions]],
    ) -> None:
        """`options(epoch)` puts a claimed epoch into the shard map and says what the shard is started with.

        `take_over`: the first start may take the shard from another cluster on the same store.
        """
        self.shard = shard
        self.state = "starting"
        self.error = ""
        self.epoch = self.pid = self.starts = 0
        self.node = ""
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first start has ended: None, or what kept it from serving."""
        self._handle: Handle = None
        self._store = store
        self._processes = processes
        self._cluster = cluster
        self._take_over = take_over
        self._options = options
        self._task: asyncio.Task[None] | None = None

    def start(self, living: Handle | None = None) -> None:
        """Begins; `living` is an actor of an earlier coordinator, adopted when it is still the owner."""
        self._task = asyncio.create_task(self._run(living))

    def about(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "state": self.state,
            "epoch": self.epoch,
            "pid": self.pid,
            "node": self.node,
            "restarts": max(0, self.starts - 1),
            "error": self.error,
        }

    def drain(self) -> None:
        """The shard says draining from now on; its calls are still served."""
        if self._handle is not None and self.state == "ready":
            self.state = "draining"
            self._handle.drain.remote()

    async def stop(self) -> None:
        """Lets the shard store its memories and ends it; kills it when that takes too long."""
        if self._task is not None:
            self._task.cancel()
        if self._handle is not None:
            try:
                await ask(self._handle.close.remote(), CLOSE_TIMEOUT_S)
                self.state, self.error = "stopped", ""
            except Exception as error:
                self.state, self.error = "failed", f"did not stop in order: {type(error).__name__}: {error}"
                log.warning("%s %s", self.shard, self.error)
            self._kill()

    async def _run(self, living: Handle | None) -> None:
        pause_s = BACKOFF_MIN_S
        adopted = living is not None and await self._adopt(living)
        while True:
            try:
                if not adopted:
                    await self._open()
                adopted, pause_s = False, BACKOFF_MIN_S
                self._settle(None)
                why = await self._until_dead()
                self.state, self.error = "restarting", why
                log.warning("%s has ended (%s) and is started again", self.shard, why)
            except asyncio.CancelledError:
                raise
            except Exception as caught:
                error = unwrap(caught)
                self.error = f"{type(error).__name__}: {error}"
                self.state = "fenced" if isinstance(error, Fenced) else "failed"
                log.warning("%s cannot start: %s", self.shard, self.error)
                self._kill()
                self._settle(error)
                if isinstance(error, Fenced):
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, BACKOFF_MAX_S)

    def _settle(self, error: BaseException | None) -> None:
        if self.first.done():
            return
        if error is None:
            self.first.set_result(None)
        else:
            self.first.set_exception(error)
            self.first.exception()  # looked at: a start that nobody waits for is no warning at exit

    async def _adopt(self, living: Handle) -> bool:
        """True if the living actor is the rightful owner and open; else it is ended."""
        self._handle = living
        try:
            about = await ask(living.ping.remote(), ADOPT_TIMEOUT_S)
            owner = await asyncio.to_thread(read_owner, self._store, self.shard)
            if (
                owner is not None
                and owner.epoch == about.get("epoch")
                and about["state"] in ("ready", "draining")
            ):
                self.starts = 1
                self._learn(about)
                return True
        except (RayError, TitanmemError, TimeoutError) as error:
            log.warning("%s cannot be adopted: %s", self.shard, error)
        self._kill()
        return False

    async def _open(self) -> None:
        take_over = self._take_over and not self.first.done()
        process = await self._processes.take(self.node)
        self._handle = process.handle
        owner = await asyncio.to_thread(
            claim,
            self._store,
            self.shard,
            cluster=self._cluster,
            incarnation=process.name,
            take_over=take_over,
        )
        options = await self._options(owner.epoch)
        self.epoch, self.starts = owner.epoch, self.starts + 1
        self._learn(await ask(self._handle.become.remote(options), OPEN_TIMEOUT_S))
        actor = self._handle._actor_id.hex()
        await asyncio.to_thread(announce, self._store, owner, actor=actor, node=self.node)

    async def _until_dead(self) -> str:
        """Why the shard has ended. The end of its process is noticed by the call that never returns; a frozen
        one by pings that miss, and is then killed."""
        misses, pause_s = 0, PING_INTERVAL_S
        ended = asyncio.ensure_future(_ended(self._handle))
        try:
            while True:
                done, _ = await asyncio.wait({ended}, timeout=pause_s)
                if done:
                    return ended.result()
                try:
                    self._learn(await ask(self._handle.ping.remote(), PING_TIMEOUT_S))
                    misses, pause_s = 0, PING_INTERVAL_S
                except TimeoutError:
                    misses, pause_s = misses + 1, 0.0
                except RayError:  # at once, and it may be a connection that comes back
                    misses, pause_s = misses + 1, PING_TIMEOUT_S
                if misses >= PING_MISSES_MAX:
                    self._kill()
                    return f"it did not answer {misses} times in a row and was killed"
        finally:
            ended.cancel()

    def _learn(self, about: dict[str, Any]) -> None:
        self.state, self.epoch, self.pid, self.node = (
            about["state"],
            about["epoch"],
            about["pid"],
            about["node"],
        )
        self.error = ""

    def _kill(self) -> None:
        if self._handle is not None:
            kill(self._handle)
            self._handle = None


async def _ended(handle: Handle) -> str:
    while True:
        try:
            await handle.until_dead.remote()
        except ActorUnavailableError:
            await asyncio.sleep(PING_INTERVAL_S)
        except RayError as error:
            return type(error).__name__
