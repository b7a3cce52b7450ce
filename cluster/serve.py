"""`titanmem serve`: the life of a server on this machine, from the checks to the last memory stored.

Ray is imported late: what can be said without it (port, model, store) is said within a second.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.preflight import CannotServe, check, machine_gpus, remarks
from cluster.ray_settings import of_server
from storage.errors import TitanmemError

READY_TIMEOUT_S = 300.0
WATCH_INTERVAL_S = 5.0
WATCH_MISSES_MAX = 6
DRAIN_S = 90.0
"""Longest time for storing all memories at the end; the journals have what is left."""
OBJECT_STORE_BYTES = 256 << 20
"""Exports and imports pass through Ray's object store; nothing else is large."""
RAY_TOKEN = Path("~/.ray/auth_token")
LOGS = "/tmp/ray/session_latest/logs"

Say = Callable[[str], None]
log = logging.getLogger(__name__)


class Stopped(BaseException):
    """SIGINT or SIGTERM, wherever the start or the wait was."""


def run(config: Config, say: Say | None = None) -> None:
    """Serves until SIGINT or SIGTERM, then drains. Raises `TitanmemError` when it cannot start or go on."""
    say = say or _say
    with Signals() as signals:
        try:
            check(config)
            for remark in remarks(config):
                say(remark)
            prepare_environment(config)
            server = Server(config, say, signals)
            try:
                server.start()
                server.watch()
            finally:
                signals.end_at_once()
                server.stop()
        except Stopped:
            say("stopped")


