"""The whole server on a real Redis: killed with -9 under load and started again, and users who hop between hosts.

One server is told facts while its Redis dies and comes back; then every process of it is killed, and another server,
with a journal folder of its own, answers from the same Redis. The second one waits for the store (`sync`).
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

from storage.titanmem import decode
from tests.servers import RedisServer, redis_server
from tests.system.facts import FACTS, Said, Talk, right, shown
from tests.system.server import Server

# Signals, not threads: a test that hangs must still end the processes that it has started.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600, method="signal")]

USERS = tuple(f"u{n}" for n in range(4))
TOLD = {user: FACTS[n :: len(USERS)] for n, user in enumerate(USERS)}
AWAY_S, LOAD_S, SOON_S = 6.0, 2.0, 90.0
NOTE = "The proofs of the book are at the printer's, and the meeting is on Thursday.\n" * 4
OPTIONS = {
    "TITANMEM_IDLE_FLUSH_S": "1",
    "TITANMEM_PERSIST_TOKENS": "256",
    "TITANMEM_CONSOLIDATE_AFTER_S": "0",
}


@dataclass
class Load:
    """Users who talk and read until they are told to stop; what was acknowledged to each, and what went wrong."""

    url: str
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(USERS, 0))
    answers: int = 0
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._live, args=(user,)) for user in USERS]
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
                        said = ingest(self.url, user, f"{user}-{number}")
                        assert said["duplicates"] == 0, said
                        self.tokens[user] += said["tokens"]
                    else:
                        self.tokens[user] += talk.say(user, "It is a fine day.", max_tokens=8).total_tokens
                except Exception as error:
                    self.problems.append(f"{user}: {type(error).__name__}: {error}")
                self.answers += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)


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


def all_stored(server: Server) -> bool:
    """Whether the newest version of everybody is stored; asked seldom, since to ask is to keep a user awake."""
    time.sleep(2.5)
    seen = [memory(server, user) for user in USERS]
    return all(figures["stored_version"] == figures["memory_version"] for figures in seen)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Outage:
    """What was seen while Redis was away, and after."""

    load: Load
    before: dict[str, int]
    after: dict[str, dict[str, Any]]
    reason: str
    figures: dict[str, float]
    bytes: tuple[float, float, float]
    """Of the journal: before the outage, at its end, and when everything was stored."""
    waiting: list[int]
    """Of each user: updates that only the journal had, at its end."""
    said: str
    exported: dict[str, bytes]


@pytest.fixture(scope="module")
def outage(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    """Facts are told, Redis is killed under load and comes back, everything is stored; then the server is killed."""
    server = Server(tmp_path_factory.mktemp("one"), store=redis.url("memories"), **OPTIONS)
    try:
        server.start()
        with Talk(server.url) as talk:
            talk.tell(TOLD)
        before = {user: memory(server, user)["tokens_seen"] for user in USERS}
        began_bytes = metric(server, "titan:journal_bytes")
        assert readiness(server) == {"ready": True}
        with Load(server.url) as load:
            time.sleep(LOAD_S)
            redis.kill()
            time.sleep(AWAY_S)
            until(lambda: metric(server, "titan:store_errors_total") > 0)
            reason = readiness(server).get("reason", "")
            names = ("titan:store_errors_total", "titan:store_away_seconds")
            figures = {name: metric(server, name) for name in names}
            full_bytes = metric(server, "titan:journal_bytes")
            waiting = [(seen := memory(server, u))["memory_version"] - seen["stored_version"] for u in USERS]
            redis.start()
            time.sleep(LOAD_S)
        until(lambda: "reason" not in readiness(server))
        until(lambda: all_stored(server))
        after = {user: memory(server, user) for user in USERS}
        exported = {
            user: httpx.get(
                f"{server.url}/v1/memories/{user}/export", timeout=SOON_S, trust_env=False
            ).content
            for user in USERS
        }
        end_bytes = metric(server, "titan:journal_bytes")
        server.kill()
        yield Outage(
            load=load, before=before, after=after, reason=reason, figures=figures, said=server.said(),
            bytes=(began_bytes, full_bytes, end_bytes), exported=exported, waiting=waiting,
        )  # fmt: skip
    finally:
        server.close()


@pytest.fixture(scope="module")
def host(outage: Outage, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another server, with a journal folder of its own, on the same Redis; its answers wait for the store."""
    more = {"TITANMEM_DURABILITY": "sync", "TITANMEM_SYNC_TIMEOUT_S": "2", **OPTIONS}
    server = Server(tmp_path_factory.mktemp("two"), store=redis.url("memories"), **more)
    try:
        server.start()
        yield server
    finally:
        server.close()


