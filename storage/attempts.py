"""How often, and how patiently, a store on the network is asked again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """A request is tried `most` times, and no more once `budget_s` has passed since the first."""

    most: int = 5
    budget_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def __iter__(self) -> Iterator[int]:
        """Numbers of attempts, with pauses between them that grow and differ from client to client."""
        deadline = self.clock() + self.budget_s
        for attempt in range(self.most):
            if attempt:
                self.sleep(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt) * (0.5 + self.jitter() / 2))
                if self.clock() > deadline:
                    return
            yield attempt
