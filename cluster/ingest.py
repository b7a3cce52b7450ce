"""`POST /v1/memories/{user}/ingest`: a text of any length, streamed into a memory piece by piece.

Pieces are cut by the text alone, never by how it arrived, and piece n of a document is the update
`<idempotency key>:<n>`: the same document sent again with the same key writes nothing twice, so a client that
was cut off just sends it again. At any time a few pieces are being written, in one call, while the next ones are cut.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from opentelemetry.trace import SpanKind
from starlette.requests import Request

from actors.errors import QueueFull
from actors.messages import NOTHING, IngestCall, IngestOutcome
from cluster.bodies import Utf8Stream, body_chunks
from cluster.door import Door, door_of
from cluster.errors import BadRequest
from cluster.openai import CONVERSATION_CHARS_MAX
from storage.segment import SEGMENT_TOKENS_MAX
from titanmem.tokenizer import BLOCK_CHARS, ChatTokenizer, block_end
from titanmem.tracing import continued, inject

router = APIRouter()
PIECES_AT_ONCE = 4
"""Pieces of one call: what a call and a commit cost is shared between them. 64 KiB go along with the call."""
CALL_TOKENS = PIECES_AT_ONCE * SEGMENT_TOKENS_MAX
PARTS_AHEAD = 4
"""Parts handed over and not acknowledged, 64 KiB each: one on its way, the others cut already."""
NO_TEXT_KINDS = ("multipart/", "image/", "audio/", "video/", "application/pdf", "application/zip")
UTF8_NAMES = frozenset({"utf-8", "utf8", "us-ascii"})


class DocumentCutter:
    """Cuts text that arrives anyhow into parts of `CALL_TOKENS` ids, holding a block and a part."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._ids = np.empty(0, np.int32)

    async def feed(self, text: str) -> AsyncIterator[np.ndarray]:
        """Parts that are full and not the last, int32 [CALL_TOKENS] each, as soon as their blocks are encoded: the
        first is on its way while the next is cut."""
        self._text += text
        while len(self._text) > BLOCK_CHARS:  # a block is known when the character after it has come
            end = block_end(self._text)
            block, self._text = self._text[:end], self._text[end:]
            for part in await self._encoded(block):
                yield part

    async def finish(self) -> list[np.ndarray]:
        """All that is left, the document's last part at the end. Empty if there was no text at all."""
        text, self._text = self._text, ""
        parts = await self._encoded(text)
        return [*parts, self._ids] if len(self._ids) else parts

    async def _encoded(self, block: str) -> list[np.ndarray]:
        ids = await asyncio.to_thread(self._tokenizer.encode, block)
        self._ids = np.concatenate([self._ids, ids])
        return self._full()

    def _full(self) -> list[np.ndarray]:
        """Parts that are full, never the last ids: what is left must be able to be the last part."""
        count = max(0, len(self._ids) - 1) // CALL_TOKENS
        parts = [self._ids[n * CALL_TOKENS : (n + 1) * CALL_TOKENS] for n in range(count)]
        self._ids = self._ids[count * CALL_TOKENS :]
        return parts


