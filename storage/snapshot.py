"""The cold backup: θ_F and the θ_M of all users, as Parquet over any `Objects`; the room's door to it.

    <snapshot id>/part-<shard>-e<epoch>.parquet     model and users of one shard (`snapshot_part`, `snapshot_model`)
    <snapshot id>/manifest.json                     written last, once: from then on the snapshot exists
    forgotten/<tenant>/<user>                       erased: what snapshots hold stays away (`snapshot_marks`)

A job calls `write_part` for each shard, `commit_manifest`, and `prune`; an operator `verify` and `restore`.
"""

from storage.retention import choose_kept, prune, sweep
from storage.snapshot_erase import erase_marked
from storage.snapshot_manifest import (
    Manifest,
    PartInfo,
    commit_manifest,
    find_at,
    list_snapshots,
    new_snapshot_id,
    read_manifest,
    write_part,
)
from storage.snapshot_restore import check_parts, restore, restore_model
from storage.snapshot_verify import verify

__all__ = [
    "Manifest",
    "PartInfo",
    "check_parts",
    "choose_kept",
    "commit_manifest",
    "erase_marked",
    "find_at",
    "list_snapshots",
    "new_snapshot_id",
    "prune",
    "read_manifest",
    "restore",
    "restore_model",
    "sweep",
    "verify",
    "write_part",
]
