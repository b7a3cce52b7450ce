"""The control plane: one detached actor that places shards, watches them, and starts dead ones again.

It keeps no state that the store does not have: killed, it comes back, finds the shards that live, and goes
on. Requests never pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from actors.handover import hand_over
from actors.options import KeeperOptions, ShardOptions
from actors.ownership import read_owner, retire
from cluster.config import Config
from cluster.errors import BadRequest, NotReady
from cluster.handles import COORDINATOR, FIND_TIMEOUT_S, NAMESPACE, SNAPSHOTTER, Handle, find
from cluster.mapstore import read_map, record_epoch, settle
from cluster.processes import Processes, kill, living
from cluster.shardmap import ShardMap, moved, shard_name
from cluster.watcher import BACKOFF_MAX_S, Watcher
from storage.errors import TitanmemError
from storage.journal import Journal
from storage.store import MemoryStore, open_store

HEAD = {HEAD_NODE_RESOURCE_NAME: 0.001}
"""Ray's own mark of the head node: whoever sees to the loss of any other node must not be lost with it."""

log = logging.getLogger(__name__)


class Coordinator:
    """Started once a Ray cluster by `ensure`. `cluster` names it in the store's ownership records."""

    def __init__(self, config: Config, cluster: str) -> None:
        self._config = config
        self._cluster = cluster
        self._map: ShardMap | None = None
        self._watchers: list[Watcher] = []
        self._processes = Processes(
            config.keeper,
            str(config.model_folder),
            spares=config.spares,
            anywhere=config.durability != "local",
            shards_on=lambda node: sum(watcher.node == node for watcher in self._watchers),
        )
        self._spares: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._error: TitanmemError | None = None
        self._draining = False
        self._moves = 0
        self._map_lock = asyncio.Lock()
        self._snapshots: asyncio.Task[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    # -- for the door and for serve ------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The whole cluster in one record."""
        counts = self._map.counts() if self._map else []
        return {
            "cluster": self._cluster,
            "state": self._state(),
            "error": self._error.message if self._error else "",
            "map_version": self._map.version if self._map else 0,
            "spares": self._processes.spares,
            "shards": [w.about() | {"buckets": counts[n]} for n, w in enumerate(self._watchers)],
        }

    async def wait_ready(self) -> dict[str, Any]:
        """Returns `status` when every shard has started; raises what kept the first start from it."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        await asyncio.gather(*(asyncio.shield(watcher.first) for watcher in self._watchers))
        return await self.status()

    async def metrics(self) -> bytes:
        """Prometheus text of what only the coordinator counts, since it was started."""
        lines = []
        for name, help_, value in (
            ("titan:bucket_moves_total", "Buckets that went to another shard.", self._moves),
            ("titan:fenced_total", "Shards that another cluster has taken over.", self._fenced()),
            (
                "titan:spare_processes",
                "Processes that stand ready to become a shard.",
                self._processes.spares,
            ),
        ):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}", f"{name} {value}"]
        return ("\n".join(lines) + "\n").encode()

    async def scale(self, shards: int) -> dict[str, Any]:
        """Buckets do not move while shards run, so only the number that is there already is accepted."""
        current = self._map.shards if self._map else self._config.shards
        if shards != current:
            raise BadRequest(
                f"{current} shards run, and buckets do not move while they do: "
                f"stop the cluster and start it with --shards {shards}; every user comes along",
                param="shards",
                code="cold_start_needed",
            )
        return await self.status()

    async def drain(self, shard: str) -> dict[str, Any]:
        """As with `scale`: a shard is emptied by a start with fewer."""
        names = [watcher.shard for watcher in self._watchers]
        if shard not in names:
            raise BadRequest(f"there is no shard {shard!r}; there are {', '.join(names)}", param="shard")
        raise BadRequest(
            f"{shard} cannot be emptied while it runs: stop the cluster and start it with "
            f"--shards {max(1, len(names) - 1)}; every user comes along",
            param="shard",
            code="cold_start_needed",
        )

    async def begin_drain(self) -> None:
        """The shards say draining from now on; requests are still served."""
        self._draining = True
        for watcher in self._watchers:
            watcher.drain()

    async def stop(self) -> dict[str, Any]:
        """Stores every memory and ends every shard and the snapshotter; returns the last `status`."""
        await self.begin_drain()
        for task in (self._task, self._snapshots, self._spares):
            if task is not None:
                task.cancel()
        self._processes.end()
        await asyncio.gather(*(watcher.stop() for watcher in self._watchers))
        with contextlib.suppress(TimeoutError):
            snapshotter = await find(SNAPSHOTTER)
            if snapshotter is not None:
                ray.kill(snapshotter, no_restart=True)
        return await self.status()

    # -- inside --------------------------------------------------------------------------------------

    def _fenced(self) -> int:
        return sum(watcher.state == "fenced" for watcher in self._watchers)

    def _state(self) -> str:
        if self._draining:
            return "draining"
        if self._error is not None:
            return "failed"
        ready = self._watchers and all(watcher.state == "ready" for watcher in self._watchers)
        return "running" if ready else "starting"

    async def _run(self) -> None:
        """Starts, and tries again for as long as something outside keeps it from starting."""
        while True:
            try:
                await self._start()
                self._error = None
                return
            except TitanmemError as error:
                self._error = error
            except Exception as error:
                log.exception("the cluster cannot start")
                self._error = NotReady(f"the cluster cannot start: {type(error).__name__}: {error}")
            finally:
                self._settled.set()
            log.warning("the cluster cannot start: %s", self._error)
            await asyncio.sleep(BACKOFF_MAX_S)

    async def _start(self) -> None:
        store = await asyncio.to_thread(open_store, self._config.store)
        before = await asyncio.to_thread(read_map, store)
        async with asyncio.timeout(FIND_TIMEOUT_S):
            found = await asyncio.to_thread(living)
        adopted = await asyncio.to_thread(self._owners, store, before, found)
        if before is None or not adopted:
            # Nothing runs: the one moment in which buckets may move and journals may be opened by others.
            after = await asyncio.to_thread(settle, store, self._config.shards)
            self._moves = moved(before, after) if before else 0
            await asyncio.to_thread(retire, store, after.names, cluster=self._cluster)
            await asyncio.to_thread(self._hand_over, after)
            before = after
        self._map = before
        # A coordinator that was started again does not take its shards back from a newer cluster.
        take_over = not adopted and not ray.get_runtime_context().was_current_actor_reconstructed
        for handle in set(found.values()) - set(adopted.values()):
            kill(handle)
        self._watchers = [
            Watcher(
                name,
                store=store,
                processes=self._processes,
                cluster=self._cluster,
                take_over=take_over,
                options=partial(self._shard_options, store, index),
            )
            for index, name in enumerate(before.names)
        ]
        for watcher in self._watchers:
            watcher.start(adopted.get(watcher.shard))
        self._spares = asyncio.create_task(self._processes.keep(self._calm))
        self._snapshots = asyncio.create_task(self._start_snapshotter(before))

    def _owners(
        self, store: MemoryStore, before: ShardMap | None, found: dict[str, Handle]
    ) -> dict[str, Handle]:
        """Which of the living processes that an earlier coordinator has started is which shard."""
        owners = {name: read_owner(store, name) for name in (before.names if before else ())}
        return {
            shard: found[owner.incarnation]
            for shard, owner in owners.items()
            if owner is not None and owner.incarnation in found
        }

    def _calm(self) -> bool:
        return all(watcher.state == "ready" for watcher in self._watchers)

    def _hand_over(self, current: ShardMap) -> None:
        folder = Path(self._config.journal_dir)
        hand_over(folder, lambda key: shard_name(current.owner_of(key)), Journal)

    async def _start_snapshotter(self, current: ShardMap) -> None:
        """Once the shards serve: a backup can wait, and its libraries take a second to load."""
        await asyncio.wait([watcher.first for watcher in self._watchers])
        from actors.snapshotter import SnapshotOptions, SnapshotterActor

        options = SnapshotOptions(
            target=self._config.snapshots,
            interval_s=self._config.snapshot_interval_s,
            shards=tuple(current.names),
            store=self._config.store,
            namespace=NAMESPACE,
        )
        SnapshotterActor.options(
            name=SNAPSHOTTER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(options)

    async def _shard_options(self, store: MemoryStore, index: int, epoch: int) -> ShardOptions:
        """Records the claimed epoch in the map, and says what the shard is started with."""
        async with self._map_lock:
            self._map = await asyncio.to_thread(record_epoch, store, index, epoch)
        config, buckets = self._config, self._map.buckets_of(index)
        keeper = KeeperOptions(
            model=str(config.model_folder),
            store_url=config.store,
            journal_dir=config.journal_dir,
            shard=shard_name(index),
            epoch=epoch,
            buckets=buckets,
            slots=config.slots,
            mode=config.mode,
            rule=config.rule,
            spec_overrides=dict(config.spec),
            persist_tokens=config.persist_tokens,
            idle_flush_s=config.idle_flush_s,
            consolidate_after_s=config.consolidate_after_s,
            queue_max=config.queue_max,
            durability=config.durability,
            replicate_interval_s=config.replicate_interval_s,
            snapshots_url=config.snapshots,
            sync_timeout_s=config.sync_timeout_s,
            unconfirmed_s=config.unconfirmed_s,
            seed=config.seed,
        )
        return ShardOptions(
            keeper=keeper,
            buckets=buckets,
            map_version=self._map.version,
            open_keeper=config.keeper,
            set_up="cluster.telemetry:configure",
            otlp_endpoint=config.otlp_endpoint,
        )


CoordinatorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Coordinator)


def ensure(config: Config) -> Handle:
    """The coordinator of this Ray cluster; started with `config` if there is none yet."""
    cluster = ray.get_runtime_context().get_session_name()
    return CoordinatorActor.options(
        name=COORDINATOR, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, resources=HEAD
    ).remote(config, cluster)
