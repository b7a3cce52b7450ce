"""Names of tenants and users, and the bucket that a user falls into.

A name becomes part of a path and of an object's key, so the rule is narrow, and checked when the key is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import xxhash

from storage.errors import InvalidName, shorten

BUCKETS = 4096
NAME_CHARS_MAX = 128
NAME_CHARS_SHOWN_MAX = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:+=-]{0,127}", re.ASCII)

assert BUCKETS & (BUCKETS - 1) == 0, "a power of two, so that the hash's low bits choose evenly"
assert NAME_CHARS_MAX < 255, "a name must fit into one path component"


def check_name(kind: str, name: object) -> str:
    """`name` itself if it may name a `kind` ("user", "tenant"), else raises `InvalidName`."""
    if not isinstance(name, str):
        raise InvalidName(f"{kind}: a name must be text, not {type(name).__name__}", kind=kind)
    if _NAME.fullmatch(name) and ".." not in name:
        return name
    if not name:
        why = "it is empty"
    elif len(name) > NAME_CHARS_MAX:
        why = f"it has {len(name)} characters"
    elif ".." in name:
        why = 'it holds ".."'
    else:
        why = "it holds or begins with a character that is not allowed"
    shown = shorten(name, NAME_CHARS_SHOWN_MAX)
    raise InvalidName(
        f"{kind} {shown!r}: {why}; a name has 1 to {NAME_CHARS_MAX} characters of A-Z a-z 0-9 _ . @ : + = -, "
        f'begins with a letter, a digit or _, and holds no ".."',
        kind=kind,
    )


@dataclass(frozen=True, order=True, slots=True)
class UserKey:
    """One user of one tenant; both names are valid, always. Raises `InvalidName`."""

    tenant: str
    user: str

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("user", self.user)

    def __str__(self) -> str:
        return f"{self.tenant}/{self.user}"

    @classmethod
    def parse(cls, text: str) -> UserKey:
        """The key of `"tenant/user"`."""
        tenant, slash, user = text.partition("/")
        if not slash:
            raise InvalidName(
                f"{shorten(text, NAME_CHARS_SHOWN_MAX)!r}: expected tenant/user", kind="user key"
            )
        return cls(tenant, user)


def bucket_of(key: UserKey) -> int:
    """The bucket of a user, 0 to `BUCKETS` - 1: the same in every process and release."""
    return xxhash.xxh3_64_intdigest(str(key).encode()) % BUCKETS
