"""A client that goes away stops costing at once, and the first token does not wait for the second."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.cluster.fake_backend import MODEL, eventually, leave, quick_client, serving

BODY = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def served():
    with serving() as door:
        yield door


@pytest.fixture(scope="module")
def http():
    with quick_client() as client:
        yield client


@pytest.fixture
def backend(served):
    served.backend.reset()
    return served.backend


def ended(backend):
    """The reply would wait for ever for its next token: only a cancel ends it."""
    return eventually(lambda: not backend.running and len(backend.cancelled) == 1)


def test_leaving_a_stream_cancels_the_call(served, backend):
    backend.allowed, backend.reply = 5, "one two three four five six seven"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.chat.completions.create(**BODY, stream=True)
        received = [next(stream) for _ in range(4)]
        assert backend.running == {received[0].id}
        stream.close()
        assert ended(backend)
    assert backend.cancelled == [received[0].id]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("allowed", [0, 3])
def test_leaving_while_the_door_waits_for_a_token_cancels_the_call(served, backend, stream, allowed):
    backend.allowed, backend.reply = allowed, "one two three four five six seven"
    leave(served, {**BODY, "stream": stream})
    assert ended(backend)


def test_a_reply_that_ends_is_not_cancelled(served, http, backend):
    for stream in (False, True):
        reply = http.post(f"{served.url}/v1/chat/completions", json={**BODY, "stream": stream})
        assert reply.status_code == 200
    assert backend.running == set()
    assert backend.cancelled == []


def test_each_token_is_sent_before_the_next_one_is_there(served, http, backend):
    backend.allowed, backend.reply = 1, "z z z"
    texts = []
    body = {**BODY, "stream": True, "max_tokens": 3}
    with http.stream("POST", f"{served.url}/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if text:
                    texts.append(text)
                    backend.allowed += 1  # the next token exists only when this one has arrived
    assert len(texts) == 3


def test_the_last_lines_are_done(served, http, backend):
    reply = http.post(f"{served.url}/v1/chat/completions", json={**BODY, "stream": True})
    assert reply.text.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in reply.text.removesuffix("\n\n").split("\n\n"))


def test_a_reply_that_breaks_off_has_no_done(served, http, backend):
    backend.break_after = 2
    reply = http.post(f"{served.url}/v1/chat/completions", json={**BODY, "stream": True})
    assert reply.status_code == 200
    assert "[DONE]" not in reply.text
    last = json.loads(reply.text.rstrip().rpartition("data: ")[2])
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in reply.text


def test_a_shard_that_ends_without_a_word_is_an_error(served, http, backend):
    async def silent(call):
        backend.chats.append(call)
        return
        yield

    backend.chat = silent
    reply = http.post(f"{served.url}/v1/chat/completions", json=BODY)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shard_unavailable")


def test_many_clients_at_once_get_their_own_answers(served, http, backend):
    backend.pace_s = 0.002

    def ask(number):
        body = {**BODY, "user": f"u{number}", "messages": [{"role": "user", "content": f"I am {number}."}]}
        reply = http.post(f"{served.url}/v1/chat/completions", json=body)
        return reply.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(48))) == [f"Noted: I am {number}." for number in range(48)]
