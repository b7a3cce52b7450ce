"""What `titanmem doctor` looks at: each check is a function that returns what it found and never raises.

A check changes nothing but the store's probe, which writes and removes one small object.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storage.errors import StoreUnavailable, StoreUnfit, TitanmemError

if TYPE_CHECKING:
    from cluster.config import Config

Status = Literal["ok", "warning", "broken"]
PYTHON = (3, 11)
MEMORY_BYTES_WANTED = 4 * 10**9
MEMORY_BYTES_MIN = 10**9
DISK_BYTES_WANTED = 10 * 10**9
DISK_BYTES_MIN = 10**9
FILES_WANTED = 4096
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^;\s]+)\s*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check's answer; `advice` says what to do where something is not right."""

    name: str
    status: Status
    found: str
    advice: str = ""


Check = Callable[["Config"], Finding]


def all_findings(config: Config) -> Iterator[Finding]:
    """Every check in the order in which a start would meet them."""
    for check in CHECKS:
        try:
            yield check(config)
        except Exception as error:  # a check that fails in an unforeseen way is a finding, too
            name = check.__name__.replace("_", " ")
            yield Finding(name=name, status="broken", found=f"{type(error).__name__}: {error}")


def python(_: Config) -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] == PYTHON:
        return Finding(name="Python", status="ok", found=found)
    wanted = ".".join(map(str, PYTHON))
    return Finding(name="Python", status="broken", found=found, advice=f"titanmem needs Python {wanted}")


def packages(_: Config) -> Finding:
    """What is installed against what this release pins; another build of the same version is the same."""
    missing, other = [], []
    try:
        required = importlib.metadata.requires("titanmem") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name="packages", status="broken", found="titanmem is not installed", advice="run `make install`"
        )
    for name, wanted in (match.groups() for line in required if (match := PINNED.match(line))):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.split("+")[0] != wanted:
            other.append(f"{name} {found} (pinned {wanted})")
    if missing:
        return Finding(
            name="packages",
            status="broken",
            found=f"missing: {', '.join(missing)}",
            advice="run `make install`",
        )
    if other:
        return Finding(name="packages", status="warning", found=", ".join(other), advice="run `make install`")
    main = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray"))
    return Finding(name="packages", status="ok", found=f"all as pinned; {main}")


def package_names(_: Config) -> Finding:
    """Our room `kernels` has the name of Hugging Face's package: only one of them can be imported."""
    name = "package names"
    ours = Path(__file__).resolve().parents[2] / "kernels"
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    advice = "pip uninstall kernels (Hugging Face's package of that name), or use an environment of its own"
    if found != ours:
        return Finding(name=name, status="broken", found=f"`import kernels` finds {found}", advice=advice)
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, status="ok", found="nobody else's `kernels`")
    return Finding(name=name, status="warning", found=f"kernels {version} is installed, too", advice=advice)


def cpu(_: Config) -> Finding:
    flags = set(_cpu_flags())
    have = [name for name in CPU_FEATURES if name in flags]
    found = f"{os.cpu_count()} cores, {' '.join(have) or 'no vector extension known to us'}"
    if "amx_bf16" in flags or "avx512f" in flags:
        return Finding(name="CPU", status="ok", found=found)
    return Finding(
        name="CPU", status="warning", found=found, advice="it works; AVX-512 or AMX is much faster"
    )


def gpu(_: Config) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding(name="GPU", status="ok", found=names)
    if Path("/proc/driver/nvidia/version").exists():
        advice = f"torch {torch.__version__} does not see it: install torch's CUDA build"
        return Finding(
            name="GPU", status="warning", found="an NVIDIA driver, no usable device", advice=advice
        )
    return Finding(name="GPU", status="ok", found="none; shards run on the CPU")


def memory(_: Config) -> Finding:
    free = _meminfo("MemAvailable")
    if free is None:
        return Finding(name="memory", status="warning", found="this system does not say how much is free")
    return _amount("memory", free, MEMORY_BYTES_MIN, MEMORY_BYTES_WANTED, "stop other programs", "free")


