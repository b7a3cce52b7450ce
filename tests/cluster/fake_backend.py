"""A cluster in one process that behaves: it remembers what it is told, answers from it, and fails when asked.

Beside it what a test of the door needs: a tokenizer trained in a moment, and the door served on a free port.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.errors import QueueFull
from actors.messages import NOTHING, ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from cluster.api import build_api
from cluster.backend import Backend
from cluster.door import DoorSettings
from storage.errors import Forgotten, NoSuchMemory, Truncated, VersionConflict
from storage.names import UserKey
from titanmem.tokenizer import ChatTokenizer, write_chat_files

MODEL = "titanmem-tiny"
FILE_MAGIC = b"fake .titanmem "
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@functools.cache
def tiny_tokenizer() -> ChatTokenizer:
    """Byte-level BPE of 320 entries with our roles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["my dog is called Rex and the key is under the mat " * 20], trainer)
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(str(Path(name) / "tokenizer.json"))
        write_chat_files(Path(name))
        return ChatTokenizer(name)


@dataclass
class FakeMemory:
    """One user's memory."""

    told: list[str] = field(default_factory=list)
    version: int = 0
    versions: dict[int, list[str]] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    outcomes: dict[str, Any] = field(default_factory=dict)
    """What each update id did, so that a second time does nothing."""

    def tell(self, text: str) -> None:
        self.told = [*self.told, text]
        self.version += 1
        self.versions[self.version] = self.told


