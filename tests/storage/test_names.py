"""Names: what may be one, what an error shows of the rest, and that buckets never move."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InvalidName
from storage.names import BUCKETS, UserKey, bucket_of
from storage.objects import check_object_name, check_prefix

BAD = ["", "a" * 129, "a" * 10_000, "../x", "a/b", "a\\b", ".hidden", "-x", "a..b", "é", "a b", "a\n", "a\0"]
GOOD = ["u1", "alice@example.org", "a.b:c+d=e-f_g", "_", "0", "a" * 128]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_one(name: str) -> None:
    key = UserKey("local", name)
    assert str(key) == f"local/{name}"
    assert UserKey.parse(str(key)) == key
    assert pickle.loads(pickle.dumps(key)) == key


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("place", ["tenant", "user"])
def test_a_bad_name_is_refused_and_hardly_repeated(name: str, place: str) -> None:
    with pytest.raises(InvalidName, match=f"^{place} ") as caught:
        UserKey(**{"tenant": "t", "user": "u", place: name})
    assert "a" * 65 not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [None, 7, b"alice"])
def test_a_name_is_text(name: object) -> None:
    with pytest.raises(InvalidName, match="must be text"):
        UserKey("local", name)  # type: ignore[arg-type]


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_key_leads_out_of_its_folder(tenant: str, user: str) -> None:
    try:
        key = UserKey(tenant, user)
    except InvalidName:
        return
    parts = f"users/{key}/HEAD".split("/")
    assert len(parts) == 4
    assert not {"", ".", ".."}.intersection(parts)


def test_buckets_are_the_same_for_ever() -> None:
    """A bucket that moved with a release would part a user from the memory."""
    known = {"local/alice": 2313, "local/bob": 453, "acme/u1": 1822}
    assert {name: bucket_of(UserKey.parse(name)) for name in known} == known


def test_buckets_fill_evenly() -> None:
    counts = [0] * BUCKETS
    for number in range(BUCKETS * 8):
        counts[bucket_of(UserKey("local", f"user-{number}"))] += 1
    assert max(counts) < 8 + 5 * 8**0.5 * 1.5


def test_keys_sort_and_hash() -> None:
    keys = [UserKey("b", "a"), UserKey("a", "b"), UserKey("a", "a")]
    assert [str(key) for key in sorted(keys)] == ["a/a", "a/b", "b/a"]
    assert len({UserKey("a", "a"), UserKey("a", "a")}) == 1


@pytest.mark.parametrize(
    "name", ["", "/", "/etc/passwd", "a//b", "a/../b", "a/.locks", "a/", "a" * 601, "a/é"]
)
def test_objects_have_plain_names(name: str) -> None:
    with pytest.raises(InvalidName):
        check_object_name(name)


@pytest.mark.parametrize("prefix", ["../", "/", "users/../", ".locks"])
def test_prefixes_too(prefix: str) -> None:
    with pytest.raises(InvalidName):
        check_prefix(prefix)
