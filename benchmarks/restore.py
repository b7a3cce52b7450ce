"""A disaster, drilled: many users of real size are backed up, all is wiped, and they come back onto other shards.

    python benchmarks/restore.py [--users 1000] [--shards 4] [--onto 7] [--seed 0] [--stores file s3] [--json FILE]

Each user has a memory of the shipped shape: 1,048,576 elements, of which as many are written as 50 to 600 chunks leave
that write 1 to 10 tokens each (128 columns a token, most of which others use too), and a reservoir of at most 2,048
entries. They are stored, a snapshot of `--shards` parts is made by the product's code, the store is deleted, and one
process, `titanmem snapshot restore`, brings everybody back; another one, `titanmem snapshot verify`, reads all of it.
Then a hash of all bits of each memory (θ_M, momentum, reservoir, tail, hashes of what was seen, counts and version) is
compared with the one from before, by the shard of `--onto` that owns the user. The S3 is ministack, on this machine,
and takes its share of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import xxhash  # noqa: E402

from benchmarks.report import report  # noqa: E402
from cluster.shardmap import first_map, plan  # noqa: E402
from storage.memory import Memory, Replay  # noqa: E402
from storage.names import UserKey  # noqa: E402
from storage.objects import open_objects  # noqa: E402
from storage.snapshot import commit_manifest, new_snapshot_id, write_part  # noqa: E402
from storage.store import MemoryStore, open_store  # noqa: E402
from tests.servers import ministack  # noqa: E402

SHAPE = ((256, 128), (8192, 256), (8192, 128))
WRITTEN = SHAPE[-1][0] * SHAPE[-1][1]
OFFSET = sum(rows * columns for rows, columns in SHAPE[:-1])
ACTIVE, TOKENS_A_CHUNK_MAX, RESERVOIR, WINDOW = 128, 10, 2048, 256
CHUNKS = (50, 600)
BASE = "0" * 32
EPOCH = 3
LIMIT_S = 60.0


def key_of(number: int) -> UserKey:
    return UserKey(("acme", "local")[number % 2], f"user-{number:05d}")


def memory_of(number: int, seed: int) -> Memory:
    """User `number`, always the same for a seed. Codes are drawn so that some units are used far more than others."""
    rng = np.random.default_rng((seed, number))
    chunks = int(rng.integers(*CHUNKS, endpoint=True))
    tokens = int(chunks * rng.uniform(1.0, TOKENS_A_CHUNK_MAX))
    share = 1.0 - (1.0 - ACTIVE / SHAPE[-1][0]) ** (tokens / 4)
    rows = np.sort(rng.choice(SHAPE[-1][0], max(ACTIVE, int(share * SHAPE[-1][0])), replace=False))
    positions = (rows[:, None] * SHAPE[-1][1] + np.arange(SHAPE[-1][1])).reshape(-1)
    entries = min(RESERVOIR, tokens)
    columns = np.sort(rng.integers(0, SHAPE[-1][0], (entries, ACTIVE)), axis=1).astype(np.int32)
    return Memory(
        key=key_of(number), memory_version=chunks, epoch=EPOCH, last_chunk_id=chunks, tokens_seen=256 * chunks,
        base=BASE, rule="sparse", theta_shape=SHAPE, written_layers=(2,),
        created_at=datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
        nonzero_idx=(positions + OFFSET).astype(np.int64),
        theta_val=(rng.standard_normal(len(positions)) * 0.05 + 1e-4).astype(np.float16),
        momentum=np.array([0.0, 0.0, 0.3], np.float16),
        replay=Replay(
            columns=columns, values=rng.random((entries, ACTIVE)).astype(np.float16),
            tokens=rng.integers(0, 8000, entries).astype(np.int32), gates=rng.random(entries).astype(np.float16),
        ),
        tail=rng.integers(0, 8000, WINDOW).astype(np.int32),
        seen=rng.integers(0, 2**64, chunks, dtype=np.uint64),
        stats={"tokens_written": float(tokens), "updates": float(tokens)},
    )  # fmt: skip


def digest(memory: Memory) -> str:
    """Of all bits of a memory; not of the epoch under which it was written."""
    replay = memory.replay
    arrays = [memory.nonzero_idx, memory.theta_val, memory.momentum, memory.tail, memory.seen]
    arrays += [replay.columns, replay.values, replay.tokens, replay.gates] if replay else []
    about = (
        memory.key,
        memory.memory_version,
        memory.last_chunk_id,
        memory.tokens_seen,
        sorted(memory.stats.items()),
    )
    whole = xxhash.xxh3_128(repr(about).encode())
    for array in arrays:
        whole.update(f"{array.dtype}{array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def titanmem(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """A command in a process of its own: its JSON, seconds from start to end, and seconds of processor time."""
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", *arguments, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took_s = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"titanmem {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return json.loads(done.stdout), took_s, cpu_s


def back_up(store: MemoryStore, target_url: str, shards: int, users: int) -> tuple[str, int]:
    """A snapshot as the shards make it; its id and bytes."""
    target, now = open_objects(target_url), datetime.datetime.now(datetime.UTC)
    snapshot_id, owner = new_snapshot_id(now), first_map(shards)
    parts = [
        write_part(
            target, snapshot_id, shard=f"shard-{shard}", epoch=EPOCH, model_dir=None,
            memories=(store.get_bytes(key) for key in store.users() if owner.owner_of(key) == shard),
        )
        for shard in range(shards)
    ]  # fmt: skip
    manifest = commit_manifest(target, snapshot_id, parts, created_at=now, base=BASE)
    assert manifest.users == users, "everybody is in the snapshot"
    return snapshot_id, manifest.bytes


def wiped(store: MemoryStore) -> None:
    for info in list(store.objects.list()):
        store.objects.delete(info.name)


def drill(store_url: str, target_url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All steps on one kind of store."""

    def say(text: str) -> None:
        print(f"{store_url.partition(':')[0]}: {text}", file=sys.stderr, flush=True)

    store, users = open_store(store_url), options.users
    before: dict[UserKey, str] = {}
    filled = 0
    for number in range(users):
        memory = memory_of(number, options.seed)
        before[memory.key] = digest(memory)
        filled += len(memory.nonzero_idx)
        store.put(memory, epoch=EPOCH)
    say(f"{users} users are stored")
    started = time.perf_counter()
    snapshot_id, size = back_up(store, target_url, options.shards, users)
    made_s = time.perf_counter() - started
    say(f"a snapshot of {size:,} bytes in {made_s:.1f} s; now everything goes")
    wiped(store)
    assert next(store.users(), None) is None, "nothing is left"
    where = (snapshot_id, "--target", target_url)
    report, restored_s, restore_cpu_s = titanmem("snapshot", "restore", *where, "--store", store_url)
    say(f"restored in {restored_s:.1f} s")
    verified, verified_s, verify_cpu_s = titanmem("snapshot", "verify", *where)
    say(f"verified in {verified_s:.1f} s")
    onto = plan(first_map(options.shards), options.onto)
    fresh, equal = open_store(store_url), 0
    per_shard = [0] * options.onto
    for key in fresh.users():
        per_shard[onto.owner_of(key)] += 1
        equal += digest(fresh.get(key)) == before.get(key)
    return {
        "users": users, "restored": report["restored"], "failed": report["failed_count"],
        "hashes_equal": equal, "hashes_equal_share": equal / users, "shards": options.shards, "onto": options.onto,
        "users_per_shard": per_shard, "elements_written_share": filled / users / WRITTEN, "snapshot_bytes": size,
        "restored_bytes": report["bytes"], "snapshot_s": round(made_s, 2), "restore_s": round(restored_s, 2),
        "verify_s": round(verified_s, 2), "restore_cpu_s": round(restore_cpu_s, 2),
        "verify_cpu_s": round(verify_cpu_s, 2), "verify_ok": verified["ok"],
    }  # fmt: skip


