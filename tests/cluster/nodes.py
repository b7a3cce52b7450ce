"""A Ray cluster of several nodes on this machine, whose nodes and processes can be frozen, thawed and killed.

The head has the CPUs and no GPU, so coordinator and door live there; each other node has one logical GPU, so shards
live there. Every node has a folder of its own for journals, as nodes with disks of their own have.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from cluster.config import Config
from cluster.handles import NAMESPACE
from cluster.serve import prepare_environment
from tests.cluster.drill_keeper import FAULT, JOURNALS
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 80 << 20
HEAD_CPUS = 2
END_TIMEOUT_S = 10.0


class Nodes:
    """The nodes that may have shards, by number."""

    def __init__(self, cluster: Cluster, folder: Path, ray_folder: str, fault: str) -> None:
        self._cluster, self._folder, self._ray_folder, self._fault = cluster, folder, ray_folder, fault
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def count(self) -> int:
        """Nodes that may have shards."""
        return sum(node is not None for node in self._nodes)

    def add(self) -> int:
        """One more node; its number."""
        number = len(self._nodes)
        env = {JOURNALS: str(self._folder / f"journals-{number}"), FAULT: self._fault}
        node = self._cluster.add_node(
            num_cpus=0,
            num_gpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
            env_vars=env,
        )
        self._nodes.append(node)
        return number

    def of(self, node_id: str) -> int:
        """The number of the node with that id in Ray."""
        return next(n for n, node in enumerate(self._nodes) if node is not None and node.node_id == node_id)

    def freeze(self, number: int, *, raylet: bool, pids: list[int]) -> None:
        """SIGSTOP to these processes, and to the node's raylet if asked."""
        for pid in [*pids, *([self._raylet(number)] if raylet else [])]:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, number: int, *, raylet: bool, pids: list[int]) -> None:
        """SIGCONT; processes that are gone are left out."""
        for pid in [*([self._raylet(number)] if raylet else []), *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self, number: int) -> None:
        """SIGKILL to the raylet and all processes below it, as when a machine loses its power."""
        raylet = self._raylet(number)
        for pid in (raylet, *descendants(raylet)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze_whole(self, number: int) -> list[int]:
        """SIGSTOP to the raylet and all processes below it; those."""
        pids = descendants(self._raylet(number))
        self.freeze(number, raylet=True, pids=pids)
        return pids

    def end(self, number: int) -> None:
        """Takes a node away whose raylet is dead or is to die, and waits for its processes."""
        node, self._nodes[number] = self._nodes[number], None
        raylet = node.all_processes["raylet"][0].process
        below = descendants(raylet.pid)
        for pid in (raylet.pid, *below):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(AssertionError):
            self._cluster.remove_node(node, allow_graceful=False)
        _reap(node)

    def renew(self, number: int) -> int:
        """A new node in the place of one that is not what it was; its number."""
        self.end(number)
        return self.add()

    def restart_gcs(self, pause_s: float) -> None:
        """SIGKILL to Ray's control service; it is started again after a pause."""
        head: Any = self._cluster.head_node
        head.kill_gcs_server()
        time.sleep(pause_s)
        head.start_gcs_server()

    def close(self) -> None:
        for number, node in enumerate(self._nodes):
            if node is not None:
                self.end(number)
        head: Any = self._cluster.head_node
        self._cluster.shutdown()
        _reap(head)
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _raylet(self, number: int) -> int:
        return self._nodes[number].all_processes["raylet"][0].process.pid


@contextmanager
def nodes(config: Config, folder: Path, count: int, *, fault: str = "", **env: str) -> Iterator[Nodes]:
    """A cluster with `count` nodes for shards, and this process as its driver; all of it ends with the block."""
    before = dict(os.environ)
    # Whether Ray asks for a token was settled in this process when it imported Ray; all others follow it.
    ours = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", JOURNALS: str(folder / "journals-head")}
    os.environ.update({**ours, **env})
    prepare_environment(config)
    # Sockets lie in Ray's folder, and their paths may not be long.
    ray_folder = tempfile.mkdtemp(prefix="tm-", dir="/tmp")
    # `Cluster` notes its address in Ray's own folder, which nobody has made on a machine where Ray never ran.
    Path(get_default_ray_temp_dir()).mkdir(mode=0o777, parents=True, exist_ok=True)
    cluster = Cluster()
    found = None
    try:
        cluster.add_node(
            num_cpus=HEAD_CPUS, num_gpus=0, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
            gcs_server_port=free_port(), temp_dir=ray_folder, dashboard_agent_listen_port=free_port(),
        )  # fmt: skip
        found = Nodes(cluster, folder, ray_folder, fault)
        for _ in range(count):
            found.add()
        ray.init(
            address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
        yield found
    finally:
        ray.shutdown()
        if found is not None:
            found.close()
        os.environ.clear()
        os.environ.update(before)


def descendants(pid: int) -> list[int]:
    """All living processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for one in found:
        found += parents.get(one, [])
    return found


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped; a zombie does neither."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _reap(node: Any) -> None:
    """Waits for a node's processes: Ray ends them, but leaves them to the interpreter, which warns of each."""
    for kind in node.all_processes.values():
        for info in kind:
            try:
                info.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                info.process.kill()
                info.process.wait(END_TIMEOUT_S)