class FakeBackend(Backend):
    """Keeps what users say; a question is answered with the sentence that shares most words with it."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.memories: dict[UserKey, FakeMemory] = {}
        self.forgotten: set[UserKey] = set()
        self.chats: list[ChatCall] = []
        self.ingests: list[IngestCall] = []
        self.failures: list[Exception] = []
        """Raised one after the other by the next calls, whatever they are."""
        self.break_after: int | None = None
        """Tokens after which a reply breaks off with an unforeseen error."""
        self.pace_s = 0.0
        """Pause before each token."""
        self.allowed: int | None = None
        """Tokens that a reply may give; then it waits until it may give more. None: all."""
        self.reply: str | None = None
        """Said instead of an answer."""
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.cancel_seen = threading.Event()
        self.ready = (True, "")
        self.texts: list[bytes] = []
        self.scaled: list[int] = []

    def reset(self) -> None:
        """As new, what a test has put in place of a method taken away too."""
        self.__dict__.clear()
        self.__init__()

    # chat

    async def chat(self, call: ChatCall) -> AsyncIterator[TokenEvent | DoneEvent]:
        self._fail()
        self.chats.append(call)
        self.running.add(call.request_id)
        try:
            heard = self.tokenizer.decode(call.messages[-1].tokens)
            text = self._answer(call, heard) if self.reply is None else self.reply
            ids = self.tokenizer.encode(text).tolist()
            reason = "stop" if len(ids) <= call.max_tokens else "length"
            ids = ids[: call.max_tokens]
            for index, token in enumerate(ids):
                await asyncio.sleep(self.pace_s)
                while self.allowed is not None and index >= self.allowed:  # noqa: ASYNC110 (set by a thread)
                    await asyncio.sleep(0.005)
                if self.break_after is not None and index >= self.break_after:
                    raise RuntimeError("secret inside of the server")
                yield TokenEvent(tokens=(token,))
            text = self.tokenizer.decode(ids)
            cuts = [text.find(stop) for stop in call.stop if stop in text]
            yield self._done(
                call, heard, "stop" if cuts else reason, text[: min(cuts)] if cuts else text, ids
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(call.request_id)
            self.cancel_seen.set()
            raise
        finally:
            self.running.discard(call.request_id)

    def _answer(self, call: ChatCall, heard: str) -> str:
        if "?" not in heard or call.memory == "off":
            return f"Noted: {heard}"
        words = set(re.findall(r"\w{3,}", heard.lower()))
        told = self.memories.get(call.key, FakeMemory()).told
        best = max(told, key=lambda text: len(words & set(re.findall(r"\w{3,}", text.lower()))), default="")
        return best or "I do not know."

    def _done(self, call: ChatCall, heard: str, reason: Any, text: str, ids: list[int]) -> DoneEvent:
        prompt = sum(len(m.tokens) for m in call.messages) + len(call.generation_prompt)
        memory = self.memories.setdefault(call.key, FakeMemory())
        writes = call.memory == "read_write" and call.update_id not in memory.outcomes
        if writes and "?" not in heard:
            memory.tell(heard)
        memory.outcomes[call.update_id] = True
        return DoneEvent(
            finish_reason=reason,
            prompt_tokens=prompt,
            completion_tokens=len(ids),
            memory_version=memory.version,
            tokens_written=len(call.messages[-1].tokens) if writes else 0,
            surprise=0.5 if writes else 0.0,
            text=text,
            memory=call.memory,
        )

    # memories

    async def ingest(self, call: IngestCall) -> IngestOutcome:
        self._fail()
        await asyncio.sleep(self.pace_s)
        self.ingests.append(call)
        memory, done = self.memories.setdefault(call.key, FakeMemory()), NOTHING
        for update_id, tokens in call.pieces().items():
            if update_id in memory.outcomes:
                done = done.plus(dataclasses.replace(memory.outcomes[update_id], duplicates=1))
                continue
            memory.tell(self.tokenizer.decode(tokens))
            count = len(tokens)
            outcome = IngestOutcome(
                tokens=count,
                chunks=-(-count // 256),
                tokens_written=count // 4,
                memory_version=memory.version,
            )
            memory.outcomes[update_id] = outcome
            done = done.plus(outcome)
        return done

    async def describe(self, key: UserKey) -> dict[str, Any]:
        memory = self._memory(key)
        return {"memory_version": memory.version, "shard": "shard-0", "frozen": False}

    async def versions(self, key: UserKey) -> list[dict[str, Any]]:
        memory = self._memory(key)
        return [{"version": v, "pinned": v in memory.pinned} for v in sorted(memory.versions, reverse=True)]

    async def rollback(self, key: UserKey, to: int | None = None) -> dict[str, Any]:
        memory = self._memory(key)
        to = memory.version - 1 if to is None else to
        if to not in memory.versions:
            raise NoSuchMemory(f"{key} has no version {to}")
        memory.told = memory.versions[to]
        memory.version += 1
        memory.versions[memory.version] = memory.told
        return {"memory_version": memory.version, "from": to}

    async def pin(self, key: UserKey) -> dict[str, Any]:
        memory = self._memory(key)
        memory.pinned.add(memory.version)
        return {"version": memory.version, "pinned": True}

    async def export(self, key: UserKey) -> bytes:
        return FILE_MAGIC + json.dumps(self._memory(key).told).encode()

    async def import_(self, key: UserKey, data: bytes) -> dict[str, Any]:
        self._fail()
        try:
            told = json.loads(data.removeprefix(FILE_MAGIC))
        except ValueError:
            raise Truncated(f"{key}.titanmem", "length", "a whole file", f"{len(data)} bytes") from None
        memory = self.memories.setdefault(key, FakeMemory())
        memory.told = told[:-1]
        memory.tell(told[-1])
        return {"memory_version": memory.version}

    async def forget(self, key: UserKey) -> dict[str, Any]:
        self._fail()
        self.memories.pop(key, None)
        self.forgotten.add(key)
        return {"erased": ["HEAD"], "epoch": 1}

    async def users(self, tenant: str) -> list[dict[str, Any]]:
        return [
            {"user": k.user, "memory_version": m.version}
            for k, m in self.memories.items()
            if k.tenant == tenant
        ]

    # the cluster

    async def shards(self) -> list[dict[str, Any]]:
        return [{"shard": "shard-0", "state": "serving", "users": len(self.memories)}]

    async def scale(self, shards: int) -> dict[str, Any]:
        self.scaled.append(shards)
        return {"shards": shards}

    async def drain(self, shard: str) -> dict[str, Any]:
        return {"shard": shard, "moved": 0}

    async def snapshot(self, target: str | None = None) -> dict[str, Any]:
        self._fail()
        if target and not target.startswith(("file://", "s3://")):
            raise ValueError(f"{target}: there are file:// and s3://")
        return {"snapshot": "20260101T000000Z-abcdef", "target": target}

    async def readiness(self) -> tuple[bool, str]:
        return self.ready

    async def shard_metrics(self) -> list[bytes]:
        return self.texts

    # helpers

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def _memory(self, key: UserKey) -> FakeMemory:
        self._fail()
        if key in self.forgotten and key not in self.memories:
            raise Forgotten(f"{key} was erased")
        if key not in self.memories:
            raise NoSuchMemory(f"{key} has no memory")
        return self.memories[key]


@dataclass(frozen=True)
class Served:
    """A door on a port."""

    url: str
    backend: FakeBackend
    settings: DoorSettings


@contextmanager
def serving(backend: FakeBackend | None = None, **settings: Any) -> Iterator[Served]:
    """Serves a door with uvicorn in a thread, as Serve does in its replicas."""
    backend = backend or FakeBackend()
    told = DoorSettings(**{"model": MODEL, **settings})
    app = build_api(backend, tiny_tokenizer(), told)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", backend, told)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def eventually(true: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether `true` becomes so in time: for what another thread does, on a machine that may be busy."""
    end_s = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def leave(served: Served, body: dict[str, Any]) -> None:
    """Asks for a chat, and goes away when the cluster has it and holds its tokens back."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as link:
        link.sendall(head.encode() + data)
        assert eventually(lambda: bool(served.backend.running))


def quick_client(**settings: Any) -> httpx.Client:
    """A client that does not read the machine's certificates, which takes longer than a test."""
    no_certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.Client(timeout=60, verify=no_certificates, trust_env=False, **settings)


__all__ = [
    "FILE_MAGIC",
    "MODEL",
    "FakeBackend",
    "FakeMemory",
    "QueueFull",
    "Served",
    "VersionConflict",
    "eventually",
    "leave",
    "quick_client",
    "serving",
    "tiny_tokenizer",
]
