"""Small JSON records in a store: HEADs, ownership, the shard map, manifests.

Each carries a nonce, so that no two writes are alike and a lost answer can be settled by reading again, and a
CRC32, so that a damaged record is an error and never a wrong answer.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import zlib
from collections.abc import Iterator
from typing import Any

from storage.errors import StoreUnavailable, StoreUnfit, VersionConflict, shorten
from storage.objects import Objects

RECORD_BYTES_MAX = 8 << 20
SWAP_ATTEMPTS_MAX = 50


def _plain(body: dict[str, Any], nonce: str) -> str:
    return json.dumps([body, nonce], sort_keys=True, separators=(",", ":"), allow_nan=False)


def _crc(body: dict[str, Any], nonce: str) -> str:
    return f"{zlib.crc32(_plain(body, nonce).encode()):08x}"


def encode_record(body: dict[str, Any]) -> bytes:
    """The bytes of a record, never the same twice. Raises `ValueError` for what JSON can not hold."""
    nonce = secrets.token_hex(8)
    try:
        text = json.dumps({"record": body, "nonce": nonce, "crc32": _crc(body, nonce)}, indent=1)
    except TypeError as error:
        raise ValueError(f"record: {error}") from error
    if len(text) > RECORD_BYTES_MAX:
        raise ValueError(f"record: {len(text)} bytes: expected at most {RECORD_BYTES_MAX}")
    return text.encode()


def decode_record(data: bytes, name: str) -> dict[str, Any]:
    """The body of a record. Raises `StoreUnfit` naming the record when it is damaged or foreign."""
    try:
        if len(data) > RECORD_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes")
        plain = json.loads(data.decode())
        body, nonce, crc = plain["record"], plain["nonce"], plain["crc32"]
        if isinstance(body, dict) and crc == _crc(body, nonce):
            return body
        reason = "its CRC32 does not fit"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = shorten(f"{type(error).__name__}: {error}")
    raise StoreUnfit(
        f"{name}: this record is damaged or not one of titanmem's: {reason}. Restore it from a snapshot; "
        "a user's HEAD can also be rebuilt from the user's versions.",
        name=name,
    )


class RecordStore:
    """Records by name, over any `Objects`; the cluster keeps its epochs, owners and map here."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.url = objects.url

    def read_record(self, name: str) -> tuple[dict[str, Any], str] | None:
        """A record and its tag, None when there is none. Raises `StoreUnfit` when it is damaged."""
        found = self.objects.get(name)
        return None if found is None else (decode_record(found[0], f"{self.url}: {name}"), found[1])

    def write_record(
        self, name: str, record: dict[str, Any], *, if_tag: str | None = None, if_absent: bool = False
    ) -> str:
        """Writes a record, returns its tag. Raises `VersionConflict` when the precondition does not hold."""
        return self.objects.put(name, encode_record(record), if_tag=if_tag, if_absent=if_absent)

    def record_names(self, prefix: str) -> Iterator[str]:
        """Names of the records, and whatever else there is, under a prefix; in order."""
        return (info.name for info in self.objects.list(prefix))

    def next_epoch(self, above: int = 0) -> int:
        """An epoch that nobody else has or will get, larger than all before and than `above`."""
        for _ in range(SWAP_ATTEMPTS_MAX):
            found = self.read_record("cluster/epoch")
            epoch = max(int(found[0]["epoch"]) if found else 0, above) + 1
            with contextlib.suppress(VersionConflict):
                tag = found[1] if found else None
                self.write_record("cluster/epoch", {"epoch": epoch}, if_tag=tag, if_absent=tag is None)
                return epoch
        raise StoreUnavailable("cluster/epoch: too many writers at once; try again", name="cluster/epoch")
