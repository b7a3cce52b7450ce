"""Tombstones: who was erased, so that neither a restore nor a late write brings them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from storage.errors import Forgotten, InvalidName, StoreUnavailable, StoreUnfit, VersionConflict
from storage.head import Head
from storage.header import write_time
from storage.names import UserKey
from storage.records import SWAP_ATTEMPTS_MAX, RecordStore

_ROOT = "tombstones/"


class Tombstones:
    """The records under `tombstones/`; one stays for good, so that old backups stay barred."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    def read(self, key: UserKey) -> tuple[dict[str, Any], str] | None:
        """The record and its tag. Raises `StoreUnfit` when it is none of ours."""
        found = self._records.read_record(_name(key))
        if found is not None and not {"epoch", "cleared", "forgotten_at"} <= set(found[0]):
            raise StoreUnfit(f"{_name(key)}: this record is no tombstone", name=_name(key))
        return found

    def raise_one(self, key: UserKey, epoch: int, now: datetime) -> None:
        """Writes the tombstone of a user, in force from now on; `erasing` until `settle`.

        From here on the user is erased, whatever becomes of whoever erases: what is left then is removed by the next
        one who meets the tombstone.
        """
        for _ in range(SWAP_ATTEMPTS_MAX):
            old = self.read(key)
            record = {
                "tenant": key.tenant,
                "user": key.user,
                "forgotten_at": write_time(now),
                "epoch": (under := max(epoch, old[0]["epoch"] if old else 0)),
                "erased_under": under,
                "cleared": False,
                "erasing": True,
            }
            with contextlib.suppress(VersionConflict):
                tag = old[1] if old else None
                self._records.write_record(_name(key), record, if_tag=tag, if_absent=old is None)
                return
        raise StoreUnavailable(f"{_name(key)}: too many writers at once; try again", name=_name(key))

    def settle(self, key: UserKey) -> None:
        """Nothing of what the user was is left: what there is from now on is a new memory's."""
        found = self.read(key)
        if found is not None and found[0].get("erasing"):
            self._records.write_record(_name(key), {**found[0], "erasing": False}, if_tag=found[1])

    def is_erasing(self, key: UserKey) -> bool:
        """Whether an erasure has begun and not come to its end."""
        found = self.read(key)
        return found is not None and bool(found[0].get("erasing"))

    def bar(self, key: UserKey, epoch: int, forgotten_at: datetime) -> None:
        """Writes down an erasure that another store has seen, unless this one knows of a later one.

        The user may begin anew; what was made before stays barred.
        """
        found = self.read(key)
        if found is not None and datetime.fromisoformat(found[0]["forgotten_at"]) >= forgotten_at:
            return
        record = {
            "tenant": key.tenant, "user": key.user, "forgotten_at": write_time(forgotten_at),
            "epoch": max(epoch, found[0]["epoch"] if found else 0), "erased_under": epoch,
            "cleared": True, "erasing": False,
        }  # fmt: skip
        tag = found[1] if found else None
        self._records.write_record(_name(key), record, if_tag=tag, if_absent=found is None)

    def users(self) -> Iterator[UserKey]:
        """All users who were ever erased, in order of their names."""
        for name in self._records.record_names(_ROOT):
            with contextlib.suppress(InvalidName):
                yield UserKey.parse(name.removeprefix(_ROOT))

    def clear(self, key: UserKey, epoch: int) -> None:
        """Lets the user begin anew; the time of the erasure stays known. Raises `Fenced`."""
        found = self.read(key)
        if found is None or found[0]["cleared"]:
            return
        Head(epoch=found[0]["epoch"], versions=()).check_epoch(key, epoch)
        record = {**found[0], "cleared": True, "erasing": False, "epoch": epoch}
        self._records.write_record(_name(key), record, if_tag=found[1])

    def admit(self, key: UserKey, epoch: int) -> None:
        """Raises `Forgotten` while the user's tombstone is in force, `Fenced` for a writer older than it."""
        found = self.read(key)
        if found is None:
            return
        Head(epoch=found[0]["epoch"], versions=()).check_epoch(key, epoch)
        if not found[0]["cleared"]:
            when = found[0]["forgotten_at"]
            raise Forgotten(f"{key}: erased at {when}, and not stored again by itself", key=str(key))


def is_from_before(stone: dict[str, Any], epoch: int, made: datetime) -> bool:
    """Whether what was written under `epoch` at `made` belongs to what the user was before the erasure `stone`.

    Epochs decide: who writes under a newer one has begun since, however wrong the clocks are. Only under the erasing
    epoch itself the time does, and that is one process, whose clock never goes back (`SteadyClock`).
    """
    under = stone.get("erased_under", stone["epoch"])
    return epoch < under or (epoch == under and made <= datetime.fromisoformat(stone["forgotten_at"]))


def _name(key: UserKey) -> str:
    return f"{_ROOT}{key.tenant}/{key.user}"
