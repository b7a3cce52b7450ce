"""Processes for shards: new ones, and spares that have loaded what takes long, one or more on each node.

A start from nothing takes as long as Python, Ray and torch take to load. So when a shard's process has died, a
spare on the same node becomes the shard; the next spare is made when everything serves again. A spare holds no GPU
of Ray's: its shard's one is free, and nothing else asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.process import NAME_PREFIX, ShardActor
from cluster.handles import FIND_TIMEOUT_S, NAMESPACE, Handle, ask

REFILL_INTERVAL_S = 1.0
PING_TIMEOUT_S = 0.5
"""A spare has nothing to do, and one that is frozen is no help."""
WARM_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Process:
    """An actor that is to be a shard, or is one. `name` is its name in Ray, and stands in the ownership record."""

    name: str
    handle: Handle
    node: str = ""


class Processes:
    """Of one coordinator, on its event loop."""

    def __init__(
        self,
        open_keeper: str,
        model: str,
        *,
        spares: int,
        anywhere: bool,
        shards_on: Callable[[str], int] = lambda node: 0,
    ) -> None:
        """`spares`: how many on each node. `anywhere`: a shard may go on on another node than its journal's, then on
        the one with the fewest, by `shards_on(node)`: a node that is lost shall take few of them with it."""
        self._kind = open_keeper, model
        self._wanted, self._anywhere, self._shards_on = spares, anywhere, shards_on
        self._spares: list[Process] = []

    @property
    def spares(self) -> int:
        """How many stand ready."""
        return len(self._spares)

    async def take(self, node: str = "") -> Process:
        """A process for a shard that was on `node`: a spare there, or elsewhere if that may be, or a new one."""
        for spare in sorted(self._spares, key=lambda it: (it.node != node, self._shards_on(it.node))):
            if spare.node != node and not (self._anywhere and node):
                continue
            self._spares.remove(spare)
            if await _answers(spare):
                return spare
            kill(spare.handle)
        return _new(num_gpus=1)

    async def keep(self, calm: Callable[[], bool]) -> None:
        """Makes spares where they are missing, while `calm` says that nothing is more urgent; until cancelled."""
        while self._wanted:
            await asyncio.sleep(REFILL_INTERVAL_S)
            try:
                if calm():
                    await self._refill(calm)
            except (RayError, TimeoutError) as error:
                log.warning("no spare processes for now: %s: %s", type(error).__name__, error)

    def end(self) -> None:
        """Ends all spares."""
        while self._spares:
            kill(self._spares.pop().handle)

    async def _refill(self, calm: Callable[[], bool]) -> None:
        async with asyncio.timeout(FIND_TIMEOUT_S):
            nodes = await asyncio.to_thread(_nodes)
        for spare in list(self._spares):
            if not await _answers(spare, FIND_TIMEOUT_S) and spare in self._spares:
                self._spares.remove(spare)
                kill(spare.handle)
        for node in nodes:
            while calm() and sum(spare.node == node for spare in self._spares) < self._wanted:
                await self._add(node)

    async def _add(self, node: str) -> None:
        spare = _new(num_gpus=0, node=node)
        try:
            await ask(spare.handle.warm.remote(*self._kind), WARM_TIMEOUT_S)
        except BaseException:
            kill(spare.handle)
            raise
        self._spares.append(spare)


def living() -> dict[str, Handle]:
    """All processes of this Ray cluster, by name: those of an earlier coordinator. Blocking."""
    found: dict[str, Handle] = {}
    for name in ray.util.list_named_actors():
        if name.startswith(NAME_PREFIX):
            try:
                found[name] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:  # it has just ended
                continue
    return found


def kill(handle: Handle) -> None:
    ray.kill(handle, no_restart=True)


def _new(*, num_gpus: int, node: str = "") -> Process:
    name = NAME_PREFIX + uuid.uuid4().hex[:16]
    placed: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_gpus": num_gpus,
    }
    if node:
        placed["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    return Process(name, ShardActor.options(**placed).remote(), node)


def _nodes() -> list[str]:
    """Living nodes that may have shards: those with GPUs, real or logical."""
    return sorted(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) > 0)


async def _answers(spare: Process, timeout_s: float = PING_TIMEOUT_S) -> bool:
    try:
        await ask(spare.handle.ping.remote(), timeout_s)
        return True
    except (RayError, TimeoutError):
        return False
