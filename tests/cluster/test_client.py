"""The client against a transport that answers what a server, or something else on its port, would."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cluster.client import Client
from cluster.client_errors import BadAnswer, ClientError, ConnectionLost, NoServer, Refused, check_url
from cluster.commands.retry import retrying

Answer = Callable[[httpx.Request], httpx.Response]


def client(answer: Answer, key: str = "") -> Client:
    return Client("http://server:8000/", key=key, transport=httpx.MockTransport(answer))


def always(status: int, **response: object) -> Answer:
    return lambda _request: httpx.Response(status, **response)  # type: ignore[arg-type]


def events(*documents: object, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(document)}\n\n" for document in documents]
    return "".join([": comment\n\n", *lines, "data: [DONE]\n\n" if done else ""]).encode()


def delta(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


ASK: dict[str, Any] = {"user": "u1", "model": "small"}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "titan": {"memory_version": 3}}
USAGE = {"choices": [], "usage": {"total_tokens": 9}}


def test_a_reply_streams_and_keeps_its_figures() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=events(delta("He"), delta("llo"), LAST, USAGE))

    hi = [{"role": "user", "content": "hi"}]
    with (
        client(answer, key="secret-key") as server,
        server.chat(hi, conversation="c", max_tokens=5, **ASK) as stream,
    ):
        assert list(stream) == ["He", "llo"]
    assert (stream.text, stream.finish_reason) == ("Hello", "stop")
    assert stream.titan == {"memory_version": 3}
    assert stream.usage == {"total_tokens": 9}
    body = json.loads(seen[0].content)
    assert body["titan"] == {"memory": "read_write", "conversation": "c"}
    assert body["max_tokens"] == 5
    assert "temperature" not in body
    assert seen[0].headers["authorization"] == "Bearer secret-key"


def test_a_stream_without_its_end_is_a_lost_connection() -> None:
    with (
        client(always(200, content=events(delta("He"), done=False))) as server,
        server.chat([], **ASK) as stream,
        pytest.raises(ConnectionLost, match="broke off"),
    ):
        list(stream)
    assert stream.text == "He"


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    broken = events(delta("He"), {"error": {"message": "the shard died", "code": "shard_unavailable"}})
    with (
        client(always(200, content=broken)) as server,
        server.chat([], **ASK) as stream,
        pytest.raises(Refused, match="the shard died"),
    ):
        list(stream)


@pytest.mark.parametrize("data", [b"data: {\n\n", b'data: ["x"]\n\n', b'data: {"choices": 7}\n\n'])
def test_a_stream_of_something_else_is_a_bad_answer(data: bytes) -> None:
    with (
        client(always(200, content=data)) as server,
        server.chat([], **ASK) as stream,
        pytest.raises(BadAnswer),
    ):
        list(stream)


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_refused_chat_says_why(status: int) -> None:
    body = {"error": {"message": "no such model", "type": "x", "param": "model", "code": "model_not_found"}}
    with (
        client(always(status, json=body)) as server,
        pytest.raises(Refused, match="no such model") as caught,
        server.chat([], **ASK),
    ):
        pass
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        status,
        "model_not_found",
        "model",
    )


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("", 1.0), ("soon", 1.0), ("nan", 1.0), ("-3", 1.0), ("9999999", 3600.0)],
)
def test_retry_after_is_read_with_care(header: str, seconds: float) -> None:
    headers = {"Retry-After": header} if header else {}
    answer = always(429, headers=headers, content=b"<html>")
    with client(answer) as server, pytest.raises(Refused, match="429") as caught:
        server.memory("u1")
    assert caught.value.retry_after_s == seconds


def test_names_are_quoted_into_paths() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path.decode())
        return httpx.Response(200, json={"data": []})

    with client(answer) as server:
        server.memory("../a b/c?d")
        server.versions("a@b.c:d=e+f")
    assert seen == ["/v1/memories/..%2Fa%20b%2Fc%3Fd", "/v1/memories/a%40b.c%3Ad%3De%2Bf/versions"]


def test_an_ingest_carries_its_names_and_reads_its_figures() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["idempotency-key"] == "k-1"
        assert request.headers["x-titan-conversation"] == "doc"
        assert request.content == "é".encode()
        figures = {"tokens": 100, "chunks": 2, "written_share": 0.25, "memory_version": 4}
        return httpx.Response(200, json=figures)

    with client(answer) as server:
        reply = server.ingest("u1", "é".encode(), idempotency_key="k-1", conversation="doc")
    assert (reply.tokens, reply.chunks, reply.tokens_written, reply.memory_version) == (100, 2, 25, 4)


@pytest.mark.parametrize("response", [{"json": {"tokens": 1}}, {"json": ["x"]}, {"content": b"hello"}])
def test_an_answer_that_is_no_ingest_is_a_bad_answer(response: dict[str, object]) -> None:
    with client(always(200, **response)) as server, pytest.raises(BadAnswer):
        server.ingest("u1", b"x", idempotency_key="k", conversation="d")


def test_a_list_that_is_none_is_a_bad_answer() -> None:
    with client(always(200, json={"users": {}})) as server, pytest.raises(BadAnswer):
        server.users()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), NoServer),
        (httpx.ConnectTimeout("slow"), NoServer),
        (httpx.ReadTimeout("slow"), ConnectionLost),
        (httpx.ReadError(""), ConnectionLost),
        (httpx.RemoteProtocolError("half an answer"), ConnectionLost),
    ],
)
def test_network_errors_become_ours(raised: Exception, expected: type[ClientError]) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        raise raised

    with client(answer) as server:
        with pytest.raises(expected) as plain:
            server.users()
        with pytest.raises(expected), server.chat([], **ASK):
            pass
    assert "http://server:8000" in str(plain.value)
    assert type(pickle.loads(pickle.dumps(plain.value))) is expected


@pytest.mark.parametrize(
    "url", ["", "server:8000", "ftp://server", "http://", "http://a:99999999", "http://a b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        check_url(url)


@pytest.mark.parametrize("key", ["clé", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Client("http://server", key=key)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def failing(*errors: ClientError) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def busy(status: int, wait_s: float, code: str | None = "some_code") -> Refused:
    return Refused("busy", status=status, code=code, param=None, retry_after_s=wait_s)


def test_retrying_waits_as_the_server_says_and_backs_off_from_silence() -> None:
    clock, heard = Clock(), []
    call = failing(busy(429, 3.0), busy(503, 5.0), ConnectionLost("x"), NoServer("x"))
    result = retrying(
        call, for_s=60, sleep=clock.sleep, clock=lambda: clock.now_s, on_wait=lambda e, s: heard.append(s)
    )
    assert result == "done"
    assert clock.slept == [3.0, 5.0, 1.0, 2.0]
    assert heard == clock.slept


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_proxy_in_front_of_a_server_that_restarts_is_waited_for(status: int) -> None:
    clock = Clock()
    call = failing(busy(status, 1.0, code=None))
    assert retrying(call, for_s=60, sleep=clock.sleep, clock=lambda: clock.now_s) == "done"
    assert clock.slept == [1.0]


def test_retrying_ends_with_the_error_itself() -> None:
    clock = Clock()
    call = failing(*[busy(429, 4.0)] * 9)
    with pytest.raises(Refused, match="busy"):
        retrying(call, for_s=10, sleep=clock.sleep, clock=lambda: clock.now_s)
    assert clock.slept == [4.0, 4.0], "a third wait would end after the ten seconds"


@pytest.mark.parametrize("error", [busy(400, 1.0, None), busy(500, 1.0), BadAnswer("x"), NoServer("x")])
def test_what_cannot_pass_is_not_tried_again(error: ClientError) -> None:
    clock = Clock()
    with pytest.raises(type(error)):
        retrying(
            failing(error), for_s=60, give_up_on=(NoServer,), sleep=clock.sleep, clock=lambda: clock.now_s
        )
    assert clock.slept == []


def test_users_of_many_pages_are_one_list() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after", "")
        names = [name for name in ("a", "b", "c", "d", "e") if name > after][:2]
        users = [{"user": name} for name in names]
        return httpx.Response(200, json={"users": users, "next": names[-1] if names[-1] < "e" else None})

    with client(answer) as server:
        assert [row["user"] for row in server.users()] == ["a", "b", "c", "d", "e"]


def test_a_server_that_pages_in_a_circle_ends() -> None:
    with client(always(200, json={"users": [{"user": "a"}], "next": "a"})) as server:
        assert len(server.users()) == 2
