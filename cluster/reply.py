"""One chat reply on its way out: tokens become text, stop strings are cut, a client who leaves ends it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from actors.messages import ChatCall, DoneEvent, TokenEvent
from cluster.door import Door
from cluster.errors import ShardUnavailable
from cluster.openai import ChatRequest, Completion, finish_reason
from cluster.problems import error_body
from titanmem.tracing import failed

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx in front would keep the first token back
}


class StopCutter:
    """Lets text through up to the first stop string, and holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of `text` (and of what was held) that is certain to be in the reply."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sure, self._held = self._held[: min(found)], ""
            return sure
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def flush(self) -> str:
        """What was held back, when the reply has ended without a stop string."""
        sure, self._held = self._held, ""
        return sure

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held are the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)


class Reply:
    """The text of one call as it comes, and afterwards `done`."""

    def __init__(self, door: Door, call: ChatCall, arrived_s: float) -> None:
        self._door = door
        self._call = call
        self._arrived_s = arrived_s
        self._tokens = 0
        self.text = ""
        self.done: DoneEvent | None = None

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Pieces of text, none empty. Closing it, or cancelling its task, cancels the call at once."""
        metrics = self._door.metrics
        decoder, cutter = self._door.tokenizer.stream_decoder(), StopCutter(self._call.stop)
        events = self._door.backend.chat(self._call)
        gauge, last_s, reason = metrics.waiting, 0.0, "abort"
        gauge.inc()
        try:
            async for event in events:
                now_s = time.perf_counter()
                if gauge is metrics.waiting:
                    gauge.dec()
                    gauge = metrics.running
                    gauge.inc()
                    metrics.first_token_s.observe(now_s - self._arrived_s)
                elif isinstance(event, TokenEvent):
                    metrics.between_tokens_s.observe(now_s - last_s)
                last_s = now_s
                if isinstance(event, TokenEvent):
                    self._tokens += len(event.tokens)
                    piece = cutter.feed(decoder.feed(event.tokens))
                else:
                    piece = self._rest(event, cutter.feed(decoder.flush()) + cutter.flush())
                    self.done, reason = event, finish_reason(event)
                if piece:
                    self.text += piece
                    yield piece
            if self.done is None:
                raise ShardUnavailable("the user's shard", "the reply broke off")
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            reason = "error"
            raise
        finally:
            await _close(events)
            gauge.dec()
            self._count(reason)

    def _rest(self, done: DoneEvent, tail: str) -> str:
        """What the shard's own text has beyond what was given out; `tail` where it sent none."""
        if done.text.startswith(self.text):
            return done.text[len(self.text) :]
        return "" if done.text else tail

    def _count(self, reason: str) -> None:
        metrics = self._door.metrics
        metrics.generation_tokens.inc(self.done.completion_tokens if self.done else self._tokens)
        metrics.finished(reason)
        if self.done:
            metrics.prompt_tokens.inc(self.done.prompt_tokens)
            metrics.whole_s.observe(time.perf_counter() - self._arrived_s)


class ChatResponse(Response):
    """Answers one call, whole or as a stream; an error before the first token has its own status."""

    def __init__(self, door: Door, call: ChatCall, chat: ChatRequest, span: Span, arrived_s: float) -> None:
        super().__init__()
        self._door = door
        self._call = call
        self._stream = bool(chat.stream)
        self._complete = False
        self._span = span
        self._reply = Reply(door, call, arrived_s)
        self._completion = Completion(
            id=call.request_id,
            model=chat.model,
            created=int(door.now()),
            include_usage=chat.include_usage,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            work = self._send_stream(send) if self._stream else self._send_whole(scope, receive, send)
            await until_disconnected(receive, work, lambda: self._complete)
        except BaseException as error:
            failed(self._span, error)
            raise
        finally:
            self._describe(self._span)
            self._span.end()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            async with aclosing(self._reply.pieces()) as pieces:
                async for _ in pieces:
                    pass
        assert self._reply.done is not None, "pieces end with done, or raise"
        done = self._reply.done
        whole = self._completion.whole(done.text or self._reply.text, done)
        self._complete = True
        await JSONResponse(whole)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        begun = False
        try:
            with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
                async with aclosing(self._reply.pieces()) as pieces:
                    async for piece in pieces:
                        if not begun:
                            begun = True
                            await self._begin(send)
                        await _send(send, _event(self._completion.text_chunk(piece)))
            assert self._reply.done is not None, "pieces end with done, or raise"
            if not begun:
                begun = True
                await self._begin(send)
            last = b"".join(map(_event, self._completion.last_chunks(self._reply.done)))
            self._complete = True
            await _send(send, last + DONE, more=False)
        except Exception as error:
            if not begun:
                raise
            # The status has gone out: the error is an event, and no [DONE] follows, for this is not the end.
            failed(self._span, error)
            await _send(send, _event(error_body(error, self._call.request_id)), more=False)

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, _event(self._completion.first_chunk()))

    def _describe(self, span: Span) -> None:
        span.set_attribute("gen_ai.response.id", self._call.request_id)
        span.set_attribute("gen_ai.response.model", self._completion.model)
        done = self._reply.done
        if done is not None:
            span.set_attribute("gen_ai.usage.input_tokens", done.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", done.completion_tokens)
            span.set_attribute("gen_ai.response.finish_reasons", (done.finish_reason,))
            span.set_attribute("titan.memory_version", done.memory_version)
            span.set_attribute("titan.tokens_written", done.tokens_written)
        if self._door.settings.trace_content:
            said = {"role": "assistant", "parts": [{"type": "text", "content": self._reply.text}]}
            span.set_attribute("gen_ai.output.messages", json.dumps([said], ensure_ascii=False))


async def until_disconnected(
    receive: Receive, work: Coroutine[Any, Any, None], complete: Callable[[], bool]
) -> None:
    """Runs `work` in one task; if the client goes first, cancels it, then raises ClientDisconnect.

    A server says "disconnected" after a whole answer too: then `complete` is true, and `work` ends by itself.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not complete():
            raise ClientDisconnect
        await task
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _close(events: object) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
