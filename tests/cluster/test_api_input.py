"""Bad input gets a clear error in OpenAI's shape, and changes nothing."""

from __future__ import annotations

import json
import socket

import pytest

from storage import errors
from storage.names import UserKey
from tests.cluster.fake_backend import FILE_MAGIC, MODEL, FakeMemory, quick_client, serving

MIB = 1 << 20


@pytest.fixture(scope="module")
def served():
    with serving(messages_max=5, max_tokens_max=1000) as door:
        yield door


@pytest.fixture
def backend(served):
    served.backend.reset()
    return served.backend


@pytest.fixture(scope="module")
def http(served):
    with quick_client(base_url=served.url) as client:
        yield client


def chat(**changed):
    body = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hi"}], **changed}
    return {name: value for name, value in body.items() if value is not ...}


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def post(http, body):
    return http.post("/v1/chat/completions", json=body)


def some_memory():
    return FakeMemory(told=["x"], version=1, versions={1: ["x"]})


def message(content, role="user"):
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"model": ...}, "model"),
        ({"model": 5}, "model"),
        ({"messages": ...}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": message(None)}, "messages[0].content"),
        ({"messages": message("")}, "messages[0].content"),
        ({"messages": message(" \n")}, "messages[0].content"),
        ({"messages": message([])}, "messages[0].content"),
        ({"messages": message(5)}, "messages[0].content"),
        ({"messages": message("Hi", "tool")}, "messages[0].role"),
        ({"messages": message("Hi", "assistant|>")}, "messages[0].role"),
        ({"messages": message([{"type": "image_url"}])}, "messages[0].content"),
        ({"messages": message([{"type": "text"}])}, "messages[0].content"),
        ({"messages": message("Hi") + message("", "system")}, "messages[1].content"),
        ({"messages": message("Hi") * 6}, "messages"),
        ({"user": 5}, "user"),
        ({"user": ...}, "user"),
        ({"user": ""}, "user"),
        ({"user": "../etc"}, "user"),
        ({"user": "a/b"}, "user"),
        ({"user": "u" * 10_000}, "user"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1001}, "max_tokens"),
        ({"max_completion_tokens": 1001}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"n": 2}, "n"),
        ({"titan": "off"}, "titan"),
        ({"titan": {"memory": "maybe"}}, "titan.memory"),
        ({"titan": {"mode": "mal"}}, "titan.mode"),
        ({"titan": {"conversation": "c" * 257}}, "titan.conversation"),
    ],
)
def test_a_wrong_field_is_named(http, backend, changed, param):
    error = error_of(post(http, chat(**changed)), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert len(error["message"]) < 500
    assert backend.chats == []


def test_the_error_for_a_missing_user_says_how_to_name_one(http, backend):
    error = error_of(post(http, chat(user=...)), 400)
    assert "`user`" in error["message"]
    assert "X-Titan-User" in error["message"]


def test_what_openai_ignores_is_ignored(http, backend):
    extra = {"messages": [{"role": "user", "content": "Hi", "name": "x", "audio": 1}], "frobnicate": [1]}
    nulls = dict.fromkeys(("stream", "max_tokens", "temperature", "stop", "n", "titan", "seed"))
    assert post(http, chat(**extra, **nulls)).status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": ', "invalid_json"),
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 200_000, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "invalid_utf8"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', "invalid_unicode"),
    ],
)
def test_a_body_that_is_no_json_object_is_400(http, backend, body, code):
    error = error_of(http.post("/v1/chat/completions", content=body), 400)
    assert error["code"] == code
    assert backend.chats == []


def test_broken_json_and_utf8_are_pointed_at(http, backend):
    error = error_of(http.post("/v1/chat/completions", content=b'{"a": 1,\n "b"}'), 400)
    assert "line 2, column 5" in error["message"]
    error = error_of(http.post("/v1/chat/completions", content=b'{"a": "\xff"}'), 400)
    assert "byte 7" in error["message"]
    half = json.dumps(chat(messages=message("\ud800"))).encode()
    error = error_of(http.post("/v1/chat/completions", content=half), 400)
    assert error["param"] == "messages[0].content"


def test_whole_surrogate_pairs_are_characters(http, backend):
    body = json.dumps(chat(messages=message("a 🐕"))).encode()
    assert b"\\ud83d" in body
    reply = http.post("/v1/chat/completions", content=body)
    assert reply.json()["choices"][0]["message"]["content"] == "Noted: a 🐕"


def test_five_megabytes_in_one_message_are_413_and_leave_the_connection_usable(http, backend):
    big = chat(messages=message("x" * 5_000_000))
    error = error_of(post(http, big), 413)
    assert str(4 * MIB) in error["message"]
    assert post(http, chat()).status_code == 200
    assert len(backend.chats) == 1


def test_the_limit_counts_bytes_that_come_not_those_that_are_declared(http, backend):
    def chunks():
        for _ in range(10):
            yield b" " * MIB

    error_of(http.post("/v1/chat/completions", content=chunks()), 413)  # chunked: no length is declared
    within = json.dumps(chat()).encode().ljust(4 * MIB)
    assert http.post("/v1/chat/completions", content=iter([within])).status_code == 200
    error_of(http.post("/v1/chat/completions", content=iter([within, b" "])), 413)


def raw(served, head, body=b"", *, close=False):
    """The status line and the body of what the server says to bytes that no client library would send."""
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as link:
        link.sendall(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body)
        if close:
            link.shutdown(socket.SHUT_WR)
        received = b""
        while data := link.recv(65536):
            received += data
            if b'"error"' in received and received.endswith(b"}"):
                break
    return received


