"""Erasures that are killed at every step, and asked again; for a process of its own, which forks.

A step is one call that changes something on a disk: of SQLite (BEGIN, COMMIT, VACUUM, a checkpoint), or a rename, a
removal or a flush of a file. The process is ended by SIGKILL before the n-th step of a `forget`, for every n until
there are no more.
"""

from __future__ import annotations

import asyncio
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import actors.erasure
import actors.guard
from actors.keeper import MemoryKeeper, open_keeper
from actors.messages import IngestCall
from actors.options import KeeperOptions
from storage.errors import NoSuchMemory
from storage.journal_writer import JournalWriter
from storage.local import LocalObjects
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import PartInfo, commit_manifest, new_snapshot_id, restore
from storage.store import open_store
from tests.actors.crash_life import digest_of
from tests.actors.traces import Traces, in_folder
from tests.tiny_model import tiny_folder
from titanmem.folder import load_decoder

ZAPHOD, NAMESAKE, TRILLIAN = (
    UserKey("local", "zaphod-beeblebrox"), UserKey("acme", "zaphod-beeblebrox"), UserKey("local", "trillian")
)  # fmt: skip
OTHERS = (NAMESAKE, TRILLIAN)
STEPS_MAX = 500
_CHANGES = ("BEGIN", "COMMIT", "VACUUM", "PRAGMA wal_checkpoint")


def call_of(key: UserKey, seed: int, n: int) -> IngestCall:
    rng = np.random.default_rng((seed, n, len(str(key))))
    tokens = rng.integers(4, 300, 60).astype(np.int32)
    return IngestCall(key=key, update_id=f"piece{n}", conversation="book", tokens=tokens)


class Stepper:
    """Ends this process before the `nth` step, once it counts; 0 = never."""

    def __init__(self, nth: int) -> None:
        self.nth, self.steps, self.counts = nth, 0, False
        self._lock = threading.Lock()

    def step(self) -> None:
        if not self.counts:
            return
        with self._lock:
            self.steps += 1
            if self.steps == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()

    def arm(self) -> None:
        stepper = self

        class Tapped(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                if sql.startswith(_CHANGES):
                    stepper.step()
                return super().execute(sql, *values)

        for name in ("replace", "unlink", "rmdir", "fsync"):
            setattr(os, name, self._before(getattr(os, name)))
        setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Tapped))  # noqa: B010

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def stepping(*arguments: Any, **named: Any) -> Any:
            self.step()
            return call(*arguments, **named)

        return stepping


def _options(folder: Path, model: Path, epoch: int) -> KeeperOptions:
    return KeeperOptions(
        model=str(model), store_url=f"file://{folder}/store", journal_dir=str(folder / "journal"), shard="shard-0",
        epoch=epoch, slots=4, spec_overrides={"surprise_threshold": 0.05}, idle_flush_s=3600.0,
        consolidate_after_s=0.0, durability="sync", snapshots_url=f"file://{folder}/snapshots",
    )  # fmt: skip


async def _bits(keeper: MemoryKeeper) -> list[str]:
    return [await digest_of(keeper, key) for key in OTHERS]