def shared_memory(_: Config) -> Finding:
    """Ray's object store lives there; without room it falls back to slow files."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(
            name="shared memory", status="warning", found="no /dev/shm", advice="Ray will use /tmp"
        )
    free = shutil.disk_usage(folder).free
    return _amount("shared memory", free, 0, MEMORY_BYTES_MIN, "in Docker: --shm-size=2g", "free in /dev/shm")


def disk(config: Config) -> Finding:
    """Room and leave to write where the journal and, for file://, the memories go."""
    places = [Path(config.journal_dir)]
    if config.store.startswith("file://"):
        places.append(Path(config.store.removeprefix("file://")))
    for place in places:
        folder = next(parent for parent in (place, *place.parents) if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            return Finding(
                name="disk",
                status="broken",
                found=f"{folder} cannot be written to",
                advice="change its owner",
            )
    free = min(shutil.disk_usage(_existing(place)).free for place in places)
    return _amount(
        "disk", free, DISK_BYTES_MIN, DISK_BYTES_WANTED, "make room", f"free at {places[0].parent}"
    )


def open_files(_: Config) -> Finding:
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "no limit" if unlimited else f"at most {soft:,}"
    if unlimited or soft >= FILES_WANTED:
        return Finding(name="open files", status="ok", found=found)
    return Finding(name="open files", status="warning", found=found, advice=f"ulimit -n {FILES_WANTED}")


def model(config: Config) -> Finding:
    """The folder has its files, they can be read, and weights and tokenizer fit the config's sizes."""
    folder = config.model_folder
    if not folder.is_dir():
        found = f"{folder} does not exist"
        return Finding(name="model", status="broken", found=found, advice="give --model a model folder")
    from cluster.preflight import remarks
    from titanmem.decoder_config import DecoderConfig
    from titanmem.folder import check_folder
    from titanmem.tokenizer import ChatTokenizer

    try:
        shape = DecoderConfig.load(folder).overridden(
            {"mode": config.mode, "rule": config.rule, **config.spec}
        )
        words = ChatTokenizer(folder).vocab_size
        tensors = check_folder(folder)
    except (TitanmemError, ValueError) as error:
        return Finding(name="model", status="broken", found=str(error), advice="copy the folder again")
    if words > shape.vocab_size:
        found = f"{folder}: the tokenizer has {words} words, the weights {shape.vocab_size}"
        return Finding(name="model", status="broken", found=found, advice="take both from one model")
    found = f"{folder}: {tensors} tensors, {words:,} words"
    said = remarks(config)
    status: Status = "warning" if said else "ok"
    return Finding(name="model", status=status, found=found, advice="; ".join(said))


def store(config: Config) -> Finding:
    """Reachable, and it honours conditional writes: what keeps a memory from having two writers."""
    from storage.objects import open_objects

    try:
        open_objects(config.store).probe()
    except StoreUnfit as error:
        advice = "use a store with conditional writes (If-Match and If-None-Match)"
        return Finding(name="store", status="broken", found=str(error), advice=advice)
    except (StoreUnavailable, TitanmemError, OSError, ValueError) as error:
        return Finding(
            name="store", status="broken", found=str(error), advice="check --store and credentials"
        )
    return Finding(name="store", status="ok", found=f"{config.store}: conditional writes hold")


def port(config: Config) -> Finding:
    address = f"{config.host}:{config.port}"
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            if _is_titanmem(config):
                return Finding(name="port", status="ok", found=f"titanmem already answers at {address}")
            found = f"{address}: {error.strerror}"
            return Finding(name="port", status="broken", found=found, advice="give another --port")
    return Finding(name="port", status="ok", found=f"{address} is free")


def _is_titanmem(config: Config) -> bool:
    import httpx

    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        return httpx.get(f"http://{host}:{config.port}/livez", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _amount(name: str, have: int, low: int, wanted: int, advice: str, what: str) -> Finding:
    found = f"{have / 1e9:.1f} GB {what}"
    if have < low:
        return Finding(
            name=name, status="broken", found=found, advice=f"{advice}: {low / 1e9:.0f} GB at least"
        )
    if have < wanted:
        return Finding(
            name=name, status="warning", found=found, advice=f"{advice}: {wanted / 1e9:.0f} GB is good"
        )
    return Finding(name=name, status="ok", found=found)


def _existing(place: Path) -> Path:
    return next(parent for parent in (place, *place.parents) if parent.exists())


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return line.partition(":")[2].split()


def _meminfo(field: str) -> int | None:
    """Bytes of one line of /proc/meminfo."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


CHECKS: tuple[Check, ...] = (
    python,
    packages,
    package_names,
    cpu,
    gpu,
    memory,
    shared_memory,
    disk,
    open_files,
    model,
    store,
    port,
)
