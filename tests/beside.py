"""Long drills run beside the other tests, in processes of their own and one after the other: CI has a second core.

A test that is marked `beside("benchmarks/…", …)` takes the fixture `beside`, what that command came to. The commands
begin when pytest has collected, and those tests come last.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Done = subprocess.CompletedProcess[str]


class Beside:
    """The plugin; `tests/conftest.py` registers it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._done: dict[str, Future[Done]] = {}
        self._process: subprocess.Popen[str] | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("beside") is not None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        for item in session.items:
            marker = item.get_closest_marker("beside")
            if marker is not None:
                self._done[item.nodeid] = self._pool.submit(self._run, marker.args)

    @pytest.fixture
    def beside(self, request: pytest.FixtureRequest) -> Done:
        """Exit status, output and errors of this test's command."""
        return self._done[request.node.nodeid].result()

    def pytest_sessionfinish(self) -> None:
        """Nothing is left behind by a session that ends before its last tests."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._pool.shutdown()

    def _run(self, arguments: tuple[str, ...]) -> Done:
        command = ["nice", sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, **pipes
        ) as process:  # a session of its own: what it forks ends with it
            self._process = process
            said, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, said, errors)