class Writer:
    """Writes parts in order, one at a time, while some wait: what takes 10 to 150 ms to fold takes 30 to cut."""

    def __init__(self, door: Door, first: IngestCall) -> None:
        self._door = door
        self._first = first
        self._number = 0
        """Of the next piece."""
        self._patience_s = door.settings.ingest_patience_s
        self._tasks: deque[asyncio.Task[IngestOutcome]] = deque()
        """Each waits for the one before, and fails with it."""
        self.total = NOTHING

    async def put(self, tokens: np.ndarray, *, last: bool) -> None:
        """Hands over the next part; returns when there is room for another. Raises what the cluster says of one."""
        while self._tasks and (len(self._tasks) == PARTS_AHEAD or self._tasks[0].done()):
            await self._settle_first()
        call = replace(self._first, first=self._number, tokens=tokens, last=last)
        before = self._tasks[-1] if self._tasks else None
        self._tasks.append(asyncio.create_task(self._write_after(before, call)))
        self._number += len(call.pieces())

    async def settle(self) -> None:
        """Waits for all parts. Raises what the cluster says of one."""
        while self._tasks:
            await self._settle_first()

    async def _settle_first(self) -> None:
        outcome = await self._tasks[0]
        self._tasks.popleft()
        self.total = self.total.plus(outcome)
        self._door.metrics.ingested_tokens.inc(outcome.tokens)

    async def abandon(self) -> None:
        """Stops waiting; the part on its way may or may not be written, and may be sent again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write_after(
        self, before: asyncio.Task[IngestOutcome] | None, call: IngestCall
    ) -> IngestOutcome:
        if before is not None:
            await before
        return await self._write(call)

    async def _write(self, call: IngestCall) -> IngestOutcome:
        """A document that has begun waits for room: what came before it would be for nothing else."""
        while True:
            try:
                return await self._door.backend.ingest(call)
            except QueueFull as full:
                wait_s = min(max(0.01, full.retry_after_s), self._patience_s)
                if call.first == 0 or wait_s <= 0:
                    raise
                self._patience_s -= wait_s
                await asyncio.sleep(wait_s)


@router.post("/v1/memories/{user}/ingest")
async def ingest(request: Request, user: str) -> dict[str, Any]:
    """Streams a text into a user's memory; answers when all of it is acknowledged."""
    door = door_of(request)
    key = door.key(request, user)
    _check_kind(request)
    name = door.idempotency_key(request) or f"ingest-{door.new_id()}"
    conversation = _conversation(request) or name
    attributes = {"gen_ai__operation__name": "update_memory", "gen_ai__conversation__id": conversation}
    with continued(request.headers, "update_memory", SpanKind.SERVER, **attributes) as span:
        first = IngestCall(
            key=key, update_id=name, conversation=conversation, tokens=np.empty(0, np.int32), trace=inject()
        )
        total = await write_document(door, request, first)
        span.set_attribute("titan.tokens", total.tokens)
        span.set_attribute("titan.tokens_written", total.tokens_written)
    return {
        "tokens": total.tokens,
        "chunks": total.chunks,
        "tokens_written": total.tokens_written,
        "written_share": total.tokens_written / total.tokens if total.tokens else 0.0,
        "memory_version": total.memory_version,
        "pieces": total.pieces,
        "duplicates": total.duplicates,
        "idempotency_key": name,
        "conversation": conversation,
    }


async def write_document(door: Door, request: Request, first: IngestCall) -> IngestOutcome:
    """Reads the body to its end and writes it. `first` says for whom and under which name.

    Raises `BadRequest` for text that is not UTF-8, or none at all: what was acknowledged before it stays.
    """
    cutter, utf8, writer = DocumentCutter(door.tokenizer), Utf8Stream(), Writer(door, first)
    try:
        async for chunk in body_chunks(request, door.settings.body_idle_s_max):
            await _write_full(cutter, utf8, chunk, writer)
        await _write_full(cutter, utf8, b"", writer, last=True)
        rest = await cutter.finish()
        for index, tokens in enumerate(rest):
            await writer.put(tokens, last=index == len(rest) - 1)
        await writer.settle()
    except BadRequest as error:
        await writer.settle()
        kept = f"{writer.total.tokens} tokens before it are in the memory and stay there."
        raise BadRequest(f"{error} {kept}", error.param, error.code) from None
    finally:
        await writer.abandon()
    if not writer.total.pieces:
        raise BadRequest("The document is empty.", None, "empty_document")
    return writer.total


async def _write_full(
    cutter: DocumentCutter, utf8: Utf8Stream, chunk: bytes, writer: Writer, *, last: bool = False
) -> None:
    """Writes the parts that `chunk` fills, those before a wrong byte too; then raises for it."""
    async for tokens in cutter.feed(utf8.feed(chunk, last=last)):
        await writer.put(tokens, last=False)
    if utf8.wrong is not None:
        raise utf8.wrong


def _conversation(request: Request) -> str:
    name = request.headers.get("x-titan-conversation", "")
    if len(name) > CONVERSATION_CHARS_MAX or not name.isprintable():
        message = f"X-Titan-Conversation: at most {CONVERSATION_CHARS_MAX} printable characters."
        raise BadRequest(message, "X-Titan-Conversation")
    return name


def _check_kind(request: Request) -> None:
    """Refuses what says of itself that it is no plain text; anything else may still prove to be none."""
    kind, _, rest = request.headers.get("content-type", "text/plain").lower().partition(";")
    charset = re.search(r'\bcharset\s*=\s*"?([^\s;"]+)', rest)
    coding = request.headers.get("content-encoding", "identity").lower()
    if (
        kind.strip().startswith(NO_TEXT_KINDS)
        or (charset and charset[1] not in UTF8_NAMES)
        or coding != "identity"
    ):
        message = (
            "The body must be plain text in UTF-8, sent as it is: use Content-Type text/plain, no form, "
            "no other character set and no Content-Encoding."
        )
        raise BadRequest(message, "Content-Type", "unsupported_media_type")
