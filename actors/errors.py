"""What a shard refuses, on the one tree of `storage/errors.py`.

    TitanmemError
    └── ShardError
        ├── NotOwner       the shard does not own that bucket: the caller's map is stale
        ├── ShardNotOpen   the shard is starting, stopping or fenced
        ├── QueueFull      the shard's queue has no room
        ├── NoMemoryWeights  the model that is served has no memory
        ├── MemoryFrozen   the guard has frozen the user's memory
        └── MemoryDamaged  the user's memory in RAM was damaged, and comes in anew from store and journal

Nothing was looked at or written, but for the last one, where the journal may have what was told. The router asks again
elsewhere or later for the first two; the third is answered 429, the last one 503, the others 409.
"""

from __future__ import annotations

from storage.errors import TitanmemError


class ShardError(TitanmemError):
    """A shard did not take a call on; nothing was written."""


class NotOwner(ShardError):
    """`shard` does not own `bucket`; `epoch` is the shard's own."""

    def __init__(self, shard: str, bucket: int, epoch: int) -> None:
        message = f"{shard} does not own bucket {bucket} (epoch {epoch})"
        super().__init__(message, shard=shard, bucket=bucket, epoch=epoch)


class ShardNotOpen(ShardError):
    """`shard` serves nobody now; `why` says whether it is starting, stopping or fenced."""

    def __init__(self, shard: str, why: str) -> None:
        super().__init__(f"{shard} is not open: {why}", shard=shard, why=why)


class QueueFull(ShardError):
    """`what` has no room. Try again after `retry_after_s`."""

    def __init__(self, what: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{what} is full; try again later", what=what, retry_after_s=retry_after_s)


class NoMemoryWeights(ShardError):
    """The checkpoint in folder `model` has no memory weights, so nobody's memory can be written or read."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{no_memory(model)}: chat works without memory, nothing else does", model=model)


class MemoryFrozen(ShardError):
    """The memory of `key` lost its recall twice, and is not written before somebody chooses a version of it."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"{key}: the memory is frozen, for its recall fell twice; roll it back to a version of it, "
            "or import another, to have it read and written again",
            key=key,
        )


class MemoryDamaged(ShardError):
    """The memory of `key` was damaged while it was written; the next request finds it as store and journal have it."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"{key}: the memory in RAM was damaged and comes in anew; ask again, with the same Idempotency-Key",
            key=key,
        )


def no_memory(model: str) -> str:
    """What is said of a checkpoint without memory weights, at the start and in errors: what to do stands in it."""
    return f"{model} has no memory weights; `titanmem train --model {model}` adds them"
