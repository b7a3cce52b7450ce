"""A small typed client of our HTTP routes; what the `titanmem` command speaks to a server with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import IO, Any
from urllib.parse import quote

import httpx

from cluster.client_errors import (
    URL_DEFAULT,
    BadAnswer,
    ConnectionLost,
    Network,
    check,
    check_url,
    refused,
)
from storage.errors import shorten

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 300.0
"""Longest silence of a server that is working: a first token, or one piece of a document, on a busy CPU."""
ADMIN_TIMEOUT_S = 3600.0
"""A cold backup of a whole cluster answers when its manifest stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReply:
    """What one piece of a document did."""

    tokens: int
    chunks: int
    tokens_written: int
    memory_version: int
    known: bool = False
    """All of it had been acknowledged before; nothing was written now."""


@dataclass(slots=True)
class ChatStream:
    """One reply while it streams: iterate for its text; afterwards `titan`, `usage` and the rest stand."""

    lines: Iterable[str]
    text: str = ""
    finish_reason: str = ""
    titan: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        done = False
        for line in self.lines:
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                done = True
                break
            piece = self._take(data)
            if piece:
                self.text += piece
                yield piece
        if not done:
            raise ConnectionLost("the reply broke off: the server ended the stream without [DONE]")

    def _take(self, data: str) -> str:
        """The new text of one event; figures are kept. Raises `Refused` for an error in the stream."""
        try:
            event = json.loads(data)
            if "error" in event:
                raise refused(200, event, "")
            self.titan = event.get("titan") or self.titan
            self.usage = event.get("usage") or self.usage
            choices = event.get("choices") or [{}]
            self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
            return (choices[0].get("delta") or {}).get("content") or ""
        except (ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
            raise BadAnswer(
                f"the server sent an event that is no chat completion: {shorten(data)}"
            ) from error


class Client:
    """One server; every method raises `ClientError`. Close it, or use it in a `with`.

    `transport` replaces the network (tests).
    """

    def __init__(
        self, url: str = URL_DEFAULT, *, key: str = "", transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url = check_url(url)
        if not key.isascii() or not key.isprintable():
            raise ValueError("key: holds characters that no HTTP header may carry")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            verify=self.url.startswith("https:"),  # reading the certificates takes as long as all the rest
            trust_env=not _is_loopback(self.url),  # a proxy of the environment cannot reach our loopback
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # chat

    def models(self) -> list[str]:
        return [str(model["id"]) for model in self._json("GET", "/v1/models").get("data", [])]

    def chat(
        self,
        messages: list[dict[str, str]],
        *,
        user: str,
        model: str,
        conversation: str = "",
        memory: str = "read_write",
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> _OpenStream:
        """A context manager that gives the `ChatStream` of one reply; leaving it early cancels it."""
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "user": user,
            "stream": True,
            "stream_options": {"include_usage": True},
            "titan": {"memory": memory, "conversation": conversation},
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if temperature is not None:
            body["temperature"] = temperature
        return _OpenStream(self, body)

    # one user's memory

    def users(self) -> list[dict[str, Any]]:
        """All users of the tenant, in order of name, however many pages that takes."""
        rows: list[dict[str, Any]] = []
        after = ""
        while True:
            body = self._json("GET", "/v1/memories", params={"after": after} if after else {})
            page = _rows(body, "users")
            rows += page
            before, after = after, str(body.get("next") or "")
            if not page or after <= before:
                return rows

    def memory(self, user: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/memories/{_name(user)}")

    def ingest(self, user: str, text: bytes, *, idempotency_key: str, conversation: str) -> IngestReply:
        """Writes one piece of a document (UTF-8). The same key again changes nothing and answers the same."""
        reply = self._json(
            "POST",
            f"/v1/memories/{_name(user)}/ingest",
            content=text,
            headers={
                "Content-Type": "text/plain; charset=utf-8",
                "Idempotency-Key": idempotency_key,
                "X-Titan-Conversation": conversation,
            },
        )
        try:
            tokens = int(reply["tokens"])
            written = reply.get("tokens_written", round(tokens * float(reply["written_share"])))
            return IngestReply(
                tokens=tokens,
                chunks=int(reply["chunks"]),
                tokens_written=int(written),
                memory_version=int(reply["memory_version"]),
                known=0 < reply.get("pieces", 0) <= reply.get("duplicates", 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"{self.url}: not an answer to an ingest: {shorten(reply)}") from error

    def versions(self, user: str) -> list[dict[str, Any]]:
        return _rows(self._json("GET", f"/v1/memories/{_name(user)}/versions"), "versions")

    def rollback(self, user: str, to: int | None) -> dict[str, Any]:
        body = {} if to is None else {"to": to}
        return self._json("POST", f"/v1/memories/{_name(user)}/rollback", json=body)

    def pin(self, user: str) -> dict[str, Any]:
        return self._json("PUT", f"/v1/memories/{_name(user)}/pin")

    def export(self, user: str) -> bytes:
        with self._wrapped():
            reply = self._http.get(f"/v1/memories/{_name(user)}/export")
        check(reply)
        return reply.content

    def import_(self, user: str, data: IO[bytes]) -> dict[str, Any]:
        headers = {"Content-Type": "application/octet-stream"}
        return self._json("PUT", f"/v1/memories/{_name(user)}/import", content=data, headers=headers)

    def forget(self, user: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/memories/{_name(user)}")

    # the cluster

    def shards(self) -> dict[str, Any]:
        return self._json("GET", "/admin/shards")

    def scale(self, shards: int) -> dict[str, Any]:
        return self._json("POST", "/admin/shards/scale", json={"shards": shards}, timeout=ADMIN_TIMEOUT_S)

    def drain(self, shard: str) -> dict[str, Any]:
        return self._json("POST", f"/admin/shards/{_name(shard)}/drain", timeout=ADMIN_TIMEOUT_S)

    def snapshot(self, target: str | None) -> dict[str, Any]:
        body = {} if target is None else {"target": target}
        return self._json("POST", "/admin/snapshots", json=body, timeout=ADMIN_TIMEOUT_S)

    # how a request goes

    def _json(
        self, method: str, path: str, *, timeout: float | None = None, **request: Any
    ) -> dict[str, Any]:
        if timeout is not None:
            request["timeout"] = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_S)
        with self._wrapped():
            reply = self._http.request(method, path, **request)
        check(reply)
        try:
            body = reply.json()
        except ValueError as error:
            raise BadAnswer(f"{self.url} answered no JSON: is that a titanmem server?") from error
        return body if isinstance(body, dict) else {"data": body}

    def _wrapped(self) -> Network:
        return Network(self.url)


class _OpenStream:
    """Sends the request on entry; leaving closes the connection, which cancels what still runs."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self._client = client
        self._body = body

    def __enter__(self) -> ChatStream:
        http = self._client._http
        with self._client._wrapped():
            request = http.build_request("POST", "/v1/chat/completions", json=self._body)
            self._reply = http.send(request, stream=True)
            if not self._reply.is_success:
                try:
                    self._reply.read()
                finally:
                    self._reply.close()
        check(self._reply)
        return ChatStream(self._lines())

    def _lines(self) -> Iterator[str]:
        with self._client._wrapped():
            yield from self._reply.iter_lines()

    def __exit__(self, *_: object) -> None:
        self._reply.close()


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(name: str) -> str:
    return quote(name, safe="")


def _rows(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = body.get("data", body.get(key))
    if not isinstance(rows, list):
        raise BadAnswer(f"expected a list of {key}, the server sent {shorten(body)}")
    return rows
