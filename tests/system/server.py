"""The real `titanmem` command in processes of its own: a server that can be killed, and commands beside it.

A server leads a session of its own, and Ray's processes stay in it: so all of them can be found, and nothing else
on the machine is ever touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import free_port

TITANMEM = str(Path(sys.executable).parent / "titanmem")
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 150.0
KILL_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 300.0
LOG_CHARS_MAX = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would configure a server or its traces, and `more`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TITANMEM_", "OTEL_", "RAY_"))}
    return {**kept, **more}


def run(*arguments: str, **more: str) -> Ended:
    """One `titanmem` command, run to its end; `more` is environment."""
    done = subprocess.run(
        [TITANMEM, *arguments],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    return Ended(code=done.returncode, out=done.stdout, err=done.stderr)


def members(session: int) -> list[int]:
    """Living processes of a session, and descendants of its leader that may have left it."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        # pid (name) state ppid pgrp session …; the name may hold spaces and parentheses
        state, parent, _, its_session = stat.rpartition(")")[2].split()[:4]
        if state not in "ZX":
            parents[int(entry.name)] = int(parent)
            if int(its_session) == session:
                found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in {session, *found}} - found:
        found |= more
    return sorted(found)


def kill_all(session: int) -> int:
    """SIGKILL to every process of a session until none lives; how many were there at first."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    first = living = members(session)
    while living:
        for pid in living:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes that SIGKILL does not end: {living}")
        time.sleep(0.02)
        living = members(session)
    return len(first)


class Server:
    """`titanmem serve` on a port, a store and journals that stay the same however often it is started."""

    def __init__(self, folder: Path, *, shards: int = 1, store: str | None = None, **env: str) -> None:
        """`store` is a URL; without one it is a folder of its own."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store, self.journals = folder / "store", folder / "journal"
        self.snapshots = f"file://{folder}/snapshots"
        self._folder = folder
        self._arguments = [
            "--port",
            str(self.port),
            "--shards",
            str(shards),
            "--store",
            store or f"file://{self.store}",
        ]
        # Sockets lie in Ray's folder, and their paths may not be long: not below pytest's.
        self._ray = tempfile.mkdtemp(prefix="tm-", dir="/tmp")
        self._env = environment(
            TITANMEM_JOURNAL_DIR=str(self.journals),
            TITANMEM_SNAPSHOTS=self.snapshots,
            RAY_TMPDIR=self._ray,
            **env,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    def start(self) -> float:
        """Returns when `/readyz` says 200; seconds that took. Raises with the server's own words if it ends."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        self._starts += 1
        began = time.monotonic()
        with open(self._log("out"), "wb") as out, open(self._log("err"), "wb") as err:
            self._process = subprocess.Popen(
                [TITANMEM, "serve", *self._arguments],
                env=self._env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > began + READY_TIMEOUT_S:
                code = self._process.poll()
                self.kill()
                raise RuntimeError(f"the server is not ready (exit code {code}):\n{self.said()}")
            time.sleep(0.2)
        return time.monotonic() - began

    def stop(self) -> int:
        """Ctrl-C, as a terminal sends it: SIGINT to the whole foreground group. The exit code."""
        assert self._process is not None, "it was never started"
        os.killpg(self._process.pid, signal.SIGINT)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(
                f"the server does not end within {STOP_TIMEOUT_S:g} s:\n{self.said()}"
            ) from None

    def kill(self) -> int:
        """`kill -9` for every process of the server; how many there were."""
        if self._process is None:
            return 0
        count = kill_all(self._process.pid)
        self._process.wait(KILL_TIMEOUT_S)
        return count

    def processes(self) -> list[int]:
        """All living processes of the server: the command, Ray's daemons and workers."""
        return members(self._process.pid) if self._process is not None else []

    def logged(self) -> list[str]:
        """The lines of the logs of coordinator, shards and doors, of the last start; gone after `close`."""
        session = max(Path(self._ray).glob("ray/session_2*"))
        texts = [file.read_text(errors="replace") for file in sorted(session.glob("logs/worker-*.err"))]
        return [line for text in texts for line in text.splitlines() if not line.startswith(":")]

    def said(self) -> str:
        """What the last start has written, the end of it."""
        texts = [self._log(name).read_text(errors="replace") for name in ("out", "err")]
        return "\n".join(text[-LOG_CHARS_MAX:] for text in texts)

    def wipe(self) -> None:
        """Removes store and journals, as the loss of the disk does."""
        for folder in (self.store, self.journals):
            shutil.rmtree(folder)

    def close(self) -> None:
        """Ends whatever runs still, and removes Ray's folder."""
        self.kill()
        shutil.rmtree(self._ray, ignore_errors=True)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _log(self, name: str) -> Path:
        return self._folder / f"serve-{self._starts}.{name}"


def serve_until_it_fails(
    folder: Path, arguments: Sequence[str], env: Mapping[str, str]
) -> tuple[Ended, list[int]]:
    """A `titanmem serve` that must end by itself, and the processes that it left behind (which are then ended)."""
    process = subprocess.Popen(
        [TITANMEM, "serve", *arguments],
        env=environment(TITANMEM_JOURNAL_DIR=str(folder / "journal"), **env),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
        return Ended(code=process.returncode, out=out, err=err), members(process.pid)
    finally:
        kill_all(process.pid)
        process.communicate()