@contextlib.contextmanager
def urls(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """URLs of an empty store and of a place for snapshots."""
    if kind == "file":
        yield f"file://{folder}/store", f"file://{folder}/snapshots"
        return
    (folder / "ministack").mkdir()
    with ministack(folder / "ministack") as server:
        server.make_bucket("titanmem")
        yield server.url("titanmem", "store"), server.url("titanmem", "snapshots")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--onto", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", nargs="+", choices=("file", "s3"), default=["file", "s3"])
    parser.add_argument("--folder", type=Path, help="where the files go; default: where temporary files do")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for kind in options.stores:
        folder = Path(tempfile.mkdtemp(prefix="titanmem-restore-", dir=options.folder))
        try:
            with urls(kind, folder) as (store_url, target_url):
                results[kind] = drill(store_url, target_url, options)
        finally:
            shutil.rmtree(folder)
    faults = [
        f"{kind}: {found['hashes_equal']} of {found['users']} memories are equal"
        for kind, found in results.items()
        if found["hashes_equal"] != found["users"] or not found["verify_ok"]
    ]
    slow = {kind: found["restore_s"] for kind, found in results.items() if found["restore_s"] > LIMIT_S}
    faults += [f"{kind}: restored in {took_s} s, over {LIMIT_S:g}" for kind, took_s in slow.items()]
    document = {
        "fill": f"{CHUNKS[0]} to {CHUNKS[1]} chunks, reservoir of at most {RESERVOIR} entries",
        "stores": results, "faults": faults,
    }  # fmt: skip
    report(document, options.json)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
