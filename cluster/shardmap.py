"""Which shard owns which bucket: pure data, and plans that move the fewest buckets.

K = 4,096 buckets are spread over N shards so that counts differ by at most one. A shard that joins takes
K / (N + 1) buckets and nothing else moves; one that leaves gives its buckets away and nothing else moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Any

from storage.names import BUCKETS, UserKey, bucket_of

FORMAT = 1


def shard_name(index: int) -> str:
    return f"shard-{index}"


def shard_index(name: str) -> int:
    """The inverse of `shard_name`; raises `ValueError` for any other text."""
    head, _, digits = name.partition("-")
    if head != "shard" or not digits.isascii() or not digits.isdigit() or str(int(digits)) != digits:
        raise ValueError(f"shard: {name!r} is not of the form shard-N")
    return int(digits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMap:
    """One version of the map. Raises `ValueError` when it does not give every bucket exactly one shard."""

    version: int
    """Counts up by one with each change of owners or epochs."""
    owners: tuple[int, ...]
    """[BUCKETS] index of the owning shard."""
    epochs: tuple[int, ...]
    """[shards] fencing epoch of each shard's newest start; 0 = not started yet."""

    def __post_init__(self) -> None:
        if not _whole(self.version) or self.version < 1:
            raise ValueError(f"version: {self.version!r} is not a whole number of at least 1")
        if len(self.owners) != BUCKETS:
            raise ValueError(f"owners: {len(self.owners)} entries, expected {BUCKETS}")
        if not 1 <= len(self.epochs) <= BUCKETS:
            raise ValueError(f"epochs: {len(self.epochs)} shards, expected 1 to {BUCKETS}")
        # Of 4,096 entries a set and two passes in C: a map is read at every start, and by every door.
        known = set(range(self.shards))
        if set(map(type, self.owners)) != {int} or not known.issuperset(self.owners):
            raise ValueError(f"owners: an entry is not a shard from 0 to {self.shards - 1}")
        if not all(_whole(epoch) and epoch >= 0 for epoch in self.epochs):
            raise ValueError("epochs: an entry is not a whole number of at least 0")

    @property
    def shards(self) -> int:
        return len(self.epochs)

    @property
    def names(self) -> list[str]:
        return [shard_name(i) for i in range(self.shards)]

    def owner_of(self, key: UserKey) -> int:
        return self.owners[bucket_of(key)]

    def buckets_of(self, shard: int) -> frozenset[int]:
        return frozenset(compress(range(BUCKETS), map(shard.__eq__, self.owners)))

    def counts(self) -> list[int]:
        """[shards] buckets that each owns."""
        counts = Counter(self.owners)
        return [counts[shard] for shard in range(self.shards)]

    def with_epoch(self, shard: int, epoch: int) -> ShardMap:
        """The next version, after `shard` was started with `epoch`; epochs of one shard only rise."""
        if epoch <= self.epochs[shard]:
            raise ValueError(f"epoch: {epoch} of {shard_name(shard)} is not over {self.epochs[shard]}")
        epochs = (*self.epochs[:shard], epoch, *self.epochs[shard + 1 :])
        return replace(self, version=self.version + 1, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; runs of equal owners are kept as [shard, buckets]."""
        runs = [[owner, len(list(run))] for owner, run in groupby(self.owners)]
        return {"format": FORMAT, "version": self.version, "epochs": list(self.epochs), "owners": runs}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShardMap:
        """Reads `to_dict`; raises `ValueError` that names what is wrong with the record."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"shard map: format {FORMAT} expected")
        owners: list[int] = []
        try:
            version, epochs = data["version"], tuple(data["epochs"])
            for owner, buckets in data["owners"]:
                if not _whole(buckets) or not 1 <= buckets <= BUCKETS - len(owners):
                    raise ValueError(f"shard map: owners: a run of {buckets!r} buckets")
                owners.extend([owner] * buckets)
        except (KeyError, TypeError) as error:
            raise ValueError(f"shard map: {type(error).__name__}: {error}") from None
        return cls(version=version, owners=tuple(owners), epochs=epochs)


def first_map(shards: int) -> ShardMap:
    """The map of a store that has none: neighbouring buckets lie together."""
    _check_shards(shards)
    return ShardMap(
        version=1, owners=tuple(b * shards // BUCKETS for b in range(BUCKETS)), epochs=(0,) * shards
    )


def plan(current: ShardMap, shards: int) -> ShardMap:
    """The next version for `shards` shards, or `current` itself when nothing has to change.

    Counts differ by at most one afterwards, and no plan with that property moves fewer buckets: each shard
    keeps as many of its buckets as its new share holds. Shards that remain keep their epochs.
    """
    _check_shards(shards)
    share = _shares(current, shards)
    kept = [0] * shards
    owners = list(current.owners)
    homeless: list[int] = []
    for bucket, owner in enumerate(owners):
        if owner < shards and kept[owner] < share[owner]:
            kept[owner] += 1
        else:
            homeless.append(bucket)
    takers = (shard for shard in range(shards) for _ in range(share[shard] - kept[shard]))
    for bucket, shard in zip(homeless, takers, strict=True):
        owners[bucket] = shard
    epochs = (current.epochs + (0,) * shards)[:shards]
    if tuple(owners) == current.owners and epochs == current.epochs:
        return current
    return ShardMap(version=current.version + 1, owners=tuple(owners), epochs=epochs)


def moved(before: ShardMap, after: ShardMap) -> int:
    """Buckets that have another owner in `after`."""
    return sum(a != b for a, b in zip(before.owners, after.owners, strict=True))


def _shares(current: ShardMap, shards: int) -> list[int]:
    """[shards] buckets each shall own: the odd ones go to those that own most now, so that they stay."""
    base, odd = divmod(BUCKETS, shards)
    counts = (current.counts() + [0] * shards)[:shards]
    share = [base] * shards
    for shard in sorted(range(shards), key=lambda s: (-counts[s], s))[:odd]:
        share[shard] += 1
    return share


def _check_shards(shards: int) -> None:
    if not _whole(shards) or not 1 <= shards <= BUCKETS:
        raise ValueError(f"shards: {shards!r} is not a whole number from 1 to {BUCKETS}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
