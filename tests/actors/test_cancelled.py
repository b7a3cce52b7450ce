"""Whoever is cancelled while a memory is written or stored leaves nothing half done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from actors.keeper import MemoryKeeper, open_keeper
from actors.options import KeeperOptions
from tests.actors.crash_life import digest_of, key_of, piece
from tests.tiny_model import tiny_folder


class Slow:
    """A blocking function that says when it is called, and waits until it may go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.called, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.called.set()
        self.go_on.wait(60)
        return self._function(*arguments)


async def cancelled_in(slow: Slow, work: Awaitable[Any]) -> None:
    """Cancel `work` while it is in `slow`, and again while it ends."""
    task = asyncio.ensure_future(work)
    await asyncio.to_thread(slow.called.wait, 60)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done(), "it has the user's turn until its thread is done"
    slow.go_on.set()
    await asyncio.wait([task])
    assert task.cancelled()


async def opened(tmp_path: Path, name: str) -> MemoryKeeper:
    model = tmp_path / "model"
    if not model.exists():
        tiny_folder(model)
    return await open_keeper(
        KeeperOptions(
            model=str(model), store_url=f"file://{tmp_path}/{name}/store", journal_dir=f"{tmp_path}/{name}/journal",
            shard="shard-0", epoch=1, idle_flush_s=3600.0, spec_overrides={"surprise_threshold": 0.05},
        )
    )  # fmt: skip


async def test_a_cancelled_ingest_is_written_whole(tmp_path: Path) -> None:
    keeper = await opened(tmp_path, "undisturbed")
    for n in (1, 2, 3):
        await keeper.ingest(piece(0, 0, n))
    wanted = await digest_of(keeper, key_of(0))
    await keeper.close()
    keeper = await opened(tmp_path, "cancelled")
    await keeper.ingest(piece(0, 0, 1))
    keeper.roster.writer.fold = slow = Slow(keeper.roster.writer.fold)  # type: ignore[method-assign]
    await cancelled_in(slow, keeper.ingest(piece(0, 0, 2)))
    again = await keeper.ingest(piece(0, 0, 2))
    assert again.duplicate
    assert again.memory_version == 2
    await keeper.ingest(piece(0, 0, 3))
    assert await digest_of(keeper, key_of(0)) == wanted
    await keeper.close()


async def test_a_cancelled_store_is_known_to_have_stored(tmp_path: Path) -> None:
    keeper = await opened(tmp_path, "cancelled")
    await keeper.ingest(piece(0, 0, 1))
    keeper.roster.vault.put = slow = Slow(keeper.roster.vault.put)  # type: ignore[method-assign]
    await cancelled_in(slow, keeper.flush())
    assert await keeper.flush() == 0, "the store has it"
    assert len(keeper.roster.vault.store.versions(key_of(0))) == 1
    await keeper.close()
