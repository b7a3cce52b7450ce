"""`Snapshotter`, the Ray actor of the cold backup: every so often, and when it is asked.

Each shard writes its own part, straight to the target; the first one adds θ_F. The manifest, which makes the
parts a snapshot, comes last: a job that is cut off leaves nothing that a restore would take. `begun.json` says that it
has begun, and with which shards: the schedule goes on with it, and parts that are there are not made again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.errors import ShardNotOpen
from actors.ownership import read_owner
from storage.errors import SnapshotError, TitanmemError
from storage.header import write_time
from storage.objects import Objects, open_objects
from storage.records import decode_record, encode_record
from storage.snapshot import PartInfo, commit_manifest, list_snapshots, new_snapshot_id, prune
from storage.snapshot_erase import erase_marked
from storage.snapshot_manifest import BEGUN, check_snapshot_id
from storage.store import open_store

PART_TIMEOUT_S = 3 * 3600.0
PART_TRIES_MAX = 5
PART_PAUSE_S = 5.0
"""A shard that is started again is asked again."""
FAILED_PAUSE_S = 600.0
"""After a scheduled snapshot that failed; the operator sees the age grow in the metrics."""
RESUME_AGE_S = 6 * 3600.0
"""An interrupted one that is older is begun anew: what its parts hold is too old for a backup of today."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotOptions:
    """What the snapshotter is started with."""

    target: str
    """URL where snapshots go unless somebody asks for another place."""
    interval_s: float
    """Seconds between two scheduled snapshots; 0 = on demand only."""
    shards: tuple[str, ...]
    """Names of the shard actors."""
    namespace: str
    """Ray namespace of the shard actors."""
    store: str = ""
    """URL of the store, whose ownership records say which actor is which shard."""


