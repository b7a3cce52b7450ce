"""The memory routes, and documents streamed into a memory, against a served door."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from cluster.ingest import CALL_TOKENS, PIECES_AT_ONCE
from storage.errors import StoreUnavailable
from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX
from tests.cluster.fake_backend import (
    FILE_MAGIC,
    QueueFull,
    eventually,
    quick_client,
    serving,
    tiny_tokenizer,
)
from titanmem.tokenizer import ChatTokenizer

U1 = UserKey("local", "u1")
BOOK = "It was the key under the mat; my dog, called Rex, knew naïve 中文.\n\n" * 2400
"""Some 80,000 tokens: several calls of several pieces."""


@pytest.fixture(scope="module")
def served():
    with serving(ingest_patience_s=0.5) as door:
        yield door


@pytest.fixture
def backend(served):
    served.backend.reset()
    return served.backend


@pytest.fixture(scope="module")
def http(served):
    with quick_client(base_url=served.url) as client:
        yield client


def ingest(http, text, user="u1", **headers):
    data = text.encode() if isinstance(text, str) else text
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.post(
        f"/v1/memories/{user}/ingest", content=data, headers={"Content-Type": "text/plain", **named}
    )


def tokens_of(backend):
    return np.concatenate([call.tokens for call in backend.ingests]).tolist()


def test_a_document_arrives_whole_in_pieces_of_one_context(http, backend):
    reply = ingest(http, BOOK, Idempotency_Key="book-1").json()
    calls = backend.ingests
    assert tokens_of(backend) == tiny_tokenizer().encode(BOOK).tolist()
    assert [len(call.tokens) for call in calls[:-1]] == [CALL_TOKENS] * (len(calls) - 1)
    assert len(calls) > 3
    pieces = [piece for call in calls for piece in call.pieces().items()]
    assert [name for name, _ in pieces] == [f"book-1:{n}" for n in range(len(pieces))]
    assert [len(tokens) for _, tokens in pieces[:-1]] == [SEGMENT_TOKENS_MAX] * (len(pieces) - 1)
    assert [call.last for call in calls] == [False] * (len(calls) - 1) + [True]
    assert {call.conversation for call in calls} == {"book-1"}
    assert {call.key for call in calls} == {U1}
    total = sum(len(call.tokens) for call in calls)
    assert reply["tokens"] == total
    assert reply["chunks"] == sum(-(-len(call.tokens) // 256) for call in calls)
    assert reply["written_share"] == pytest.approx(0.25, abs=0.01)
    assert reply["memory_version"] == reply["pieces"] == len(pieces)
    assert reply["duplicates"] == 0


@pytest.mark.parametrize("size", [1, 7, 1000, 65536])
def test_pieces_do_not_depend_on_how_the_text_arrives(http, backend, size):
    data = BOOK[: 40 if size == 1 else 100_000].encode()
    ingest(http, (data[at : at + size] for at in range(0, len(data), size)), Idempotency_Key="b")
    cut = [call.tokens.tolist() for call in backend.ingests]
    assert tokens_of(backend) == tiny_tokenizer().encode(data.decode()).tolist()
    ingest(http, data, Idempotency_Key="whole")
    assert [call.tokens.tolist() for call in backend.ingests[len(cut) :]] == cut


def test_the_same_document_again_writes_nothing_twice(http, backend):
    first = ingest(http, BOOK, Idempotency_Key="book-1").json()
    again = ingest(http, BOOK, Idempotency_Key="book-1").json()
    assert again == {**first, "duplicates": first["pieces"]}
    assert backend.memories[U1].version == first["pieces"]
    other = ingest(http, BOOK).json()
    assert other["duplicates"] == 0
    assert other["idempotency_key"].startswith("ingest-")


def test_a_document_of_exactly_one_call_is_its_last(http, backend):
    text = "z" * CALL_TOKENS
    for count, more in ((1, ""), (2, " b c d e f")):
        backend.ingests.clear()
        ingest(http, text + more)
        assert [call.last for call in backend.ingests] == [False] * (count - 1) + [True]
        assert len(backend.ingests[0].tokens) == CALL_TOKENS


def test_the_conversation_may_be_named(http, backend):
    ingest(http, "My dog is Rex.", X_Titan_Conversation="diary", Idempotency_Key="k")
    assert backend.ingests[0].conversation == "diary"
    assert ingest(http, "x", X_Titan_Conversation="c" * 257).status_code == 400


@pytest.mark.parametrize("bad", [b"\xff and more", "中".encode()[:2]], ids=["wrong", "cut"])
def test_invalid_utf8_names_its_byte_and_keeps_what_was_acknowledged(http, backend, bad):
    good, kept = BOOK.encode(), set()
    for size in (999, 10**6):
        backend.reset()
        data = good + bad
        reply = ingest(http, (data[at : at + size] for at in range(0, len(data), size)))
        error = reply.json()["error"]
        assert reply.status_code == 400
        assert error["code"] == "invalid_utf8"
        assert f"offset {len(good)} " in error["message"]
        kept.add(len(tokens_of(backend)))
        assert f"{len(tokens_of(backend))} tokens before it are in the memory" in error["message"]
    assert len(kept) == 1, "what is kept depends on the text, not on how it arrived"
    assert kept.pop() >= 2 * CALL_TOKENS


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf"])
def test_an_empty_document_is_refused(http, backend, body):
    reply = ingest(http, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "empty_document")


def test_a_byte_order_mark_is_not_text(http, backend):
    ingest(http, b"\xef\xbb\xbfHello")
    assert tokens_of(backend) == tiny_tokenizer().encode("Hello").tolist()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/pdf"},
        {"Content-Type": "text/plain; charset=iso-8859-1"},
        {"Content-Encoding": "gzip"},
    ],
)
def test_what_says_that_it_is_no_plain_text_is_not_written(http, backend, headers):
    reply = http.post("/v1/memories/u1/ingest", content=b"--x", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_media_type")
    assert backend.ingests == []


def test_curls_default_type_is_taken(http, backend):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert http.post("/v1/memories/u1/ingest", content=b"Hello", headers=headers).status_code == 200


def test_a_full_queue_refuses_a_new_document_and_makes_one_that_has_begun_wait(http, backend):
    backend.failures.append(QueueFull("the queue", 2.0))
    reply = ingest(http, "Hello")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    assert backend.ingests == []

    original, calls = backend.ingest, []

    async def full_at_times(call):
        calls.append(call.first)
        if len(calls) in (2, 3):
            raise QueueFull("the queue", 0.05)
        return await original(call)

    backend.ingest = full_at_times
    reply = ingest(http, BOOK, Idempotency_Key="k")
    assert reply.status_code == 200
    assert calls[:5] == [0, 4, 4, 4, 8]
    assert tokens_of(backend) == tiny_tokenizer().encode(BOOK).tolist()

    async def always_full(call):
        if call.first == 0:
            return await original(call)
        raise QueueFull("the queue", 0.2)

    backend.ingest = always_full
    assert ingest(http, BOOK).status_code == 429, "patience ends"


def test_a_failure_in_the_middle_has_its_status_and_a_retry_goes_on(http, backend):
    original, calls = backend.ingest, []

    async def fails_once(call):
        calls.append(call.update_id)
        if len(calls) == 3:
            raise StoreUnavailable("the store is away")
        return await original(call)

    backend.ingest = fails_once
    assert ingest(http, BOOK, Idempotency_Key="k").status_code == 503
    again = ingest(http, BOOK, Idempotency_Key="k").json()
    assert again["duplicates"] == 2 * PIECES_AT_ONCE
    assert again["tokens"] == len(tiny_tokenizer().encode(BOOK))
    assert backend.memories[U1].version == again["pieces"]


def test_parts_are_written_one_at_a_time_while_others_are_cut_and_none_after_one_that_failed(
    http, backend, monkeypatch
):
    original, encode, cut, begun, running = backend.ingest, ChatTokenizer.encode, [], [], []

    def counted(self, text, **options):
        ids = encode(self, text, **options)
        cut.append(len(ids))
        return ids

    async def one_by_one(call):
        begun.append(call.first)
        running.append(call)
        assert len(running) == 1
        if call.first == 0:
            assert await asyncio.to_thread(eventually, lambda: sum(cut) >= 4 * CALL_TOKENS)
        await asyncio.sleep(0.02)
        running.pop()
        if call.first == 2 * PIECES_AT_ONCE:
            raise StoreUnavailable("the store is away")
        return await original(call)

    monkeypatch.setattr(ChatTokenizer, "encode", counted)
    backend.ingest = one_by_one
    assert ingest(http, BOOK).status_code == 503
    assert begun == [0, PIECES_AT_ONCE, 2 * PIECES_AT_ONCE]


def test_pieces_are_written_while_the_document_still_arrives_and_memory_stays_bounded(http, backend):
    gate = threading.Event()

    def slowly():
        yield BOOK.encode()
        assert eventually(lambda: len(backend.ingests) >= 3), "the door waits for the end of the document"
        gate.set()
        yield b"the end"

    assert ingest(http, slowly()).status_code == 200
    assert gate.is_set()


def test_a_client_that_goes_away_in_the_middle_leaves_what_was_acknowledged(served, http, backend):
    sent, full = threading.Event(), (len(tiny_tokenizer().encode(BOOK)) - 1) // CALL_TOKENS

    def breaks_off():
        yield BOOK.encode()
        assert eventually(lambda: len(backend.ingests) >= full > 3)  # nothing is on its way that comes later
        sent.set()
        raise ConnectionError("the client dies")

    with pytest.raises(ConnectionError):
        ingest(http, breaks_off(), Idempotency_Key="k")
    assert sent.is_set()
    known = PIECES_AT_ONCE * len(backend.ingests)
    assert backend.memories[U1].version == known
    assert not any(call.last for call in backend.ingests)
    assert ingest(http, BOOK, Idempotency_Key="k").json()["duplicates"] >= known - PIECES_AT_ONCE


def test_a_memory_can_be_looked_at_pinned_and_rolled_back(http, backend):
    for text in ("one", "two", "three"):
        ingest(http, text)
    assert http.get("/v1/memories/u1").json() == {
        "user": "u1", "memory_version": 3, "shard": "shard-0", "frozen": False,
    }  # fmt: skip
    assert http.put("/v1/memories/u1/pin").json() == {"user": "u1", "version": 3, "pinned": True}
    versions = http.get("/v1/memories/u1/versions").json()
    assert [row["version"] for row in versions["versions"]] == [3, 2, 1]
    assert [row["pinned"] for row in versions["versions"]] == [True, False, False]
    assert http.post("/v1/memories/u1/rollback").json()["from"] == 2
    assert http.post("/v1/memories/u1/rollback", json={"to": 1}).json()["from"] == 1
    assert backend.memories[U1].told == ["one"]
    missing = http.post("/v1/memories/u1/rollback", json={"to": 99})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_memory")


def test_a_memory_travels_as_a_file(http, backend):
    ingest(http, "My dog is Rex.")
    reply = http.get("/v1/memories/u1/export")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"] == 'attachment; filename="u1.titanmem"'
    assert reply.content == FILE_MAGIC + b'["My dog is Rex."]'
    assert http.put("/v1/memories/u2/import", content=reply.content).json() == {
        "user": "u2",
        "memory_version": 1,
    }
    assert backend.memories[UserKey("local", "u2")].told == ["My dog is Rex."]


def test_an_import_over_the_limit_is_413(backend):
    with serving(import_bytes_max=2048) as door, quick_client() as http:
        reply = http.put(f"{door.url}/v1/memories/u1/import", content=b"x" * 2049)
        assert reply.status_code == 413
        assert door.backend.memories == {}


def test_forgetting_gives_a_receipt_and_the_user_is_gone(http, backend):
    ingest(http, "My dog is Rex.")
    assert http.delete("/v1/memories/u1").json() == {"user": "u1", "erased": ["HEAD"], "epoch": 1}
    assert http.get("/v1/memories/u1").status_code == 410
    assert http.get("/v1/memories/nobody").status_code == 404


def test_users_are_listed_in_pages(http, backend):
    for name in ("bob", "alice", "carol"):
        ingest(http, "x", user=name)
    names = [row["user"] for row in http.get("/v1/memories").json()["users"]]
    assert names == ["alice", "bob", "carol"]
    page = http.get("/v1/memories?limit=2").json()
    assert ([row["user"] for row in page["users"]], page["next"]) == (["alice", "bob"], "bob")
    page = http.get("/v1/memories?limit=2&after=bob").json()
    assert ([row["user"] for row in page["users"]], page["next"]) == (["carol"], None)


def test_the_operators_routes(http, backend):
    assert http.get("/admin/shards").json()["shards"][0]["shard"] == "shard-0"
    assert http.post("/admin/shards/scale", json={"shards": 3}).json() == {"shards": 3}
    assert backend.scaled == [3]
    assert http.post("/admin/shards/shard-0/drain").json() == {"shard": "shard-0", "moved": 0}
    assert http.post("/admin/snapshots").json()["target"] is None
    reply = http.post("/admin/snapshots", content=json.dumps({"target": "file:///b"}))
    assert reply.json()["target"] == "file:///b"


def test_health(http, backend):
    assert http.get("/livez").status_code == 200
    assert http.get("/readyz").json() == {"ready": True}
    backend.ready = (True, "the store is away")
    reply = http.get("/readyz")
    assert (reply.status_code, reply.json()) == (200, {"ready": True, "reason": "the store is away"})
    backend.ready = (False, "draining")
    reply = http.get("/readyz")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert (reply.json()["ready"], reply.json()["reason"]) == (False, "draining")
    assert reply.json()["error"]["code"] == "not_ready"
    assert http.get("/livez").status_code == 200


def test_the_console_is_one_file_that_loads_nothing(http):
    reply = http.get("/console")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    page = reply.text
    assert not any(mark in page for mark in ("http://", "https://", "//cdn", "src=", "@import", "<link"))
    assert "innerHTML" not in page, "names of users are text, never markup"
    for route in ("/admin/shards", "/v1/memories", "/readyz", "/metrics"):
        assert route in page
    assert http.get("/", follow_redirects=False).headers["location"] == "/console"
