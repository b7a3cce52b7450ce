"""What the product promises, told once from end to end on real processes, with one shard and with two.

Facts are told and a book is read; every process is killed with -9 in the middle of another; a new start on the same
store and journals knows all that was acknowledged. Then bad input, a trace, backups, Ctrl-C, and a restore after the
loss of the disk. The stages are fixtures of `conftest.py`; a test looks at what a stage has left.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.system.bad_input import BAD
from tests.system.collector import Received
from tests.system.facts import FACTS, HIDDEN, HIDDEN_RIGHT_MIN, MODEL, RIGHT_MIN, Said, Talk, right, shown
from tests.system.server import run
from tests.system.world import Backups, Crash, World, succeeded

# Signals, not threads: a test that hangs must still end the processes that it has started.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900, method="signal")]

CLIENT_SPAN = "b7ad6b7169203331"

one_shard = pytest.mark.parametrize("world", [1], indirect=True, ids=["one-shard"])


# -- before the crash ------------------------------------------------------------------------------------------


def test_the_example_asks_for_what_it_tells() -> None:
    assert len(FACTS) == 20
    for fact in FACTS + HIDDEN:
        assert fact.known_in(fact.statement), fact
        assert not fact.known_in(fact.question), fact


def test_facts_are_told_in_chat(world: World, told: dict[str, list[Said]]) -> None:
    for user, answers in told.items():
        assert len(answers) == len(world.told[user])
        assert all(answer.text.strip() for answer in answers), answers
        versions = [answer.titan["memory_version"] for answer in answers]
        assert versions == sorted(set(versions)), "each message makes a new version"
        assert all(answer.titan["tokens_written"] > 0 for answer in answers), answers
        assert all(answer.titan["surprise"] > 0 for answer in answers), answers
        assert world.memory(user)["memory_version"] >= versions[-1]


def test_users_are_spread_over_all_shards(world: World, told: object) -> None:
    shards = httpx.get(f"{world.server.url}/admin/shards", timeout=60, trust_env=False).json()["shards"]
    names = {f"shard-{n}" for n in range(world.shards)}
    assert {shard["shard"] for shard in shards} == names
    assert {shard["state"] for shard in shards} == {"ready"}
    assert {world.memory(user)["shard"] for user in world.told} == names


def test_a_document_is_read(world: World, read: dict[str, Any]) -> None:
    assert read["files"] == 1
    assert 10_000 < read["tokens"] < 30_000, "60,000 characters of English"
    assert read["chunks"] >= read["tokens"] // 256
    assert 0 < read["tokens_written"] < read["tokens"]
    assert read["written_share"] == pytest.approx(read["tokens_written"] / read["tokens"], abs=1e-6)
    assert read["memory_version"] > 0
    assert read["tokens_per_s"] == pytest.approx(read["tokens"] / read["seconds"], rel=0.01)


# -- the crash and after ---------------------------------------------------------------------------------------


def test_the_crash_comes_in_the_middle_and_the_client_says_how_to_go_on(world: World, crash: Crash) -> None:
    assert crash.killed >= 5 + world.shards, "Ray's daemons, coordinator, door and shards among them"
    assert crash.code == 1
    found = re.fullmatch(r"(.*); (\d+)% of second\.txt is acknowledged and kept; .*\n", crash.said)
    assert found, crash.said
    assert 0 < int(found[2]) < 100


def test_everything_acknowledged_is_there_again(crash: Crash, returned: dict[str, int]) -> None:
    assert returned["u1"] >= crash.during > crash.before["u1"]
    for user, tokens in crash.before.items():
        assert returned[user] >= tokens, user


def test_facts_come_back_in_new_conversations(world: World, asked: dict[str, list[Said]]) -> None:
    told, read = asked["u1"][: len(FACTS)], asked["u1"][len(FACTS) :]
    assert len(right(FACTS, told)) >= RIGHT_MIN, shown(FACTS, told)
    assert len(right(HIDDEN, read)) >= HIDDEN_RIGHT_MIN, shown(HIDDEN, read)
    by_chance = right(FACTS + HIDDEN, asked["u2"])
    assert len(by_chance) <= 1, shown(FACTS + HIDDEN, asked["u2"])
    others = [user for user in world.told if user != "u1"]
    counts = [len(right(world.told[user], asked[user])) for user in others]
    assert sum(counts) >= RIGHT_MIN * bool(others), [shown(world.told[user], asked[user]) for user in others]


def test_the_same_ingest_goes_on_where_it_broke_off(
    world: World, crash: Crash, returned: dict[str, int], asked: object
) -> None:
    file, before = world.document("second.txt"), world.memory("u1")["tokens_seen"]
    ended = run(*world.ingest(file))
    assert ended.code == 0, ended.err
    known = re.search(r"^(\d+) of (\d+) pieces had been acknowledged before$", ended.err, re.MULTILINE)
    assert known, ended.err
    assert 1 <= int(known[1]) < int(known[2])
    in_first_run = returned["u1"] - crash.before["u1"]
    in_second_run = world.memory("u1")["tokens_seen"] - before
    assert in_first_run + in_second_run == json.loads(ended.out)["tokens"], "each token once"


def test_an_idempotency_key_is_written_once(world: World, asked: object) -> None:
    before = world.memory("u1")["tokens_seen"]
    again = world.ingest_note()
    assert again["duplicates"] == again["pieces"] == 1
    assert again["tokens"] > 0
    assert world.memory("u1")["tokens_seen"] == before, "it was acknowledged before the crash"


# -- the server that runs now ----------------------------------------------------------------------------------


@one_shard
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(world: World, asked: object, name: str) -> None:
    bad, before = BAD[name], world.memory("u1")
    body = bad.body if isinstance(bad.body, bytes) else bad.body(world.export())
    with httpx.Client(base_url=world.server.url, timeout=120, trust_env=False) as client:
        answer = client.request(bad.method, bad.path, content=body, headers=dict(bad.headers))
    assert answer.status_code == bad.status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == bad.code
    assert bad.says in error["message"]
    assert len(error["message"]) < 1000
    assert world.memory("u1") == before


@one_shard
def test_openai_clients_read_the_errors(world: World, asked: object) -> None:
    with Talk(world.server.url) as talk:
        with pytest.raises(openai.BadRequestError, match="the message is empty") as caught:
            talk.say("u1", "")
        assert caught.value.param == "messages[0].content"
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            talk._client.chat.completions.create(
                model="gpt-9", messages=[{"role": "user", "content": "Hello."}], user="u1"
            )


@one_shard
def test_facts_are_known_after_bad_input(world: World, asked: dict[str, list[Said]]) -> None:
    some = right(FACTS, asked["u1"][: len(FACTS)])[:3]
    with Talk(world.server.url) as talk:
        answers = talk.ask({"u1": some})["u1"]
    assert len(right(some, answers)) >= 2, shown(some, answers)


def traced(world: World, path: str, names: set[str], **request: Any) -> list[Received]:
    """The spans of one request of u7, which comes with a trace of its client."""
    trace = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}
    answer = httpx.post(f"{world.server.url}{path}", headers=headers, timeout=120, trust_env=False, **request)
    assert answer.status_code == 200, answer.text
    spans = world.collector.wait(trace, CLIENT_SPAN, names, timeout_s=30)
    assert {span.name for span in spans} >= names
    [first] = [span for span in spans if span.parent == CLIENT_SPAN]
    assert first.instance == "door"
    rest = [span for span in spans if span is not first]
    assert {span.instance for span in rest} == {"shard-0"}
    assert {span.parent for span in rest} <= {span.span for span in spans}, "a span stands apart"
    return [first, *rest]


@one_shard
def test_one_trace_goes_from_http_to_the_journal(world: World, asked: object) -> None:
    body = {"model": MODEL, "user": "u7", "messages": [{"role": "user", "content": "My car is a Volvo."}]}
    names = {"chat", "shard chat", "search_memory", "update_memory", "journal"}
    spans = traced(world, "/v1/chat/completions", names, json=body)
    assert spans[0].name == "chat"
    assert [span.name for span in spans if span.parent == spans[0].span] == ["shard chat"]
    assert not any("Volvo" in value for span in spans for value in span.attributes.values()), "no content"


@one_shard
def test_one_trace_goes_from_http_to_the_store(world: World, asked: object) -> None:
    text = Path(world.document("first.txt")).read_bytes()[:24_000]
    names = {"update_memory", "shard ingest", "journal", "store"}
    spans = traced(world, "/v1/memories/u7/ingest", names, content=text)
    assert spans[0].name == "update_memory"
    assert {span.name for span in spans if span.parent == spans[0].span} == {"shard ingest"}


@one_shard
def test_snapshots_are_whole(world: World, backups: Backups) -> None:
    for url, made in backups.snapshots.items():
        report = succeeded("snapshot", "verify", made["id"], "--target", url, "--json")
        assert report["ok"]
        listed = succeeded("snapshot", "list", "--target", url, "--json")["snapshots"]
        assert [row["id"] for row in listed] == [made["id"]]
        assert len(listed[0]["parts"]) == world.shards
        assert listed[0]["users"] == report["users"] >= 2


# -- its end, and the loss of the disk -------------------------------------------------------------------------


def test_ctrl_c_drains(world: World, stopped: int) -> None:
    assert stopped == 0, world.server.said()
    assert world.server.processes() == []


@one_shard
def test_a_snapshot_brings_everything_back(
    world: World, asked: dict[str, list[Said]], backups: Backups, restored: dict[str, Any]
) -> None:
    assert restored["ok"]
    memory = world.exported()
    assert np.array_equal(memory.nonzero_idx, backups.memory.nonzero_idx)
    assert np.array_equal(memory.theta_val.view(np.uint16), backups.memory.theta_val.view(np.uint16))
    assert len(memory.nonzero_idx) > 0
    assert world.memory("u1")["tokens_seen"] == backups.tokens_seen
    with Talk(world.server.url) as talk:
        answers = talk.ask({"u1": FACTS})["u1"]
    assert len(right(FACTS, answers)) >= RIGHT_MIN, shown(FACTS, answers)


@one_shard
def test_the_restored_server_ends_by_ctrl_c(world: World, restored: object) -> None:
    assert world.server.stop() == 0, world.server.said()
    assert world.server.processes() == []