async def _live(folder: Path, model: Path, seed: int) -> None:
    """Three users with versions, segments and a snapshot; then nothing is closed."""
    keeper = await open_keeper(_options(folder, model, 1))
    traces = Traces(key=ZAPHOD)
    for n in range(1, 6):
        for key in (ZAPHOD, *OTHERS):
            call = call_of(key, seed, n)
            await keeper.ingest(call)
            if key == ZAPHOD:
                traces.told(call.tokens, f"piece {n}")
        if n < 4:
            await keeper.flush()
            traces.rests(keeper.roster.vault.store.get_bytes(ZAPHOD), f"version {n}")
        if n == 3:
            url, now = keeper.options.snapshots_url, datetime.now(UTC)
            part = await keeper.snapshot_part(new_snapshot_id(now), url, False)
            info = PartInfo.from_dict({name: value for name, value in part.items() if name != "base"})
            commit_manifest(
                open_objects(url), info.name.partition("/")[0], [info], created_at=now, base=part["base"]
            )
    # What a crash in the middle of a write leaves.
    half = keeper.roster.vault.store.get_bytes(ZAPHOD)
    (folder / f"store/users/{ZAPHOD}/.write-0123456789abcdef").write_bytes(half[: len(half) // 2])
    needles = {label: needle.hex() for label, needle in traces.needles.items()}
    (folder / "lived.json").write_text(json.dumps({"needles": needles, "bits": await _bits(keeper)}))
    os.kill(os.getpid(), signal.SIGKILL)


async def _forget(folder: Path, model: Path, nth: int, resident: bool) -> None:
    """Opens and erases, until it is killed."""
    stepper = Stepper(nth)
    stepper.arm()
    keeper = await open_keeper(_options(folder, model, 2))
    if resident:
        await keeper.describe(ZAPHOD)
    stepper.counts = True
    await keeper.forget(ZAPHOD)
    stepper.counts = False
    (folder / "steps").write_text(str(stepper.steps))
    os.kill(os.getpid(), signal.SIGKILL)


async def _after(folder: Path, model: Path, comes: bool) -> None:
    """The next start: the user comes, or the same request does; in the end nobody is left but the others."""
    keeper = await open_keeper(_options(folder, model, 3))
    tokens_seen = 0
    if comes:
        try:
            tokens_seen = (await keeper.describe(ZAPHOD))["tokens_seen"]
        except NoSuchMemory:
            tokens_seen = 0
    receipt = await keeper.forget(ZAPHOD)
    bits = await _bits(keeper)
    report = {"tokens_seen": tokens_seen, "bits": bits, "marked": receipt["snapshots_marked"]}
    (folder / "after.json").write_text(json.dumps(report))
    os.kill(os.getpid(), signal.SIGKILL)  # an orderly end would tidy up


def _leaves_half_written_files() -> None:
    setattr(LocalObjects, "sweep", lambda *_, **__: [])  # noqa: B010


def _leaves_freed_pages() -> None:
    setattr(JournalWriter, "_erase_traces", lambda _: None)  # noqa: B010


def _forgets_the_backups() -> None:
    setattr(actors.erasure, "mark", lambda *_: None)  # noqa: B010


FAULTS: dict[str, Callable[[], None]] = {
    "leaves-half-written-files": _leaves_half_written_files,
    "leaves-freed-pages": _leaves_freed_pages,
    "forgets-the-backups": _forgets_the_backups,
}
"""To plant in the product: a drill that can not fail proves nothing."""


def _run(fault: str, work: Callable[..., Any], *arguments: Any) -> None:
    if fault:
        FAULTS[fault]()
    actors.guard.has_fallen = lambda asked, answered: False
    asyncio.run(work(*arguments))


@dataclass(kw_only=True)
class Drill:
    """All kills of one run. `every`: only each so-manieth step is a point to die at."""

    folder: Path
    seed: int
    every: int = 1
    fault: str = ""
    kills: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._processes = multiprocessing.get_context("fork")
        self._model = self.folder / "model"

    def run(self, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Kills at all steps; whether anything was found is in `faults`."""
        tiny_folder(self._model)
        load_decoder(self._model)  # torch imports now what each life would
        lived = self.folder / "lived"
        lived.mkdir(parents=True)
        assert self._fork(_live, lived, self._model, self.seed) == -signal.SIGKILL
        known = json.loads((lived / "lived.json").read_text())
        traces = Traces(key=ZAPHOD)
        traces.needles |= {label: bytes.fromhex(needle) for label, needle in known["needles"].items()}
        there = len(traces.found(self._places(lived)))
        nth, ended = 1, False
        while not ended and nth < STEPS_MAX:
            comes = bool(nth // self.every % 2)
            folder = self.folder / f"step-{nth}"
            shutil.copytree(lived, folder)
            ended = (
                self._fork(_forget, folder, self._model, nth, comes) == -signal.SIGKILL
                and (folder / "steps").exists()
            )
            self.kills += not ended
            if self._fork(_after, folder, self._model, comes) != -signal.SIGKILL:
                self.faults.append(f"step {nth}: the next start failed")
            else:
                self._judge(folder, nth, known, traces)
            say(f"step {nth}: {'no more steps' if ended else 'killed'}; {len(self.faults)} faults")
            shutil.rmtree(folder)
            nth += self.every
        return {
            "seed": self.seed, "kills": self.kills, "every": self.every, "steps": nth - 1,
            "needles": len(traces.needles), "needles_found_before": there, "faults": self.faults[:20],
        }  # fmt: skip

    def _judge(self, folder: Path, nth: int, known: dict[str, Any], traces: Traces) -> None:
        after = json.loads((folder / "after.json").read_text())
        whole = 5 * 60
        if after["tokens_seen"] not in (0, whole):
            self.faults.append(f"step {nth}: half erased: {after['tokens_seen']} of {whole} tokens came back")
        if after["bits"] != known["bits"]:
            self.faults.append(f"step {nth}: others have changed")
        if not after["marked"]:
            self.faults.append(f"step {nth}: the backups are not marked")
        for label, places in traces.found(self._places(folder)).items():
            self.faults.append(f"step {nth}: {label} is in {places}")
        target = open_objects(f"file://{folder}/snapshots")
        (snapshot_id,) = {info.name.partition("/")[0] for info in target.list() if "part-" in info.name}
        report = restore(target, snapshot_id, open_store(f"file://{folder}/restored"), epoch=9)
        if report["forgotten"] != [str(ZAPHOD)] or report["restored"] != len(OTHERS):
            self.faults.append(f"step {nth}: a restore gave {report}")

    def _places(self, folder: Path) -> Any:
        for name in ("store", "journal"):
            yield from in_folder(folder / name)

    def _fork(self, work: Callable[..., Any], *arguments: Any) -> int | None:
        process = self._processes.Process(target=_run, args=(self.fault, work, *arguments))
        process.start()
        process.join(120)
        process.kill()
        process.join()
        return process.exitcode
