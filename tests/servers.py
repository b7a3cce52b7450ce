"""Real servers for tests: started on a free port of 127.0.0.1, ended with the test session."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_TIMEOUT_S = 90.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Server:
    """A running ministack; `environment` is what a client process needs."""

    endpoint: str
    environment: dict[str, str]

    def make_bucket(self, name: str) -> None:
        import boto3

        boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1").create_bucket(Bucket=name)

    def url(self, bucket: str, prefix: str = "") -> str:
        """A store's URL in `bucket`, which must exist."""
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&region=us-east-1"


def _wait_until_ready(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"ministack did not start: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{endpoint}/_ministack/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[S3Server]:
    """An S3 that honours conditional writes and checks checksums; logs and data stay in `folder`.

    Sets the credentials of `S3_ENVIRONMENT` in this process too, and puts back what was there at the end.
    """
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in S3_ENVIRONMENT}
    own = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "TMPDIR": str(folder)}
    log = folder / "ministack.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "ministack"],
            env={**os.environ, **own, "S3_DATA_DIR": str(folder / "s3"), "HOME": str(folder)},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(process, endpoint, log)
        os.environ.update(S3_ENVIRONMENT)
        yield S3Server(endpoint=endpoint, environment=dict(S3_ENVIRONMENT))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