def test_nobody_sees_that_the_store_is_away(outage: Outage) -> None:
    assert outage.load.problems == []
    assert outage.load.answers > 2 * len(USERS)


def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(outage: Outage) -> None:
    grown = {user: outage.after[user]["tokens_seen"] - outage.before[user] for user in USERS}
    assert grown == outage.load.tokens


def test_readiness_metrics_and_one_line_of_the_log_say_why(outage: Outage) -> None:
    assert re.fullmatch(
        r"the store redis://\S+: reads( and writes)? fail, for \d+ s; the log says why", outage.reason
    )
    assert outage.figures["titan:store_away_seconds"] > 0
    assert outage.figures["titan:store_errors_total"] > 0
    began, full, end = outage.bytes
    assert full >= began
    assert end <= full
    assert any(outage.waiting), "what is told meanwhile is in the journal alone"
    assert len(re.findall("fails; until it answers, what is told stays in the journal", outage.said)) == 1, (
        outage.said
    )
    assert len(re.findall(r"answers again, after \d+ s", outage.said)) == 1, outage.said
    others = [line for line in outage.said.splitlines() if re.search(r"(?i)error|warning|traceback", line)]
    assert len(others) <= 2, outage.said


def test_whoever_hops_to_another_host_is_known_there(outage: Outage, host: Server) -> None:
    with Talk(host.url) as talk:
        for user in USERS:
            seen = memory(host, user)
            assert seen["tokens_seen"] == outage.after[user]["tokens_seen"], user
            there = httpx.get(
                f"{host.url}/v1/memories/{user}/export", timeout=SOON_S, trust_env=False
            ).content
            one, two = decode(outage.exported[user], name="one"), decode(there, name="two")
            assert one.nonzero_idx.tobytes() == two.nonzero_idx.tobytes()
            assert one.theta_val.tobytes() == two.theta_val.tobytes()
        answers = talk.ask(TOLD)
    counts = [len(right(TOLD[user], answers[user])) for user in USERS]
    assert sum(counts) >= len(FACTS) // 2, [shown(TOLD[user], answers[user]) for user in USERS]


def test_under_sync_writes_wait_reads_go_on_and_the_same_request_is_taken_once(
    outage: Outage, host: Server, redis: RedisServer
) -> None:
    with Talk(host.url) as talk:
        ingest(host.url, "u0", "first")
        before = memory(host, "u0")["tokens_seen"]
        redis.kill()
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                talk.say("u0", "My boat is called Argo.", max_tokens=8)
            assert (caught.value.status_code, caught.value.code) in [
                (503, "not_replicated"), (503, "store_unavailable"),
            ]  # fmt: skip
            with pytest.raises(RuntimeError, match=r"503 (not_replicated|store_unavailable)"):
                ingest(host.url, "u0", "second")
            read_only = {"titan": {"memory": "read_only"}}
            answers: list[Said] = [talk.say("u0", f.question, extra_body=read_only) for f in TOLD["u0"]]
            assert right(TOLD["u0"], answers), shown(TOLD["u0"], answers)
            assert memory(host, "u0")["tokens_seen"] > before
        finally:
            redis.start()
        until(lambda: "reason" not in readiness(host))
        waited = memory(host, "u0")["tokens_seen"]
        assert ingest(host.url, "u0", "second")["duplicates"] == 1
        assert memory(host, "u0")["tokens_seen"] == waited, "it was taken the first time"
