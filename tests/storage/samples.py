"""Memories for the tests of this room: small or large, always the same for the same arguments."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from storage.memory import Memory, Replay
from storage.names import UserKey
from storage.segment import Segment

ALICE = UserKey("local", "alice")
BASE = "0123456789abcdef"
NOON = datetime(2026, 11, 22, 12, 0, 0, 123456, UTC)
ARRAYS = ("nonzero_idx", "theta_val", "momentum", "tail", "seen")
REPLAY_ARRAYS = ("columns", "values", "tokens", "gates")


def make_replay(rows: int, places: int, elements: int, seed: int = 0) -> Replay:
    random = np.random.default_rng(seed)
    return Replay(
        columns=random.integers(0, elements, (rows, places)).astype(np.int32),
        values=random.random((rows, places)).astype(np.float16),
        tokens=random.integers(0, 8000, rows).astype(np.int32),
        gates=random.random(rows).astype(np.float16),
    )


def make_memory(
    *,
    theta_shape: tuple[tuple[int, ...], ...] = ((16, 32), (8, 16)),
    nonzero: int = 40,
    key: UserKey = ALICE,
    version: int = 3,
    seed: int = 0,
    **changes: Any,
) -> Memory:
    """A memory with random positions and values; `changes` replace any field."""
    random = np.random.default_rng(seed)
    elements = sum(int(np.prod(shape)) for shape in theta_shape)
    memory = Memory(
        key=key,
        memory_version=version,
        epoch=1,
        last_chunk_id=9,
        tokens_seen=2304,
        base=BASE,
        rule="sparse",
        theta_shape=theta_shape,
        written_layers=(1,),
        created_at=NOON,
        nonzero_idx=np.sort(random.choice(elements, nonzero, replace=False)).astype(np.int64),
        theta_val=(random.standard_normal(nonzero) * 0.01).astype(np.float16),
        momentum=random.random(len(theta_shape)).astype(np.float16),
        replay=make_replay(3, 4, max(elements, 1), seed),
        tail=random.integers(0, 8000, 20).astype(np.int32),
        seen=random.integers(0, 2**64, 5, dtype=np.uint64),
        stats={"surprise_rate": 0.25, "written": 61.0},
    )
    return replace(memory, **changes)


def full_memory() -> Memory:
    """As large as the shipped model's gets: 1,048,576 elements, 200,000 of them written, a full reservoir."""
    return make_memory(
        theta_shape=((256, 4096),), nonzero=200_000, replay=make_replay(4096, 8, 4096), written_layers=(0,)
    )


def make_segment(chunk: int, *, key: UserKey = ALICE, tokens: int = 20, update_id: str = "") -> Segment:
    """One chunk of one user, with tokens that only it has."""
    return Segment(
        key=key,
        update_id=update_id or f"update-{chunk}",
        conversation="a conversation",
        role="user",
        context=np.arange(3, dtype=np.int32),
        tokens=(np.arange(tokens) + 1_000_003 * chunk + len(key.user)).astype(np.int32),
        first_chunk_id=chunk,
        last_chunk_id=chunk,
    )


def same(one: Memory, other: Memory) -> bool:
    """Whether two memories are equal in every bit."""
    plain = [name for name in Memory.__slots__ if name not in (*ARRAYS, "replay")]
    if any(getattr(one, name) != getattr(other, name) for name in plain):
        return False
    if (one.replay is None) != (other.replay is None):
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in ARRAYS]
    if one.replay is not None and other.replay is not None:
        pairs += [(getattr(one.replay, name), getattr(other.replay, name)) for name in REPLAY_ARRAYS]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)
