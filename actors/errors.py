"""What a shard refuses, on the one tree of `storage/errors.py`.

    TitanmemError
    └── ShardError
        ├── BucketNotOwned   the shard does not own that bucket: the caller's map is stale
        └── ShardNotOpen     the shard is starting, stopping or fenced; it has not looked at the call

Neither has done anything, so the router asks again elsewhere or later; they do not reach the door.
"""

from __future__ import annotations

from storage.errors import TitanmemError


class ShardError(TitanmemError):
    """A shard did not take a call on; nothing was written."""


class BucketNotOwned(ShardError):
    """`shard` does not own `bucket`; `epoch` is the shard's own."""

    def __init__(self, shard: str, bucket: int, epoch: int) -> None:
        message = f"{shard} does not own bucket {bucket} (epoch {epoch})"
        super().__init__(message, shard=shard, bucket=bucket, epoch=epoch)


class ShardNotOpen(ShardError):
    """`shard` serves nobody now; `why` says whether it is starting, stopping or fenced."""

    def __init__(self, shard: str, why: str) -> None:
        super().__init__(f"{shard} is not open: {why}", shard=shard, why=why)
