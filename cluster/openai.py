"""OpenAI's chat completions as records: what a request may hold, and the objects that answer it.

Field names are OpenAI's (API reference, "Chat"); `titan` is ours. Unknown fields are ignored, as OpenAI does;
values of a wrong type are refused and named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from actors.messages import DoneEvent, MemoryAccess
from cluster.errors import BadRequest
from storage.errors import shorten

STOPS_MAX = 16
STOP_CHARS_MAX = 256
CONVERSATION_CHARS_MAX = 256
SEED_MAX = 2**63 - 1
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that a request may use, and what the chat template calls them."""
MAY_BE_EMPTY = frozenset({"assistant"})
"""A reply may have been empty, and a client sends it again with the history."""


def _text(value: Any) -> Any:
    """Content as one text: it comes as a string, as text parts, or as null for nothing."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, index) for index, part in enumerate(value))
    return value


def _part(part: Any, index: int) -> str:
    if not isinstance(part, dict):
        raise PydanticCustomError("part", "part {index} must be an object with a text", {"index": index})
    kind = part.get("type", "text")
    if kind != "text":
        shown = {"index": index, "kind": shorten(kind, 32)}
        raise PydanticCustomError("part", "part {index} has type {kind}, and only text is read", shown)
    if not isinstance(part.get("text"), str):
        raise PydanticCustomError("part", "part {index} has no text", {"index": index})
    return part["text"]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Lenient(BaseModel):
    """Unknown fields are ignored; a number is a number and a text is a text."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Message(Lenient):
    """One message of a conversation."""

    role: str
    content: Annotated[str, BeforeValidator(_text)] = ""


class StreamOptions(Lenient):
    """How a stream ends."""

    include_usage: bool | None = None


class TitanOptions(Lenient):
    """Our extension of a request."""

    mode: str | None = None
    """How memory meets attention; must be what the server runs."""
    memory: Literal["read_write", "read_only", "off"] | None = None
    conversation: str | None = Field(default=None, max_length=CONVERSATION_CHARS_MAX)
    """Names the conversation, where the messages alone do not tell it from another."""


class ChatRequest(Lenient):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1)
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-SEED_MAX - 1, le=SEED_MAX)
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = Field(default=None, max_length=STOPS_MAX)
    n: int | None = Field(default=None, ge=1)
    titan: TitanOptions | None = None

    @property
    def access(self) -> MemoryAccess:
        return (self.titan.memory if self.titan else None) or "read_write"

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_chat(body: dict[str, Any], *, messages_max: int, tokens_max: int) -> ChatRequest:
    """The request of a parsed body. Raises `BadRequest` that names the first wrong field."""
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _first_wrong(error) from None
    if request.n is not None and request.n > 1:
        message = f"n: {request.n} choices were asked for; this server gives one."
        raise BadRequest(message, "n", "unsupported_value")
    if len(request.messages) > messages_max:
        count = len(request.messages)
        raise BadRequest(f"messages: {count} messages, and at most {messages_max} are taken.", "messages")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    for field in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, field)
        if value is not None and value > tokens_max:
            raise BadRequest(f"{field}: {value} is over {tokens_max}, the most for one reply.", field)
    for index, stop in enumerate(request.stop or ()):
        if not 1 <= len(stop) <= STOP_CHARS_MAX:
            raise BadRequest(f"stop: each has 1 to {STOP_CHARS_MAX} characters.", f"stop[{index}]")
    return request


def _check_message(message: Message, where: str) -> None:
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        shown = shorten(message.role, 32)
        raise BadRequest(f"{where}.role: {shown!r} is none of {known}.", f"{where}.role")
    if not message.content.strip() and message.role not in MAY_BE_EMPTY:
        raise BadRequest(f"{where}.content: the message is empty.", f"{where}.content", "empty_message")


def _first_wrong(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in first["loc"]))
    return BadRequest(f"{param}: {first['msg']}.", param, _CODES.get(first["type"], "invalid_value"))


_CODES = {"missing": "missing_required_parameter"} | dict.fromkeys(
    ("string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type", "model_type", "part"),
    "invalid_type",
)
"""What pydantic calls an error, and what OpenAI does; everything else is a value out of range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Names of one answer, and the OpenAI objects that it is made of."""

    id: str
    model: str
    created: int
    """Seconds since 1970."""
    include_usage: bool = False

    def whole(self, text: str, done: DoneEvent) -> dict[str, Any]:
        """The answer without a stream."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(done)}
        head = self._head("chat.completion")
        return {**head, "choices": [choice], "usage": usage(done), "titan": titan(done)}

    def first_chunk(self) -> dict[str, Any]:
        """Says who speaks; comes with the first token, not before."""
        return self._chunk({"role": "assistant", "content": ""})

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def last_chunks(self, done: DoneEvent) -> list[dict[str, Any]]:
        """Why the reply ended and what the memory did; then the usage, if it was asked for."""
        last = {**self._chunk({}, finish_reason(done)), "titan": titan(done)}
        if not self.include_usage:
            return [last]
        head = self._head("chat.completion.chunk")
        return [last, {**head, "choices": [], "usage": usage(done), "titan": titan(done)}]

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def finish_reason(done: DoneEvent) -> str:
    """OpenAI knows no `cancelled`; nobody is there to read it anyway."""
    return "stop" if done.finish_reason == "cancelled" else done.finish_reason


def usage(done: DoneEvent) -> dict[str, int]:
    total = done.prompt_tokens + done.completion_tokens
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": total,
    }


def titan(done: DoneEvent) -> dict[str, Any]:
    """Our extension of an answer."""
    said = {
        "memory": done.memory,
        "memory_version": done.memory_version,
        "tokens_written": done.tokens_written,
        "surprise": done.surprise,
    }
    return {**said, "frozen": True} if done.frozen else said


def model_object(model: str, created: int) -> dict[str, Any]:
    """One entry of `GET /v1/models`."""
    return {"id": model, "object": "model", "created": created, "owned_by": "titanmem"}
