"""`ShardProcess`, the Ray actor: a process that can become any shard, and is one from then on.

What takes long when a shard starts is the same for every shard: a process, its libraries, θ_F. So the coordinator
keeps a process in which all that is done, and one that is told to `become` a shard serves almost at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ray

from actors.options import ShardOptions
from actors.shard import CALLS_MAX, MemoryShard, method, resolve
from titanmem.errors import ModelFolderError

log = logging.getLogger(__name__)

NAME_PREFIX = "process-"
"""Of the names of these actors; the ownership record of a shard says which one it is."""


class ShardProcess(MemoryShard):
    """A spare until `become`, and the shard from then on; no second time."""

    def __init__(self) -> None:
        """Nothing is known yet; `become` calls the shard's own."""
        self._shard, self._state, self._chats = "no shard", "spare", {}
        self._keeper = self._loop = None
        self._early_cancels = OrderedDict()

    @method(concurrency_group="admin")
    async def warm(self, open_keeper: str, model: str) -> None:
        """Loads what any shard needs. `open_keeper` as in `ShardOptions`, `model` as in `KeeperOptions`."""
        await asyncio.to_thread(resolve, open_keeper)
        await asyncio.to_thread(_load, Path(model))

    async def become(self, options: ShardOptions) -> dict[str, Any]:
        """Opens the shard; returns `ping`. Raises what keeps it shut."""
        assert self._state == "spare", f"this process is {self._shard} already"
        MemoryShard.__init__(self, options)
        return await self.open()

    def _about(self) -> dict[str, Any]:
        return {"state": "spare", "pid": os.getpid()} if self._state == "spare" else super()._about()


def _load(model: Path) -> None:
    """θ_F once, and lets it go: what torch imports for it stays, and the file is in memory for the next time."""
    from titanmem.folder import load_decoder
    from titanmem.tokenizer import ChatTokenizer

    try:
        load_decoder(model)
        ChatTokenizer(model)
    except ModelFolderError as error:  # the shard's own start says so where somebody listens
        log.warning("%s", error)


ShardActor: Any = ray.remote(  # pyright: ignore[reportCallIssue]: its stubs lack concurrency_groups
    num_cpus=0,
    max_restarts=0,
    max_task_retries=0,
    max_concurrency=CALLS_MAX,
    concurrency_groups={"admin": 64, "health": 256},
)(ShardProcess)
