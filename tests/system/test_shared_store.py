"""The whole server on a real Redis: killed with -9 under load and started again, and users who hop between hosts.

One server is told facts while its Redis dies and comes back; then every process of it is killed, and another server,
with a journal folder of its own, answers from the same Redis. The second one waits for the store (`sync`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from actors.handover import wait_until_free
from actors.options import journal_path
from storage.journal import Journal
from storage.names import UserKey
from storage.titanmem import decode
from tests.actors.traces import Traces, in_folder, in_redis
from tests.servers import RedisServer, redis_server
from tests.system.facts import FACTS, Said, Talk, right, shown
from tests.system.load import SOON_S, Load, all_stored, ingest, memory, metric, readiness, until
from tests.system.server import Server

# Signals, not threads: a test that hangs must still end the processes that it has started.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600, method="signal")]

USERS = tuple(f"u{n}" for n in range(4))
TOLD = {user: FACTS[n :: len(USERS)] for n, user in enumerate(USERS)}
AWAY_S, LOAD_S = 6.0, 2.0
OPTIONS: dict[str, Any] = {
    "TITANMEM_IDLE_FLUSH_S": "1",
    "TITANMEM_PERSIST_TOKENS": "256",
    "TITANMEM_CONSOLIDATE_AFTER_S": "0",
}


def export(server: Server, user: str) -> bytes:
    """A user's `.titanmem` file, over HTTP."""
    return httpx.get(f"{server.url}/v1/memories/{user}/export", timeout=SOON_S, trust_env=False).content


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
    bytes: tuple[float, float]
    """Of the journal: before the outage, and at its end."""
    waiting: list[int]
    """Of each user: updates that only the journal had, at its end."""
    log: list[str]
    journals: Path
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
        with Load(server.url, USERS) as load:
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
        until(lambda: all_stored(server, USERS))
        for user in USERS:  # the version after the next one lets go of what the outage has left
            load.tokens[user] += ingest(server.url, user, "afterwards")["tokens"]
        until(lambda: all_stored(server, USERS))
        after = {user: memory(server, user) for user in USERS}
        exported = {user: export(server, user) for user in USERS}
        log = server.logged()
        server.kill()
        yield Outage(
            load=load, before=before, after=after, reason=reason, figures=figures, log=log, journals=server.journals,
            bytes=(began_bytes, full_bytes), exported=exported, waiting=waiting,
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
    assert len(outage.load.waits) > 2 * len(USERS)


def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(outage: Outage) -> None:
    grown = {user: outage.after[user]["tokens_seen"] - outage.before[user] for user in USERS}
    assert grown == outage.load.tokens


def test_the_journal_is_trimmed_when_the_store_is_back(outage: Outage) -> None:
    path = journal_path(outage.journals, "shard-0")
    wait_until_free(path)  # a process that was killed takes a moment to be gone
    journal = Journal(path)
    try:
        assert [len(journal.pending(UserKey("local", user))) for user in USERS] == [1] * len(USERS)
    finally:
        journal.close()


def test_readiness_metrics_and_one_line_of_the_log_say_why(outage: Outage) -> None:
    assert re.fullmatch(
        r"the store redis://\S+: reads( and writes)? fail, for \d+ s; the log says why", outage.reason
    )
    assert outage.figures["titan:store_away_seconds"] > 0
    assert outage.figures["titan:store_errors_total"] > 0
    began, full = outage.bytes
    assert full >= began
    assert any(outage.waiting), "what is told meanwhile is in the journal alone"
    begins, ends = [line for line in outage.log if "redis" in line.lower()]
    assert "fails; until it answers, what is told stays in the journal" in begins
    assert re.search(r"answers again, after \d+ s", ends)


def test_whoever_hops_to_another_host_is_known_there(outage: Outage, host: Server) -> None:
    with Talk(host.url) as talk:
        for user in USERS:
            seen = memory(host, user)
            assert seen["tokens_seen"] == outage.after[user]["tokens_seen"], user
            one = decode(outage.exported[user], name="one")
            two = decode(export(host, user), name="two")
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


def test_whoever_is_erased_leaves_nothing_in_redis_nor_in_the_journal(
    outage: Outage, host: Server, redis: RedisServer
) -> None:
    erased, kept = (Traces(key=UserKey("local", user)) for user in ("u1", "u2"))
    for traces in (erased, kept):
        ingest(host.url, traces.key.user, "a note before the end")
        until(lambda user=traces.key.user: all_stored(host, [user]))
        traces.rests(export(host, traces.key.user), "the newest version")
    # Both have read the same note: what says nothing of one alone is not looked for.
    erased.needles = {
        label: it for label, it in erased.needles.items() if it not in kept.needles.values()
    }  # fmt: skip

    def places() -> Iterator[tuple[str, bytes]]:
        yield from in_redis(redis, (erased.key,))
        yield from ((f"journal {name}", data) for name, data in in_folder(host.journals))

    before = erased.found(places())
    assert "name" in before
    assert len(before) > 2, "what is looked for was there"
    answer = httpx.delete(f"{host.url}/v1/memories/u1", timeout=SOON_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert erased.found(places()) == {}
    assert len(kept.found(places())) > 2
    assert httpx.get(f"{host.url}/v1/memories/u1", timeout=SOON_S, trust_env=False).status_code == 404
    assert memory(host, "u2")["tokens_seen"] > 0