def prepare_environment(config: Config) -> None:
    """What Ray's processes inherit. The operator's own settings win."""
    threads = max(1, (os.cpu_count() or 1) // config.shards)
    for name, value in {**of_server(config.ray_address is not None), "OMP_NUM_THREADS": str(threads)}.items():
        os.environ.setdefault(name, value)
    tokens = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if config.ray_address and (any(map(os.environ.get, tokens)) or RAY_TOKEN.expanduser().exists()):
        # Clusters of this release ask for a token; a driver that joins one by address does not send it unasked.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Serve sets its logger's level itself, so its notes for developers are filtered out.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)


class Server:
    """Ray, coordinator and door of one `titanmem serve`."""

    def __init__(self, config: Config, say: Say, signals: Signals) -> None:
        self._signals = signals
        self._config = config
        self._say = say
        self._coordinator: Any = None
        self._ray = False
        self._door = False

    def start(self) -> None:
        """Returns when the door is ready. Raises what keeps it from that."""
        began = time.monotonic()
        self._start_ray()
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        from cluster.coordinator import ensure
        from cluster.handles import unwrap

        self._coordinator = ensure(self._config)
        shards_ready = self._coordinator.wait_ready.remote()
        self._start_door()
        try:
            ray.get(shards_ready, timeout=READY_TIMEOUT_S)
        except GetTimeoutError:
            raise CannotServe(f"the shards were not ready within {READY_TIMEOUT_S:g} s") from None
        except RayError as error:
            cause = unwrap(error)
            if isinstance(cause, TitanmemError):
                raise cause from None
            raise CannotServe(f"a shard cannot start: {type(cause).__name__}: {cause}") from None
        self._until_answered("/readyz", READY_TIMEOUT_S)
        self._say(welcome(self._config, time.monotonic() - began))

    def watch(self) -> None:
        """Returns never; raises when the door has not answered for a while, and lets a signal through."""
        misses = 0
        while True:
            time.sleep(WATCH_INTERVAL_S)
            misses = 0 if self._answers("/livez") else misses + 1
            if misses >= WATCH_MISSES_MAX:
                raise CannotServe(
                    f"the door has not answered for {misses * WATCH_INTERVAL_S:g} s; start it again"
                )

    def stop(self) -> None:
        """Says draining, lets replies end, stores all memories, ends everything. Never raises; bounded."""
        if not self._ray:
            return
        import ray
        from ray import serve

        from cluster.app import APPLICATION

        self._say("draining …")
        joined = self._config.ray_address is not None
        steps: list[tuple[str, Callable[[], Any]]] = []
        if self._coordinator is not None:
            coordinator = self._coordinator
            steps.append(("drain", lambda: ray.get(coordinator.begin_drain.remote(), timeout=5)))
        if self._door:
            steps.append(("door", lambda: serve.delete(APPLICATION) if joined else serve.shutdown()))
        if self._coordinator is not None:
            steps.append(
                ("shards", lambda: self._report(ray.get(coordinator.stop.remote(), timeout=DRAIN_S)))
            )
            steps.append(("coordinator", lambda: ray.kill(coordinator, no_restart=True)))
        steps.append(("ray", ray.shutdown))
        for name, step in steps:
            try:
                step()
            except Exception as error:
                log.warning("while stopping (%s): %s: %s", name, type(error).__name__, error)

    def _start_ray(self) -> None:
        import ray

        config = self._config
        gpus = machine_gpus(os.environ)
        if config.ray_address is None and 0 < gpus < config.shards:
            raise CannotServe(
                f"{config.shards} shards need as many GPUs, and this machine has {gpus}: "
                f"lower --shards, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
            )
        from cluster.handles import NAMESPACE

        local: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "num_gpus": None if gpus else config.shards,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        place: dict[str, Any] = local if config.ray_address is None else {"address": config.ray_address}
        try:
            self._ray = True
            ray.init(
                **place,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        except Exception as error:  # Ray raises what it likes here, a plain Exception among it
            where = f" at {config.ray_address}" if config.ray_address else ""
            raise CannotServe(f"Ray{where} did not start: {str(error).splitlines()[0]}") from None
        self._signals.install()  # Ray has put its own handler there
        have = ray.cluster_resources().get("GPU", 0)
        if have < config.shards:
            raise CannotServe(
                f"{config.shards} shards need as many GPUs (or logical ones), and Ray has {have:g}"
            )

    def _start_door(self) -> None:
        from ray import serve

        from cluster.app import APPLICATION, bind

        config = self._config
        self._door = True
        try:
            serve.start(
                proxy_location="HeadOnly" if config.ray_address is None else "EveryNode",
                http_options={"host": config.host, "port": config.port},
                logging_config={"log_level": "ERROR", "enable_access_log": False},
            )
            serve.run(bind(config), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise CannotServe(f"the door did not start: {str(error).splitlines()[0]}") from None

    def _until_answered(self, path: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._answers(path):
            if time.monotonic() >= deadline:
                raise CannotServe(f"{path} did not answer 200 within {timeout_s:g} s")
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(address(self._config) + path, timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def _report(self, status: dict[str, Any]) -> None:
        for shard in status["shards"]:
            if shard["state"] != "stopped":
                self._say(f"{shard['shard']}: {shard['state']}: {shard['error']}; the journal has the rest")


def address(config: Config) -> str:
    """Where this machine reaches the door."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def welcome(config: Config, took_s: float) -> str:
    """What the operator reads when the server is ready."""
    url = address(config)
    message = '{"role": "user", "content": "My cat is called Minka."}'
    body = f'{{"model": "{config.model_name}", "user": "alice", "messages": [{message}]}}'
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    request = (
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
    return "\n".join(
        [
            f"titanmem is ready at {url} ({config.shards} shard{'s' * (config.shards > 1)}, {took_s:.0f} s)",
            f"  console  {url}/console",
            f"  store    {config.store}",
            f"  logs     {LOGS}",
            f"  try      {request}",
            "Ctrl-C drains and stops.",
        ]
    )


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)


class Signals:
    """SIGINT and SIGTERM: the first one raises `Stopped`; one that comes during the drain ends at once."""

    def __init__(self) -> None:
        self._draining = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._on_signal)

    def end_at_once(self) -> None:
        """From now on a signal does not wait for anything."""
        self._draining = True

    def _on_signal(self, number: int, _: object) -> None:
        if self._draining:
            os._exit(128 + number)
        self._draining = True
        raise Stopped
