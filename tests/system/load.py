"""Users who talk and read without a pause, and what a server says of itself meanwhile."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.system.facts import Talk
from tests.system.server import Server

SOON_S = 90.0
NOTE = "The proofs of the book are at the printer's, and the meeting is on Thursday.\n" * 4


@dataclass
class Load:
    """Users who talk and read until they are told to stop; what was acknowledged to each, and what went wrong."""

    url: str
    users: Sequence[str]
    tokens: dict[str, int] = field(default_factory=dict)
    waits: list[tuple[float, float]] = field(default_factory=list)
    """Of each answer: when it was asked for (monotonic), and how long it took, in seconds."""
    problems: list[str] = field(default_factory=list)
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self.tokens = dict.fromkeys(self.users, 0)
        self._threads = [threading.Thread(target=self._live, args=(user,)) for user in self.users]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SOON_S)
            assert not thread.is_alive()

    def _live(self, user: str) -> None:
        with Talk(self.url) as talk:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                began = time.monotonic()
                try:
                    if number % 2:
                        said = ingest(self.url, user, f"{self.name}-{number}")
                        assert said["duplicates"] == 0, said
                        self.tokens[user] += said["tokens"]
                    else:
                        self.tokens[user] += talk.say(user, "It is a fine day.", max_tokens=8).total_tokens
                except Exception as error:
                    self.problems.append(f"{user}: {type(error).__name__}: {error}")
                self.waits.append((began, time.monotonic() - began))


def ingest(url: str, user: str, name: str) -> dict[str, Any]:
    answer = httpx.post(
        f"{url}/v1/memories/{user}/ingest", content=NOTE, headers={"Idempotency-Key": name}, timeout=SOON_S,
        trust_env=False,
    )  # fmt: skip
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code} {answer.json()['error']['code']}")
    return answer.json()


def memory(server: Server, user: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/v1/memories/{user}", timeout=SOON_S) as answer:
        return json.load(answer)


def readiness(server: Server) -> dict[str, Any]:
    """What `/readyz` says; it says it with 200."""
    with urllib.request.urlopen(f"{server.url}/readyz", timeout=SOON_S) as answer:
        return json.load(answer)


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=SOON_S) as answer:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.2)


def all_stored(server: Server, users: Sequence[str]) -> bool:
    """Whether the newest version of everybody is stored; asked seldom, since to ask is to keep a user awake."""
    time.sleep(2.5)
    seen = [memory(server, user) for user in users]
    return all(figures["stored_version"] == figures["memory_version"] for figures in seen)
