"""Which store this is: a name in the store, and the same name beside the journals that continue its memories.

A store that is not mounted, or whose bucket somebody has emptied, looks new. Journals know better: what they hold
continues memories of the store that they were written beside, and no other one.

cluster/store (a record in the store)       {"id": "9f86d081884c7d65"}, written once
<journal folder>/store.json                 the same, and the URL under which it was seen
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path

from storage.disk import flush_folder
from storage.errors import VersionConflict, WrongStore
from storage.records import RecordStore

RECORD = "cluster/store"
MARKER = "store.json"


def check_store(store: RecordStore, journal_dir: Path) -> str | None:
    """The store's id, None if it has none yet. Changes nothing.

    Raises `WrongStore` when the journals in `journal_dir` belong to another store, and `OSError`.
    """
    # The marker first: another shard may write both meanwhile, and it writes the record before the marker.
    known = _known(journal_dir / MARKER)
    found = store.read_record(RECORD)
    id_ = str(found[0]["id"]) if found is not None else None
    if known is None or known["id"] == id_:
        return id_
    what = "this store is empty or new" if id_ is None else f"this is store {id_}"
    raise WrongStore(
        f"{store.url}: {what}, and the journals in {journal_dir} belong to store {known['id']} "
        f"(last at {known['url']}). Is its disk mounted, and the URL right? If another store is meant, for a restore "
        "or a new beginning, move the journals away: `mv` the whole folder, its store.json too.",
        expected=known["id"],
        found=id_,
    )  # fmt: skip


def recognise(store: RecordStore, journal_dir: Path) -> str:
    """`check_store`, and from now on store and journals know each other. Raises the same; the store's id."""
    id_ = check_store(store, journal_dir)
    if id_ is None:
        with contextlib.suppress(VersionConflict):  # another shard was faster
            store.write_record(RECORD, {"id": secrets.token_hex(8)}, if_absent=True)
        found = store.read_record(RECORD)
        assert found is not None, "written a moment ago, and never removed"
        id_ = str(found[0]["id"])
    if _known(journal_dir / MARKER) != (here := {"id": id_, "url": store.url}):
        _write(journal_dir / MARKER, json.dumps(here) + "\n")
    return id_


def _known(marker: Path) -> dict[str, str] | None:
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        known = None
    if not isinstance(known, dict) or not {"id", "url"} <= known.keys():
        raise WrongStore(
            f"{marker}: damaged: it says which store the journals beside it belong to. Make sure that the store is the "
            "right one, and remove it.",
            path=str(marker),
        )
    return known


def _write(marker: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    new = marker.with_name(f"{marker.name}.{secrets.token_hex(4)}.new")
    try:
        with open(new, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, marker)
    finally:
        new.unlink(missing_ok=True)
    flush_folder(marker.parent)
