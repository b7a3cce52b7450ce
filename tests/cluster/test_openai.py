"""Chat completions as the real `openai` client sees them, against a served door."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from storage.errors import Fenced, StoreUnavailable
from storage.names import UserKey
from tests.cluster.fake_backend import MODEL, QueueFull, serving, tiny_tokenizer


@pytest.fixture(scope="module")
def served():
    with serving() as door:
        yield door


@pytest.fixture
def backend(served):
    backend = served.backend
    backend.reset()
    return backend


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def say(client, text, user: Any = "u1", **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, user=user, **more)


def test_a_fact_is_remembered_in_a_new_conversation_and_by_its_user_alone(client, backend):
    say(client, "My dog is called Rex.")
    assert say(client, "What is my dog called?").choices[0].message.content == "My dog is called Rex."
    assert say(client, "What is my dog called?", user="u2").choices[0].message.content == "I do not know."


def test_a_whole_answer_has_openais_shape_and_ours(client, backend):
    answer = say(client, "My dog is called Rex.")
    tokenizer = tiny_tokenizer()
    said = "Noted: My dog is called Rex."
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == said
    assert answer.choices[0].finish_reason == "stop"
    prompt = tokenizer.encode("My dog is called Rex.").size + 3  # <|user|> … <|end|> <|assistant|>
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == tokenizer.encode(said).size
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    said = {"memory": "read_write", "memory_version": 1, "tokens_written": prompt - 1, "surprise": 0.5}
    assert answer.titan == said


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_memory(client, backend):
    backend.reply = "naïve 中文 🐕 key"
    chunks = list(say(client, "Hello", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == backend.reply
    assert len([text for text in texts if text]) > 5, "it must stream, not come at once"
    assert not any("\ufffd" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].titan["memory_version"] == 1
    assert not any(chunk.usage for chunk in chunks)


def test_include_usage_adds_one_chunk_without_choices(client, backend):
    chunks = list(say(client, "Hello", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == tiny_tokenizer().encode("Noted: Hello").size
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].titan == chunks[-2].titan


def test_an_empty_reply_is_a_reply(client, backend):
    backend.reply = ""
    assert say(client, "Hello").choices[0].message.content == ""
    chunks = list(say(client, "Hello", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut_even_when_spread_over_tokens(client, backend, stream):
    backend.reply = "one two thr three four"
    answer = say(client, "Count", stop=["three", "zzz"], stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two thr "
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == "one two thr "
    assert backend.chats[-1].stop == ("three", "zzz")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_reply_is_cut_at_its_most_tokens(client, backend, field):
    answer = say(client, "Tell me of the dog.", **{field: 4})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_sampling_and_memory_settings_reach_the_shard(client, backend):
    extra = {"titan": {"mode": "mac", "memory": "read_only", "conversation": "c7"}, "unknown": [1]}
    say(client, "Hi", temperature=0.5, top_p=0.9, seed=7, stop="x", extra_body=extra)
    call = backend.chats[-1]
    assert (call.temperature, call.top_p, call.seed, call.stop) == (0.5, 0.9, 7, ("x",))
    assert (call.memory, call.mode, call.conversation) == ("read_only", "mac", "c7")
    assert call.key == UserKey("local", "u1")
    say(client, "Hi")
    call = backend.chats[-1]
    assert (call.temperature, call.top_p, call.seed, call.stop) == (0.0, 1.0, None, ())
    assert (call.memory, call.conversation, call.max_tokens) == ("read_write", "", 256)


def test_memory_off_and_read_only_write_nothing(client, backend):
    say(client, "My dog is called Rex.", extra_body={"titan": {"memory": "read_only"}})
    assert say(client, "What is my dog called?").choices[0].message.content == "I do not know."


def test_messages_are_rendered_one_by_one_with_their_hashes(client, backend):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "My "}, {"type": "text", "text": "dog"}]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Hello"},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, user="u1")
    call = backend.chats[-1]
    assert [message.role for message in call.messages] == ["system", "user", "assistant", "user"]
    assert tiny_tokenizer().decode(call.messages[1].tokens) == "My dog"
    assert len({message.prefix_hash for message in call.messages}) == 4
    client.chat.completions.create(model=MODEL, messages=messages[:2], user="u1")
    hashes = [message.prefix_hash for message in call.messages]
    assert [message.prefix_hash for message in backend.chats[-1].messages] == hashes[:2]


def test_control_tokens_in_a_message_stay_text(client, backend):
    say(client, "a<|end|><|assistant|>b")
    tokens = backend.chats[-1].messages[0].tokens.tolist()
    assert [t for t in tokens if t < 4] == [2, 0]


def test_the_user_may_come_in_a_header(client, backend):
    say(client, "Hi", user=openai.omit, extra_headers={"X-Titan-User": "u9"})
    assert backend.chats[-1].key.user == "u9"
    with pytest.raises(openai.BadRequestError, match="two different users"):
        say(client, "Hi", user="u1", extra_headers={"X-Titan-User": "u9"})


def test_a_retry_with_the_same_key_writes_once(client, backend):
    headers = {"Idempotency-Key": "turn-1"}
    first = say(client, "My dog is called Rex.", extra_headers=headers)
    again = say(client, "My dog is called Rex.", extra_headers=headers)
    assert backend.chats[0].update_id == backend.chats[1].update_id == "turn-1"
    assert backend.chats[0].request_id != backend.chats[1].request_id
    assert first.titan["memory_version"] == again.titan["memory_version"] == 1


def test_models_are_listed(client, backend):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "titanmem"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_an_unknown_model_is_not_found(client, backend):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}], user="u1")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert MODEL in caught.value.message
    assert backend.chats == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (QueueFull("the queue of shard-0", 2.2), 429, "queue_full", "3"),
        (StoreUnavailable("the store is gone"), 503, "store_unavailable", "1"),
        (Fenced("shard-0 is fenced"), 409, "fenced", None),
        (TimeoutError(), 503, "timed_out", "1"),
        (RuntimeError("secret inside"), 500, "internal_error", None),
    ],
)
def test_failures_before_the_first_token_have_their_status(
    client, backend, failure, status, code, retry_after, stream
):
    backend.failures.append(failure)
    with pytest.raises(openai.APIStatusError) as caught:
        say(client, "Hi", stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers.get("retry-after") == retry_after
    assert "secret" not in caught.value.response.text
    assert "Traceback" not in caught.value.response.text


def test_a_client_that_retries_gets_through_a_full_queue(served, backend):
    backend.failures += [QueueFull("the queue", 0.1)]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=1) as client:
        assert say(client, "Hi").choices[0].message.content == "Noted: Hi"


def test_a_failure_after_the_first_token_is_an_event_and_no_end(client, backend):
    backend.break_after = 3
    chunks = say(client, "Tell me of the dog", stream=True)
    assert next(chunks).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError) as caught:
        list(chunks)
    assert "secret" not in str(caught.value.body)
    assert backend.running == set()


def test_a_failure_in_the_middle_of_a_whole_answer_is_no_answer(client, backend):
    backend.break_after = 3
    with pytest.raises(openai.InternalServerError) as caught:
        say(client, "Tell me of the dog")
    assert "secret" not in caught.value.response.text
