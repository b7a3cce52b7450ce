"""Verifying a cold backup: everything is read back, every checksum checked, every memory decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xxhash

from storage.errors import BadMemoryFile, SnapshotDamaged
from storage.objects import Objects
from storage.snapshot_manifest import PartInfo, read_manifest
from storage.snapshot_model import assemble
from storage.snapshot_part import Row, open_part
from storage.snapshot_threads import in_threads
from storage.titanmem import Memory, decode

PROBLEMS_SHOWN_MAX = 100
HASH_BLOCK_BYTES = 8 << 20

Progress = Callable[[int, int], None]
"""Called with how many users are done, of how many."""
Probe = Callable[[Memory], float | None]
"""Share of recall probes that a memory answers; None when it has none."""


def verify(
    target: Objects, snapshot_id: str, *, probe: Probe | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads everything back and checks each checksum, each memory, each file of the model.

    The report's `ok` is False when there are `problems`; `recall` is the mean of what `probe` gave. Raises
    `NoSuchSnapshot`, and `SnapshotDamaged` when the manifest itself can not be read.
    """
    manifest = read_manifest(target, snapshot_id)
    problems: list[str] = []
    recalls: list[float] = []
    files = users = 0
    for part in manifest.parts:
        try:
            check_file(target, part)
            with open_part(target, part.name) as reader:
                found = len(assemble(reader.model_rows(), problems))
                if found != part.model_files:
                    problems.append(f"{part.name}: expected {part.model_files} model files, found {found}")
                files += found
                found = 0
                rows = (row for row in reader.rows() if row.kind == "user")
                for problem, recall in in_threads(lambda row: _check_user(row, part, probe), rows):  # noqa: B023
                    problems += [problem] if problem else []
                    recalls += [] if recall is None else [recall]
                    found += 1
                    if progress:
                        progress(users + found, manifest.users)
            users += found
            if found != part.users:
                problems.append(f"{part.name}: expected {part.users} users, found {found}")
        except SnapshotDamaged as error:
            problems.append(str(error))
    return {
        "id": snapshot_id,
        "ok": not problems,
        "users": users,
        "model_files": files,
        "parts": len(manifest.parts),
        "bytes": manifest.bytes,
        "base": manifest.base,
        "probes": len(recalls),
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "problems": problems[:PROBLEMS_SHOWN_MAX],
        "problem_count": len(problems),
    }


def check_file(target: Objects, part: PartInfo) -> None:
    """The part as bytes, against size and hash of the manifest. Raises `SnapshotDamaged`."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with target.open_read(part.name) as raw:
            while block := raw.read(HASH_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except FileNotFoundError as error:
        raise SnapshotDamaged(f"{part.name}: this part is missing", part=part.name) from error
    if (size, digest.hexdigest()) != (part.bytes, part.hash):
        raise SnapshotDamaged(
            f"{part.name}: expected {part.bytes} bytes with hash {part.hash}, found {size} bytes with hash "
            f"{digest.hexdigest()}. Take another snapshot.",
            part=part.name,
        )


def _check_user(row: Row, part: PartInfo, probe: Probe | None) -> tuple[str, float | None]:
    """What is wrong with a row, and the recall of the memory in it."""
    try:
        memory = decode(row.data, name=f"{part.name}: {row.name}")
    except BadMemoryFile as error:
        return str(error), None
    problem = ""
    if str(memory.key) != row.name:
        problem = f"{part.name}: row {row.name} holds the memory of {memory.key}"
    return problem, probe(memory) if probe else None
