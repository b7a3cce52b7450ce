"""A server and what surrounds it: what the stages of the story leave behind, and what the tests look at."""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.config import Config
from storage.memory import Memory
from storage.titanmem import decode
from tests.servers import S3Server
from tests.system.collector import Collector
from tests.system.facts import EXAMPLES, HIDDEN, Fact
from tests.system.server import Server, run

BOOK = EXAMPLES / "decline-and-fall.txt.xz"
PARTS = {"first.txt": slice(20_000, 80_000), "second.txt": slice(80_000, 1_700_000)}
"""Characters of the book. The second is more than one request of `titanmem ingest`, so that the crash finds some of
it acknowledged and some not."""
NOTE = (
    "a-note",
    b"The meeting with the printer is on Thursday, and the proofs are to be read by then.\n" * 8,
)

RESTED_WITHIN_S = 240.0


def succeeded(*arguments: str) -> dict[str, Any]:
    """What a command says with `--json`; it must not fail."""
    ended = run(*arguments)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def interleaved(text: str) -> str:
    """`text` with the hidden facts as paragraphs of their own, spread over its length."""
    paragraphs = text.split("\n")
    for n, fact in reversed(list(enumerate(HIDDEN))):
        paragraphs.insert((2 * n + 1) * len(paragraphs) // (2 * len(HIDDEN)), f"\n{fact.statement}\n")
    return "\n".join(paragraphs)


@dataclass(frozen=True, kw_only=True)
class World:
    """A server and what surrounds it; `told` says who tells what."""

    shards: int
    folder: Path
    server: Server
    collector: Collector
    s3: S3Server
    told: Mapping[str, Sequence[Fact]]

    def memory(self, user: str) -> dict[str, Any]:
        """The figures of one memory."""
        answer = httpx.get(f"{self.server.url}/v1/memories/{user}", timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens_seen(self) -> dict[str, int]:
        return {user: self.memory(user)["tokens_seen"] for user in self.told}

    def ingest_note(self) -> dict[str, Any]:
        """A small text under an idempotency key, always the same."""
        key, text = NOTE
        url, headers = f"{self.server.url}/v1/memories/u1/ingest", {"Idempotency-Key": key}
        answer = httpx.post(url, content=text, headers=headers, timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def export(self) -> bytes:
        """u1's memory, from the route."""
        answer = httpx.get(f"{self.server.url}/v1/memories/u1/export", timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.content

    def exported(self) -> Memory:
        """u1's memory, from `titanmem users export`."""
        file = self.folder / "u1.titanmem"
        succeeded("users", "export", "u1", str(file), "--json", "--url", self.server.url)
        return decode(file.read_bytes(), name=file.name)

    def rested(self) -> Memory:
        """u1's memory when all of it has been consolidated: it stays as it is until somebody tells more."""
        until = time.monotonic() + RESTED_WITHIN_S
        while (memory := self.exported()).stats["consolidated"] < memory.stats["tokens_written"]:
            assert time.monotonic() < until, f"not consolidated within {RESTED_WITHIN_S:g} s: {memory.stats}"
            time.sleep(Config().consolidate_after_s + 3.0)  # whoever asks keeps it awake
        return memory

    def document(self, name: str) -> str:
        """A file with one of the two parts of the book."""
        file, part = self.folder / name, PARTS[name]
        if not file.exists():
            with lzma.open(BOOK, "rt", encoding="utf-8") as book:
                text = book.read(part.stop)[part]
            file.write_text(interleaved(text) if name == "first.txt" else text, encoding="utf-8")
        return str(file)

    def ingest(self, file: str, *more: str) -> list[str]:
        return ["ingest", "--user", "u1", "--url", self.server.url, "--json", *more, file]


@dataclass(frozen=True, kw_only=True)
class Crash:
    """What was acknowledged before, what the processes were, and how the client took it."""

    before: dict[str, int]
    """tokens_seen of each user before the ingest that was interrupted."""
    during: int
    """tokens_seen of u1, read just before the end."""
    killed: int
    code: int
    said: str


@dataclass(frozen=True, kw_only=True)
class Backups:
    """The memory when it was backed up, the snapshots by their URL, and the one in S3."""

    memory: Memory
    tokens_seen: int
    snapshots: dict[str, dict[str, Any]]
    s3_url: str
