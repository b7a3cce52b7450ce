"""Snapshots while everybody is being told something: how long updates wait, and what the snapshots hold.

    python benchmarks/snapshot_load.py [--users 16] [--seconds 20] [--seed 0] [--json FILE]

A real keeper (no Ray) with the model that is shipped; every user is told pieces of 48 tokens without a pause, each
acknowledged before the next. For the first half nothing else happens, in the second one snapshots are made one after
another. A user is in each snapshot once, with the bytes of a version that was stored, and no older than what was
acknowledged when the snapshot was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

import actors.guard  # noqa: E402
from actors.keeper import MemoryKeeper, open_keeper  # noqa: E402
from actors.messages import IngestCall  # noqa: E402
from actors.options import KeeperOptions  # noqa: E402
from benchmarks.report import report  # noqa: E402
from storage.head import hash_of  # noqa: E402
from storage.names import UserKey  # noqa: E402
from storage.objects import open_objects  # noqa: E402
from storage.snapshot import PartInfo, commit_manifest, new_snapshot_id, verify  # noqa: E402
from storage.snapshot_part import open_part  # noqa: E402

PIECE_TOKENS = 48
MODEL = ROOT / "titanmem" / "default_model"


def key_of(user: int) -> UserKey:
    return UserKey("local", f"user-{user:03d}")


class Load:
    """The clients of one keeper, and what they saw."""

    def __init__(self, keeper: MemoryKeeper, users: int, seed: int) -> None:
        self.keeper, self._seed = keeper, seed
        self.acknowledged = [0] * users
        self.waits_s: dict[str, list[float]] = {"without": [], "during": []}
        self.phase = "without"
        self.ends = False

    async def tell(self, user: int) -> None:
        """One client, until `ends`."""
        while not self.ends:
            n = self.acknowledged[user] + 1
            rng = np.random.default_rng((self._seed, user, n))
            call = IngestCall(
                key=key_of(user), update_id=f"piece{n}", conversation="book",
                tokens=rng.integers(300, 8000, PIECE_TOKENS).astype(np.int32),
            )  # fmt: skip
            phase, started = self.phase, time.perf_counter()
            await self.keeper.ingest(call)
            self.waits_s[phase].append(time.perf_counter() - started)
            self.acknowledged[user] = n


async def drill(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    actors.guard.has_fallen = lambda asked, answered: False  # random ids crowd a memory, and nobody asks here
    url = f"file://{folder}/snapshots"
    target = open_objects(url)
    settings = KeeperOptions(
        model=str(MODEL), store_url=f"file://{folder}/store", journal_dir=str(folder / "journal"), shard="shard-0",
        epoch=1, slots=options.users, persist_tokens=1024, consolidate_after_s=0.0,
    )  # fmt: skip
    keeper = await open_keeper(settings)
    store, stored = keeper.roster.vault.store, set()
    put = store.put

    def noted(*arguments: Any, **named: Any) -> Any:
        info = put(*arguments, **named)
        stored.add(info.hash)
        return info

    store.put = noted
    load = Load(keeper, options.users, options.seed)
    clients = [asyncio.create_task(load.tell(user)) for user in range(options.users)]
    await asyncio.sleep(options.seconds / 2)
    load.phase = "during"
    deadline, snapshots, faults = time.monotonic() + options.seconds / 2, [], []
    while time.monotonic() < deadline or not snapshots:
        now, before = datetime.datetime.now(datetime.UTC), list(load.acknowledged)
        started = time.perf_counter()
        part = await keeper.snapshot_part(new_snapshot_id(now), url, False)
        took_s = time.perf_counter() - started
        info = PartInfo.from_dict({name: value for name, value in part.items() if name != "base"})
        snapshot_id = info.name.partition("/")[0]
        commit_manifest(target, snapshot_id, [info], created_at=now, base=part["base"])
        snapshots.append((snapshot_id, info, before, took_s))
    load.ends = True
    await asyncio.gather(*clients)
    await keeper.close()
    rows = 0
    for snapshot_id, info, before, _ in snapshots:
        held: dict[UserKey, int] = {}
        with open_part(target, info.name) as reader:
            for row in reader.rows():
                rows += 1
                if hash_of(row.data) not in stored:
                    faults.append(f"{snapshot_id}: {row.name}: no version that was stored")
            for at in reader.users():
                if at.key in held:
                    faults.append(f"{snapshot_id}: {at.key}: twice")
                held[at.key] = at.memory_version
        for user, count in enumerate(before):
            if held.get(key_of(user), 0) < count:
                faults.append(
                    f"{snapshot_id}: {key_of(user)}: {held.get(key_of(user), 0)} of {count} updates"
                )
        if not verify(target, snapshot_id)["ok"]:
            faults.append(f"{snapshot_id}: damaged")
    return {
        "users": options.users, "updates": sum(load.acknowledged), "snapshots": len(snapshots), "rows": rows,
        "snapshot_s": [round(took_s, 2) for *_, took_s in snapshots],
        "wait_ms": {phase: quantiles(waits) for phase, waits in load.waits_s.items()}, "faults": faults[:20],
    }  # fmt: skip


def quantiles(waits_s: list[float]) -> dict[str, float]:
    p50, p99, most = np.quantile(waits_s, [0.5, 0.99, 1.0]) * 1000
    return {"count": len(waits_s), "p50": round(p50, 1), "p99": round(p99, 1), "longest": round(most, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="titanmem-load-") as folder:
        found = asyncio.run(drill(Path(folder), options))
    report(found, options.json)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
