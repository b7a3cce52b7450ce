"""The shard map: every bucket owned once, even counts, and the fewest moves."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shardmap import ShardMap, first_map, moved, plan, shard_index, shard_name
from storage.names import BUCKETS, UserKey, bucket_of

SHARDS = st.integers(1, 48)


def even(current: ShardMap) -> bool:
    counts = current.counts()
    return sum(counts) == BUCKETS and max(counts) - min(counts) <= 1


@given(SHARDS)
def test_first_map_is_even(shards: int) -> None:
    assert even(first_map(shards))


@given(SHARDS, st.lists(SHARDS, min_size=1, max_size=6))
def test_a_chain_of_plans_stays_even_and_moves_the_fewest(first: int, sizes: list[int]) -> None:
    current = first_map(first)
    for shards in sizes:
        after = plan(current, shards)
        assert even(after)
        assert after.shards == shards
        assert moved(current, after) == fewest_moves(current, shards)
        current = after


@given(st.integers(1, 200))
def test_one_that_joins_moves_at_most_its_share(shards: int) -> None:
    before = first_map(shards)
    after = plan(before, shards + 1)
    assert moved(before, after) <= 1.1 * BUCKETS / (shards + 1)
    assert all(new == shards for old, new in zip(before.owners, after.owners, strict=True) if old != new)


@given(st.integers(2, 200))
def test_one_that_leaves_moves_only_its_own(shards: int) -> None:
    before = first_map(shards)
    after = plan(before, shards - 1)
    assert moved(before, after) == before.counts()[shards - 1]


def fewest_moves(before: ShardMap, shards: int) -> int:
    """Reckoned apart: each shard keeps what an even map allows, and the fullest get the larger shares."""
    counts = sorted((before.counts() + [0] * shards)[:shards], reverse=True)
    base, odd = divmod(BUCKETS, shards)
    return BUCKETS - sum(min(count, base + (i < odd)) for i, count in enumerate(counts))


def test_the_same_number_again_changes_nothing() -> None:
    current = first_map(3)
    assert plan(current, 3) is current


def test_epochs_stay_with_their_shards() -> None:
    current = first_map(2).with_epoch(0, 5).with_epoch(1, 6)
    assert current.version == 3
    assert plan(current, 3).epochs == (5, 6, 0)
    assert plan(current, 1).epochs == (5,)
    with pytest.raises(ValueError, match="epoch: 5 of shard-0 is not over 5"):
        current.with_epoch(0, 5)


def test_a_user_falls_into_the_owner_of_the_bucket() -> None:
    current = plan(first_map(4), 5)
    for n in range(100):
        key = UserKey("local", f"u{n}")
        owner = current.owner_of(key)
        assert bucket_of(key) in current.buckets_of(owner)
        assert all(bucket_of(key) not in current.buckets_of(other) for other in range(5) if other != owner)


@given(SHARDS, SHARDS)
def test_survives_json(first: int, second: int) -> None:
    current = plan(first_map(first), second)
    assert ShardMap.from_dict(json.loads(json.dumps(current.to_dict()))) == current


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format 1 expected"),
        ({"version": 0}, "version: 0"),
        ({"version": None}, "version: None"),
        ({"epochs": []}, "epochs: 0 shards"),
        ({"epochs": [-1, 0]}, "epochs: an entry"),
        ({"owners": [[0, 4095]]}, "owners: 4095 entries"),
        ({"owners": [[0, 4096], [1, 1]]}, "a run of 1 buckets"),
        ({"owners": [[0, 0], [1, 4096]]}, "a run of 0 buckets"),
        ({"owners": [[2, 4096]]}, "owners: an entry is not a shard from 0 to 1"),
        ({"owners": [[True, 4096]]}, "owners: an entry"),
        ({"owners": [4096]}, "TypeError"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, object], says: str) -> None:
    record = first_map(2).to_dict() | change
    with pytest.raises(ValueError, match=says):
        ShardMap.from_dict(record)


def test_a_record_that_lacks_a_field_is_refused() -> None:
    record = first_map(2).to_dict()
    del record["owners"]
    with pytest.raises(ValueError, match="owners"):
        ShardMap.from_dict(record)


def test_names() -> None:
    assert shard_index(shard_name(17)) == 17
    for wrong in ("shard", "shard-", "shard-x", "shard-01", "shard--1", "other-1", "shard-²"):
        with pytest.raises(ValueError, match="shard"):
            shard_index(wrong)
