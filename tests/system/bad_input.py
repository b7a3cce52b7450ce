"""What nobody should send, and how a server must refuse it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.system.facts import MODEL

INGEST = "/v1/memories/u1/ingest"
IMPORT = "/v1/memories/u1/import"
CHAT = "/v1/chat/completions"
PLAIN = {"Content-Type": "text/plain"}


def chat(**fields: Any) -> bytes:
    """A chat request in which only `fields` are wrong."""
    good = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hello."}]}
    return json.dumps(good | fields).encode()


def saying(content: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """One bad request: what is sent, and the status, code and words of the answer."""

    body: bytes | Callable[[bytes], bytes]
    """A function gets u1's exported memory and damages it."""
    status: int
    code: str
    says: str
    method: str = "POST"
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=dict)


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


BAD: dict[str, Bad] = {
    "broken JSON": Bad(body=chat()[:-1], status=400, code="invalid_json", says="not JSON"),
    "no object": Bad(body=b"[1]", status=400, code="invalid_json", says="one JSON object"),
    "text for a list": Bad(body=chat(messages="hi"), status=400, code="invalid_type", says="messages"),
    "number for a text": Bad(body=saying(5), status=400, code="invalid_type", says="messages[0].content"),
    "text for a number": Bad(body=chat(max_tokens="9"), status=400, code="invalid_type", says="max_tokens"),
    "empty message": Bad(body=saying(""), status=400, code="empty_message", says="messages[0].content"),
    "5 MB message": Bad(body=saying("a" * 5_000_000), status=413, code="body_too_large", says="4194304"),
    "unknown model": Bad(body=chat(model="gpt-9"), status=404, code="model_not_found", says="gpt-9"),
    "user of 10,000 characters": Bad(body=chat(user="u" * 10_000), status=400, code="invalid_name", says="user"),
    "user with ../": Bad(body=chat(user="../u1"), status=400, code="invalid_name", says="user"),
    "ingest, invalid UTF-8": Bad(
        body=b"My dog is \xff\xfe.", path=INGEST, headers=PLAIN, status=400, code="invalid_utf8", says="offset 10"
    ),
    "ingest, user of 10,000 characters": Bad(
        body=b"Hello.", path=f"/v1/memories/{'u' * 10_000}/ingest", headers=PLAIN, status=400, code="invalid_name",
        says="user",
    ),
    "ingest, user with ../": Bad(
        body=b"Hello.", path="/v1/memories/u3..%2Fu1/ingest", headers=PLAIN, status=400, code="invalid_name",
        says="user",
    ),
    "import, truncated": Bad(
        body=lambda data: data[: len(data) * 2 // 3], method="PUT", path=IMPORT, status=422, code="Truncated",
        says="the file sent",
    ),
    "import, one bit flipped": Bad(
        body=flipped, method="PUT", path=IMPORT, status=422, code="ChecksumMismatch", says="the file sent"
    ),
    "import, something else": Bad(
        body=b"My dog's name is Biscuit.", method="PUT", path=IMPORT, status=422, code="NotATitanmem",
        says="the file sent",
    ),
}  # fmt: skip
