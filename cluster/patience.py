"""How long a request waits for a shard that is away, and how often it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 0.5
OUTAGE_S = 60.0
"""A request waits so long for a shard that is away; the start of one with a large model takes its time."""

assert PAUSE_MIN_S < PAUSE_MAX_S < OUTAGE_S, "a request must get to ask more than once"


class Patience:
    """Of one request: `request_s` in all, and `outage_s` from the first time that its shard was away."""

    def __init__(self, outage_s: float, request_s: float, clock: Callable[[], float]) -> None:
        self.outage_s = outage_s
        self._clock = clock
        self._end = clock() + request_s
        self._outage_end: float | None = None
        self._pause_s = PAUSE_MIN_S

    def left_s(self) -> float:
        return max(0.0, self._end - self._clock())

    async def pause(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> bool:
        """Waits a little, longer each time; False at once when patience is at its end."""
        now = self._clock()
        if self._outage_end is None:
            self._outage_end = min(now + self.outage_s, self._end)
        if now + self._pause_s > self._outage_end:
            return False
        await sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        return True
