"""A keeper without a model, for tests of what lies around it: remembers updates, in a file that survives it.

A request's `temperature` is the time in seconds that each token of its reply takes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import QueueFull
from actors.messages import NOTHING, ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from actors.options import KeeperOptions
from storage.errors import NoSuchMemory
from storage.memory import Memory
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import write_part
from storage.titanmem import encode

SUFFIX = ".fake"
BASE = "0" * 32


class FakeKeeper:
    """The interface of `actors.keeper.MemoryKeeper`. A user's memory is the list of updates told to it."""

    def __init__(self, options: KeeperOptions) -> None:
        self.options = options
        self.updates: dict[UserKey, dict[str, list[int]]] = {}
        self.cancelled: list[str] = []
        self.running = 0
        self.holds = True
        self._path = Path(options.journal_dir) / (options.shard + SUFFIX)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                user = UserKey.parse(entry["key"])
                self.updates.setdefault(user, {})[entry["update_id"]] = entry["tokens"]

    async def chat(self, call: ChatCall) -> AsyncIterator[TokenEvent | DoneEvent]:
        """Replies with the last message's tokens, one at a time."""
        if self.running >= self.options.queue_max:
            raise QueueFull("the queue of " + self.options.shard, 0.5)
        self.running += 1
        ended = False
        tokens = [int(token) for token in call.messages[-1].tokens]
        try:
            for token in tokens:
                await asyncio.sleep(call.temperature)
                yield TokenEvent(tokens=(token,))
            self._write(call.key, call.update_id, tokens)
            ended = True
            yield DoneEvent(
                finish_reason="stop",
                prompt_tokens=sum(len(message.tokens) for message in call.messages),
                completion_tokens=len(tokens),
                memory_version=len(self.updates[call.key]),
                tokens_written=len(tokens),
                surprise=0.5,
                text=" ".join(map(str, tokens)),
            )
        finally:
            self.running -= 1
            if not ended:
                self.cancelled.append(call.request_id)

    async def ingest(self, call: IngestCall) -> IngestOutcome:
        done = NOTHING
        for update_id, tokens in call.pieces().items():
            duplicate = update_id in self.updates.get(call.key, {})
            self._write(call.key, update_id, [int(token) for token in tokens])
            version = list(self.updates[call.key]).index(update_id) + 1  # as it was the first time
            done = done.plus(
                IngestOutcome(
                    tokens=len(tokens),
                    chunks=1,
                    tokens_written=len(tokens),
                    memory_version=version,
                    duplicates=int(duplicate),
                )
            )
        return done

    async def describe(self, key: UserKey) -> dict[str, Any]:
        return {"user": key.user, "memory_version": len(self._of(key)), "pid": os.getpid()}

    async def versions(self, key: UserKey) -> list[dict[str, Any]]:
        return [{"version": version} for version in range(len(self._of(key)), 0, -1)]

    async def rollback(self, key: UserKey, to: int | None) -> dict[str, Any]:
        return {"memory_version": to if to is not None else len(self._of(key)) - 1}

    async def pin(self, key: UserKey) -> dict[str, Any]:
        return {"version": len(self._of(key))}

    async def export(self, key: UserKey) -> bytes:
        return json.dumps(self._of(key)).encode()

    async def import_(self, key: UserKey, data: bytes) -> dict[str, Any]:
        self.updates[key] = json.loads(data)
        return {"memory_version": len(self.updates[key])}

    async def forget(self, key: UserKey) -> dict[str, Any]:
        return {"updates": len(self.updates.pop(key, {}))}

    async def users(self) -> list[dict[str, Any]]:
        return [
            {"tenant": key.tenant, "user": key.user, "memory_version": len(updates)}
            for key, updates in self.updates.items()
        ]

    async def flush(self) -> int:
        return len(self.updates)

    async def snapshot_part(self, snapshot_id: str, target_url: str, include_model: bool) -> dict[str, Any]:
        return await asyncio.to_thread(self._part, snapshot_id, target_url, include_model)

    def _part(self, snapshot_id: str, target_url: str, include_model: bool) -> dict[str, Any]:
        part = write_part(
            open_objects(target_url),
            snapshot_id,
            shard=self.options.shard,
            epoch=self.options.epoch,
            model_dir=Path(self.options.model) if include_model else None,
            memories=[encode(self._memory(key)) for key in self.updates],
        )
        return {**part.to_dict(), "base": BASE}

    def _memory(self, key: UserKey) -> Memory:
        return Memory(
            key=key,
            memory_version=len(self.updates[key]),
            epoch=self.options.epoch,
            last_chunk_id=len(self.updates[key]),
            tokens_seen=sum(map(len, self.updates[key].values())),
            base=BASE,
            rule="sparse",
            theta_shape=((2, 2),),
            written_layers=(0,),
            created_at=datetime.now(UTC),
            nonzero_idx=np.array([1], np.int64),
            theta_val=np.array([0.5], np.float16),
            momentum=np.array([0.0], np.float16),
        )

    async def stats(self) -> dict[str, Any]:
        return {
            "resident_users": len(self.updates),
            "running": self.running,
            "cancelled": list(self.cancelled),
        }

    async def metrics(self) -> bytes:
        return f"titan:resident_users {len(self.updates)}\n".encode()

    def holds_journal(self) -> bool:
        return self.holds

    async def close(self) -> None:
        self._path.with_suffix(".closed").touch()

    def _of(self, key: UserKey) -> dict[str, list[int]]:
        if key not in self.updates:
            raise NoSuchMemory(f"{key}: nothing is known", key=str(key))
        return self.updates[key]

    def _write(self, key: UserKey, update_id: str, tokens: list[int]) -> None:
        updates = self.updates.setdefault(key, {})
        if update_id in updates:
            return
        updates[update_id] = tokens
        with self._path.open("a") as file:
            file.write(json.dumps({"key": str(key), "update_id": update_id, "tokens": tokens}) + "\n")
            file.flush()
            os.fsync(file.fileno())


async def open_keeper(options: KeeperOptions) -> FakeKeeper:
    """What a shard is given for `actors.keeper:open_keeper`."""
    return FakeKeeper(options)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)