class Snapshotter:
    """One at a time: a request that comes while a snapshot is being made waits for its own."""

    def __init__(
        self,
        options: SnapshotOptions,
        shard: Callable[[str], Any] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`shard` finds a shard's handle by name; tests put their own there, and a clock."""
        self._options = options
        self._shard = shard or self._find
        self._now = now
        self._sleep = sleep
        self._one = asyncio.Lock()
        self._error = ""
        self._task = asyncio.get_running_loop().create_task(self._schedule()) if options.interval_s else None

    async def create(self, target: str | None = None) -> dict[str, Any]:
        """Makes a snapshot at `target` (default: the configured one); its manifest as a record.

        Raises `SnapshotError` when a shard cannot give its part, and what the target says.
        """
        url = target or self._options.target
        try:
            objects = open_objects(url)
        except ValueError as error:
            raise SnapshotError(f"target: {error}") from None
        async with self._one:
            return await self._make(objects, url, new_snapshot_id(self._now()), self._now())

    async def _make(self, objects: Objects, url: str, snapshot_id: str, started: datetime) -> dict[str, Any]:
        """Parts that are not there yet, and the manifest."""
        shards = list(self._options.shards)
        begun = encode_record({"shards": shards, "started": write_time(started)})
        await asyncio.to_thread(objects.put, f"{snapshot_id}/{BEGUN}", begun)
        parts = await asyncio.gather(
            *(self._part(name, snapshot_id, url, n == 0) for n, name in enumerate(shards))
        )
        base = next((part["base"] for part in parts if part.get("base")), "")
        infos = [PartInfo.from_dict({k: v for k, v in part.items() if k != "base"}) for part in parts]
        manifest = await asyncio.to_thread(
            commit_manifest, objects, snapshot_id, infos, created_at=started, base=base,
            extra={"finished_at": write_time(self._now())},
        )  # fmt: skip
        await asyncio.to_thread(objects.delete, f"{snapshot_id}/{BEGUN}")
        self._error = ""
        log.info("snapshot %s: %d users, %d bytes", snapshot_id, manifest.users, manifest.bytes)
        return {**manifest.to_dict(), "target": objects.url}

    def _unfinished(self, objects: Objects) -> tuple[str, datetime] | None:
        """The newest snapshot that these very shards have begun, not finished, and may go on with."""
        names = {info.name for info in objects.list()}
        for name in sorted((name for name in names if name.endswith(f"/{BEGUN}")), reverse=True):
            folder = name.removesuffix(f"/{BEGUN}")
            found = objects.get(name)
            if found is None or f"{folder}/manifest.json" in names:
                continue
            try:
                record = decode_record(found[0], name)
                started = datetime.fromisoformat(record["started"])
                is_ours = record["shards"] == list(self._options.shards)
            except (TitanmemError, KeyError, ValueError, TypeError) as error:
                log.warning("not gone on with: %s", error)
                continue
            if is_ours and self._age_s(started) < RESUME_AGE_S:
                return check_snapshot_id(folder), started
        return None

    async def _scheduled(self, objects: Objects, *, resumes: bool) -> None:
        """Make a snapshot, or go on with one that was interrupted; with `resumes`, only that."""
        async with self._one:
            found = await asyncio.to_thread(self._unfinished, objects)
            if found is not None:
                log.info("snapshot %s is gone on with", found[0])
            if found is not None or not resumes:
                snapshot_id, started = found or (new_snapshot_id(self._now()), self._now())
                await self._make(objects, self._options.target, snapshot_id, started)

    async def metrics(self) -> bytes:
        """Prometheus text: the age of the newest snapshot at the configured target."""
        manifests = await asyncio.to_thread(list_snapshots, open_objects(self._options.target))
        text = (
            "# HELP titan:snapshot_age_seconds Seconds since the newest cold backup was begun.\n"
            "# TYPE titan:snapshot_age_seconds gauge\n"
        )
        if manifests:
            text += f"titan:snapshot_age_seconds {self._age_s(manifests[0].created_at):.0f}\n"
        return text.encode()

    async def _part(self, name: str, snapshot_id: str, url: str, include_model: bool) -> dict[str, Any]:
        for attempt in range(1, PART_TRIES_MAX + 1):
            try:
                handle = await asyncio.to_thread(self._shard, name)
                call = handle.snapshot_part.remote(snapshot_id, url, include_model)
                async with asyncio.timeout(PART_TIMEOUT_S):
                    return await _result(call)
            except (RayActorError, ValueError, ShardNotOpen) as error:
                why = f"{type(error).__name__}: {error}"
            except RayTaskError as error:
                if not isinstance(error.cause, ShardNotOpen):
                    raise error.cause if isinstance(error.cause, TitanmemError) else error from None
                why = str(error.cause)
            except TimeoutError:
                raise SnapshotError(f"{snapshot_id}: {name} took over {PART_TIMEOUT_S:g} s") from None
            log.warning("%s: %s gave no part (%s), try %d", snapshot_id, name, why, attempt)
            await self._sleep(PART_PAUSE_S)
        raise SnapshotError(f"{snapshot_id}: {name} gave no part in {PART_TRIES_MAX} tries: {why}")

    def _find(self, shard: str) -> Any:
        owner = read_owner(open_store(self._options.store), shard)
        return ray.get_actor(owner.incarnation if owner else shard, namespace=self._options.namespace)

    async def _schedule(self) -> None:
        """Sleeps until a snapshot is due, counted from the newest there is: a restart does not put it off. One that was
        interrupted is due at once."""
        while True:
            try:
                objects = open_objects(self._options.target)
                resumes = await asyncio.to_thread(self._unfinished, objects) is not None
                if not resumes:
                    manifests = await asyncio.to_thread(list_snapshots, objects)
                    age_s = self._age_s(manifests[0].created_at) if manifests else 0.0
                    await self._sleep(max(0.0, self._options.interval_s - age_s))
                await self._scheduled(objects, resumes=resumes)
                await asyncio.to_thread(prune, objects, now=self._now())
                await asyncio.to_thread(erase_marked, objects, now=self._now())
            except Exception as error:
                self._error = f"{type(error).__name__}: {error}"
                log.error("the scheduled snapshot failed: %s", self._error)
                await self._sleep(min(FAILED_PAUSE_S, self._options.interval_s))

    def _age_s(self, moment: datetime) -> float:
        return max(0.0, (self._now() - moment).total_seconds())


async def _result(call: Any) -> Any:
    return await call


SnapshotterActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Snapshotter)
