"""Users of a snapshot in a few threads at once: unpacking and checksums need no lock of Python's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 4
AHEAD_MAX = 2 * THREADS
"""Items in hand at once: each is a whole memory."""


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in order; an error of either comes out where its result would have."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(THREADS, "snapshot") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= AHEAD_MAX:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
