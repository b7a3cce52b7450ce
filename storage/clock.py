"""Wall clocks. They date things for people and for erasure; the order of writes is that of epochs and chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

TICK = timedelta(microseconds=1)


def utc_now() -> datetime:
    return datetime.now(UTC)


class SteadyClock:
    """`clock`, but each answer is later than the one before: when it is set back, time stands almost still."""

    def __init__(self, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._last: datetime | None = None

    def __call__(self) -> datetime:
        with self._lock:
            now = self._clock()
            if self._last is not None and now <= self._last:
                now = self._last + TICK
            self._last = now
            return now
