"""Trying again while a server is busy, starting or away: only for requests that may be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cluster.client_errors import ClientError, ConnectionLost, NoServer, Refused

WAIT_MIN_S = 0.25
WAIT_MAX_S = 10.0
BUSY = (408, 429, 503)
"""408 says that the body stopped arriving: this machine slept, or the network did."""

T = TypeVar("T")


def may_pass(error: Refused) -> bool:
    """Whether the same request may succeed later: the server is busy, or it was not ours that answered.

    Our own errors carry a code. A 5xx without one is a proxy's, or of a process that is being stopped.
    """
    return error.status in BUSY or (error.status >= 500 and not error.code)


def retrying(
    call: Callable[[], T],
    *,
    for_s: float,
    give_up_on: tuple[type[ClientError], ...] = (),
    on_wait: Callable[[ClientError, float], None] = lambda _error, _wait_s: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """What `call` returns; tried again while the server is busy, starting or away, for `for_s` seconds.

    Only for calls that may be repeated. 429 and 503 wait as `Retry-After` says; a lost connection backs off.
    `on_wait` hears of each error and of the wait before the next try.
    """
    ends = clock() + for_s
    backoff_s = WAIT_MIN_S
    while True:
        try:
            return call()
        except (NoServer, ConnectionLost) as error:
            if isinstance(error, give_up_on):
                raise
            failed, wait_s = error, backoff_s
        except Refused as error:
            if not may_pass(error):
                raise
            failed, wait_s = error, max(error.retry_after_s, WAIT_MIN_S)
        backoff_s = min(2 * backoff_s, WAIT_MAX_S)
        if clock() + wait_s > ends:
            raise failed
        on_wait(failed, wait_s)
        sleep(wait_s)
