"""What can be known before a server starts: each error says what to do, within seconds and without Ray."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from actors.errors import no_memory
from cluster.config import Config
from cluster.errors import ClusterError
from storage.identity import check_store
from storage.store import open_store
from titanmem.checkpoint import weight_map
from titanmem.decoder_config import DecoderConfig
from titanmem.tokenizer import ChatTokenizer

RAY_TIMEOUT_S = 5.0
PORT_WAIT_S = 3.0
"""A door that was killed a moment ago is still going; anybody else keeps the port."""


class CannotServe(ClusterError):
    """Something on this machine keeps the server from starting; the message says what to do."""


def check(config: Config) -> None:
    """What can be known before anything starts: port, model, store, journal. Raises `TitanmemError`.

    A store that is not the one of the journals is refused before the probe, which would write into it.
    """
    check_port(config.host, config.port)
    if config.ray_address is not None:
        check_ray_address(config.ray_address)
    ChatTokenizer(config.model_folder)
    model = DecoderConfig.load(config.model_folder)
    weight_map(config.model_folder)
    model.served(config.mode, config.model_folder)
    try:
        model.overridden({"mode": config.mode, "rule": config.rule, **config.spec})
    except ValueError as error:
        raise CannotServe(f"spec: {error}") from None
    try:
        store = open_store(config.store)
        if config.ray_address is None:  # else the journals are on other machines, and their shards look
            check_store(store, Path(config.journal_dir))
        store.objects.probe()
        Path(config.journal_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotServe(f"{error.filename}: {error.strerror}") from None


def remarks(config: Config) -> list[str]:
    """What the operator should know of a model that is served all the same."""
    folder, said = config.model_folder, []
    if not DecoderConfig.load(folder).remembers:
        said.append(f"memory is off for every request: {no_memory(str(folder))}")
    if ChatTokenizer(folder).has_plain_template:
        said.append(f"{folder} has no chat template: messages become lines `User: …` and `Assistant: …`")
    if config.durability != "local" and config.store.startswith("file://"):
        said.append(
            f"durability {config.durability} with {config.store}: unless other nodes mount that folder, journal and "
            "store are on this node, and losing it loses both; s3:// or redis:// is elsewhere"
        )
    return said


def check_port(host: str, port: int, wait_s: float = PORT_WAIT_S) -> None:
    """Raises `CannotServe` when somebody else listens on `port`, or `host` is no address of this machine."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise CannotServe(
                    f"port {port} of {host} cannot be used: {error.strerror or error}; "
                    f"stop what listens there, or choose another with --port"
                ) from None
            time.sleep(0.1)


def check_ray_address(address: str, timeout_s: float = RAY_TIMEOUT_S) -> None:
    """Raises `CannotServe` when nobody listens at `host:port`: Ray itself would try for minutes.

    Other forms (`auto`, `ray://…`) are left to Ray.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError) as error:
        raise CannotServe(f"--ray-address {address}: no Ray cluster answers there: {error}") from None


def machine_gpus(env: Mapping[str, str]) -> int:
    """NVIDIA GPUs that this process may use."""
    folder = Path("/proc/driver/nvidia/gpus")
    there = len(list(folder.iterdir())) if folder.is_dir() else 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([n for n in visible.split(",") if n.strip()]))
