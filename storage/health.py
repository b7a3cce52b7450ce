"""Whether a store answers, learned from the calls that are made anyway: one line in the log an outage, however many
requests meet it, and the reason for `/readyz` and the metrics."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from storage.errors import StoreError, StoreUnavailable
from storage.objects import ObjectInfo, Objects

QUIET_S = 3.0
"""An outage is over when a call succeeds and none has failed for so long: a store that takes every other call has one
outage, not many."""
STALE_S = 60.0
"""A kind of call that failed and was not made again for so long says nothing any more."""

Kind = Literal["read", "write"]
_log = logging.getLogger(__name__)


class Health:
    """Of the store `url`, as this process sees it. May be used from any thread.

    Reads and writes are told apart: a disk that is full, or a bucket whose keys may not write, still reads.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._clock, self._lock = url, clock, threading.Lock()
        self._failed_at_s: dict[Kind, float] = {}
        self._since_s = self._last_s = 0.0
        self._over_s = -math.inf
        self.problem = ""
        """Why calls fail, from the first that did until they succeed again; empty while all is well."""

    def now_s(self) -> float:
        """This clock, which says when a call began."""
        return self._clock()

    def failed(self, kind: Kind, error: StoreUnavailable, began_s: float) -> None:
        """A call that began at `began_s` had no success, for all its attempts."""
        with self._lock:
            if began_s < self._over_s:  # it waited through an outage that is over, and begins no new one
                return
            self._last_s = self._failed_at_s[kind] = self._clock()
            begins = not self.problem
            if begins:
                self._since_s, self.problem = self._last_s, str(error)
        if begins:
            _log.error("%s fails; until it answers, what is told stays in the journal: %s", self._url, error)

    def answered(self, kind: Kind) -> None:
        """A call had an answer, whatever it was."""
        if not self.problem:
            return
        with self._lock:
            now = self._clock()
            self._failed_at_s.pop(kind, None)
            for other, at_s in list(self._failed_at_s.items()):
                if now - at_s > STALE_S:
                    del self._failed_at_s[other]
            if not self.problem or self._failed_at_s or now - self._last_s < QUIET_S:
                return
            self.problem, lasted_s, self._over_s = "", now - self._since_s, now
        _log.warning("%s answers again, after %.0f s", self._url, lasted_s)

    def summary(self) -> str:
        """The same in a few words that name no user, for whoever may ask; empty while all is well."""
        with self._lock:
            if not self.problem:
                return ""
            kinds = " and ".join(f"{kind}s" for kind in ("read", "write") if kind in self._failed_at_s)
            fail = f"{kinds} fail" if kinds else "it has failed a moment ago"
            return (
                f"the store {self._url}: {fail}, for {self._clock() - self._since_s:.0f} s; the log says why"
            )

    def away_s(self) -> float:
        """Seconds since the outage began that goes on; 0 while all is well."""
        with self._lock:
            return self._clock() - self._since_s if self.problem else 0.0


@functools.cache
def health_of(url: str) -> Health:
    """The one of this process: all who use a store learn of it together, and its log has one line."""
    return Health(url)


class Watched:
    """`Objects` whose calls are noted in `health`. A listing is noted when it ends."""

    def __init__(self, objects: Objects, health: Health) -> None:
        self._objects, self._health, self.url = objects, health, objects.url

    def get(self, name: str) -> tuple[bytes, str] | None:
        with self._noting("read"):
            return self._objects.get(name)

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        with self._noting("write"):
            return self._objects.put(name, data, if_tag=if_tag, if_absent=if_absent)

    def put_file(self, name: str, path: Path) -> None:
        with self._noting("write"):
            self._objects.put_file(name, path)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        with self._noting("read"):
            return self._objects.get_range(name, start, length)

    def open_read(self, name: str) -> BinaryIO:
        with self._noting("read"):
            return self._objects.open_read(name)

    def delete(self, name: str) -> None:
        with self._noting("write"):
            self._objects.delete(name)

    def sweep(self, prefix: str = "", *, older_than_s: float, replaced: bool = False) -> list[str]:
        with self._noting("write"):
            return self._objects.sweep(prefix, older_than_s=older_than_s, replaced=replaced)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._noting("read"):
            yield from self._objects.list(prefix)

    def probe(self) -> None:
        self._objects.probe()

    @contextlib.contextmanager
    def _noting(self, kind: Kind) -> Iterator[None]:
        began_s = self._health.now_s()
        try:
            yield
        except StoreUnavailable as error:
            self._health.failed(kind, error, began_s)
            raise
        except (StoreError, FileNotFoundError):  # a refusal is an answer
            self._health.answered(kind)
            raise
        self._health.answered(kind)
