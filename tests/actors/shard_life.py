"""A shard as it is, but for Ray, with the real keeper over a tiny model: for tests of what goes wrong around it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from actors.keeper import MemoryKeeper
from actors.messages import DoneEvent
from actors.options import KeeperOptions, ShardOptions
from actors.ownership import claim
from actors.shard import MemoryShard
from storage.names import BUCKETS
from storage.snapshot_manifest import new_snapshot_id
from storage.store import open_store
from tests.actors.test_keeper import crash

EVERY = frozenset(range(BUCKETS))
SAID = ("user", "my dog's name is Rex7.")


class Life:
    """One start of a shard with the real keeper; its calls as the door makes them."""

    def __init__(self, options: KeeperOptions) -> None:
        owner = claim(
            open_store(options.store_url), options.shard, cluster="c", incarnation="i", take_over=True
        )
        self.epoch, self.left = owner.epoch, False
        keeper = replace(options, epoch=owner.epoch)
        self.shard = MemoryShard(ShardOptions(keeper=keeper, buckets=EVERY, map_version=1), leave=self._leave)

    def _leave(self) -> None:
        self.left = True

    @property
    def keeper(self) -> MemoryKeeper:
        return self.shard._keeper

    async def chat(self, call: Any) -> DoneEvent:
        async for event in self.shard.chat(call, self.epoch):
            if isinstance(event, DoneEvent):
                return event
        raise AssertionError("a reply without an end")

    async def metric(self, name: str) -> float:
        found = re.findall(
            rf"^{name}(?:{{[^}}]*}})? (\S+)$", (await self.shard.metrics()).decode(), re.MULTILINE
        )
        return sum(map(float, found))

    async def snapshot(self, folder: Path) -> dict[str, Any]:
        id_ = new_snapshot_id(datetime.now(UTC))
        return await self.shard.snapshot_part(id_, f"file://{folder}/snapshots", False)

    async def crash(self) -> None:
        if self.shard._watch is not None:
            self.shard._watch.cancel()
        await crash(self.keeper)


@asynccontextmanager
async def living(options: KeeperOptions) -> AsyncIterator[Life]:
    """Ends as a killed process does."""
    life = Life(options)
    await life.shard.open()
    try:
        yield life
    finally:
        await life.crash()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has from WARNING on, but for what the guard says of the noise that is told here."""
    loud = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name != "actors.watch"]
    return [record.getMessage() for record in loud]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
