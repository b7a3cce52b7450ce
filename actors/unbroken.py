"""Work that comes to its end although whoever waits for it does not wait any longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which comes to its end even if whoever waits for it is cancelled meanwhile.

    A user's turn lasts as long: else a thread would fold or store what the next turn is changing already.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            logger.warning("what was cancelled has failed, too: %s", error)
        raise