def test_a_declared_length_far_over_the_limit_is_refused_before_it_comes(served, backend):
    head = b"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Length: 99000000000"
    assert raw(served, head, b"{").startswith(b"HTTP/1.1 413 ")


def test_a_body_that_stops_coming_is_not_waited_for():
    with serving(body_idle_s_max=0.2) as door:
        head = b"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Length: 100"
        assert raw(door, head, b'{"model"').startswith(b"HTTP/1.1 408 ")
        head = b"POST /v1/memories/u1/ingest HTTP/1.1\nHost: x\nContent-Length: 100"
        assert raw(door, head, b"Once upon").startswith(b"HTTP/1.1 408 ")
        assert door.backend.memories == {}


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2fv1", "..%2Fu1%2Fversions", "u1%2Fversions", "%00", "a%20b", "%ff", "u" * 10_000],
)
@pytest.mark.parametrize(
    ("method", "rest"), [(b"GET", ""), (b"GET", "/export"), (b"DELETE", ""), (b"POST", "/ingest")]
)
def test_a_name_in_the_path_that_cannot_be_one_is_400(served, backend, name, method, rest):
    backend.memories[UserKey("local", "u1")] = some_memory()
    head = method + f" /v1/memories/{name}{rest} HTTP/1.1\nHost: x\nContent-Length: 0".encode()
    received = raw(served, head)
    assert received.startswith(b"HTTP/1.1 400 "), received[:300]
    error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert (error["param"], error["code"]) == ("user", "invalid_name")
    assert len(error["message"]) < 500, "a message never gives 10,000 characters back"
    assert backend.forgotten == set()


def test_a_name_that_only_needs_encoding_is_found(http, backend):
    backend.memories[UserKey("local", "a@b.c:d")] = some_memory()
    assert http.get("/v1/memories/a%40b.c%3Ad").json()["user"] == "a@b.c:d"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/memories/u1/nothing", 404, "unknown_url"),
        ("GET", "/v1/memories/u1/", 404, "unknown_url"),
        ("GET", "/v1/memories/", 400, "invalid_name"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PATCH", "/v1/memories/u1", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "unknown_url"),
    ],
)
def test_unknown_routes_answer_in_the_same_shape(http, backend, method, path, status, code):
    assert error_of(http.request(method, path), status)["code"] == code


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (errors.NoSuchMemory("u1 has no memory"), 404, "no_such_memory"),
        (errors.Forgotten("u1 was erased"), 410, "forgotten"),
        (errors.VersionConflict("expected 7, found 8"), 409, "version_conflict"),
        (errors.Fenced("epoch 3 is over"), 409, "fenced"),
        (errors.StoreUnavailable("no store"), 503, "store_unavailable"),
        (errors.JournalFull("no room"), 503, "journal_full"),
        (errors.JournalCorrupt("/secret/path is damaged"), 500, "internal_error"),
        (KeyError("secret"), 500, "internal_error"),
        (ValueError("secret"), 500, "internal_error"),
    ],
)
def test_what_the_cluster_says_has_a_status(http, backend, failure, status, code):
    backend.failures.append(failure)
    reply = http.get("/v1/memories/u1")
    error = error_of(reply, status)
    assert error["code"] == code
    assert "secret" not in reply.text
    assert ("retry-after" in reply.headers) == (status == 503)


FILE_ERRORS = [
    c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.BadMemoryFile)
]


@pytest.mark.parametrize("kind", FILE_ERRORS, ids=lambda kind: kind.__name__)
def test_a_bad_memory_file_is_422_with_the_rule_it_breaks(http, backend, kind):
    backend.failures.append(kind("u1.titanmem", "a rule", "this", "that"))
    error = error_of(http.put("/v1/memories/u1/import", content=b"x"), 422)
    assert error["code"] == kind.__name__
    assert "a rule" in error["message"]


def test_a_truncated_file_changes_nothing(http, backend):
    backend.memories[UserKey("local", "u1")] = some_memory()
    error_of(http.put("/v1/memories/u1/import", content=FILE_MAGIC + b'["a'), 422)
    error_of(http.put("/v1/memories/u1/import", content=b""), 422)
    assert backend.memories[UserKey("local", "u1")].told == ["x"]


def test_small_bodies_are_checked(http, backend):
    backend.memories[UserKey("local", "u1")] = some_memory()
    for body in ({"to": "1"}, {"to": 1.0}, {"to": True}, {"to": -1}):
        assert error_of(http.post("/v1/memories/u1/rollback", json=body), 400)["param"] == "to"
    for body in ({}, {"shards": 0}, {"shards": "2"}, {"shards": 10**9}):
        assert error_of(http.post("/admin/shards/scale", json=body), 400)["param"] == "shards"
    for body in ({"target": 5}, {"target": ""}, {"target": "ftp://x"}):
        assert error_of(http.post("/admin/snapshots", json=body), 400)["param"] == "target"
    error_of(http.post("/admin/shards/a.b/drain"), 400)
    error_of(http.post("/v1/memories/u1/rollback", content=b" " * 100_000), 413)
    for query in ("limit=0", "limit=x", "limit=99999"):
        assert error_of(http.get(f"/v1/memories?{query}"), 400)["param"] == "limit"
    assert backend.scaled == []


def test_an_idempotency_key_is_checked(http, backend):
    for key in ("", "k" * 201, "a\tb"):
        reply = http.post("/v1/chat/completions", json=chat(), headers={"Idempotency-Key": key})
        assert error_of(reply, 400)["param"] == "Idempotency-Key"
