"""`titanmem serve` as an operator runs it: killed, started again at once, asked, and stopped in order."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cluster.conftest import FAKE_KEEPER, ROOT
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

START = "from cluster.cli import main; main()"
READY_TIMEOUT_S = 120.0
ASK = {"user": "u1", "model": "titanmem-tiny", "messages": [{"role": "user", "content": "Rex"}]}


@contextmanager
def serving(folder: Path, model: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a shell starts it; whatever is left of it is killed."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TITANMEM_", "RAY_"))},
        "PYTHONPATH": str(ROOT),
        "TITANMEM_KEEPER": FAKE_KEEPER,
        "TITANMEM_SNAPSHOT_INTERVAL_S": "0",
    }
    arguments = ["serve", "--port", str(port), "--model", str(model), "--store", f"file://{folder}/store"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def lines_until(process: subprocess.Popen[str], last: str) -> list[str]:
    """What it says up to the line that begins with `last`."""
    assert process.stdout is not None
    watchdog = threading.Timer(READY_TIMEOUT_S, process.kill)
    watchdog.start()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(last):
            watchdog.cancel()
            return lines
    raise AssertionError(f"it ended with {process.wait()}: {lines}")


def test_killed_started_again_and_stopped(model_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, model_folder, port) as first:
        said = lines_until(first, "Ctrl-C")
        assert any(line.startswith(f"titanmem is ready at {url} (1 shard") for line in said)
        assert any(line.endswith(f"{url}/console") for line in said)
        assert any("curl" in line and "/v1/chat/completions" in line for line in said)
        assert len(said) == 7, said
        example = next(line.removeprefix("  try      ") for line in said if line.startswith("  try"))
        answer = subprocess.run(shlex.split(example) + ["-s"], capture_output=True, text=True, timeout=60)
        assert json.loads(answer.stdout)["titan"]["memory_version"] == 1, answer.stdout
        assert (
            httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=30).json()["titan"]["memory_version"]
            == 1
        )
        busy = subprocess.run(
            [sys.executable, "-c", START, "serve", "--port", str(port), "--model", str(model_folder)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert busy.returncode == 1
        assert f"port {port} of 127.0.0.1 cannot be used" in busy.stderr
        first.kill()
        first.wait(30)
    with serving(tmp_path, model_folder, port) as second:
        lines_until(second, "Ctrl-C")
        again = ASK | {
            "messages": [*ASK["messages"], {"role": "assistant", "content": "Rex"}, *ASK["messages"]]
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=again, timeout=30).json()
        assert answer["titan"]["memory_version"] == 2, "what was acknowledged before the kill is known"
        began = time.monotonic()
        second.send_signal(signal.SIGTERM)
        output, _ = second.communicate(timeout=90)
        assert second.returncode == 0, output
        assert output.splitlines() == ["draining …", "stopped"]
        assert time.monotonic() - began < 60
        assert (tmp_path / "var" / "journal" / "shard-0.closed").exists(), "the keeper was closed in order"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")
