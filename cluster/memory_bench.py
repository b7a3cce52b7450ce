"""`titanmem bench memory`: correctness first, then the memory against its peer, its own loop and its dense twin.

Each ratio sets two things side by side in one run, on the same work, sizes, precision and threads; ours over theirs.

Axes: U users, T tokens, H code width, D value width, K active units.
"""

from __future__ import annotations

import datetime
import importlib
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.slab import ReadWriteLock
from cluster.memory_bench_check import mistakes
from kernels import ops
from titanmem import MemorySpec, NeuralMemory

PEER = "titans-pytorch"
DEPTH, CHUNK = 2, 64
HOLDS = 2000
"""Write locks timed for the 99th percentile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBenchOptions:
    """Sizes of the run; the defaults are those of the README."""

    threads: int = 1
    width: int = 512
    tokens: int = 4096
    users: int = 1024
    """Most users of the sparse against the dense path."""
    loop_users: int = 64
    code_width: int = 8192
    peer: bool = True
    """Whether titans-pytorch takes part."""
    seconds: float = 1.0
    """Least time that each of our figures is measured for."""


def hardware() -> str:
    """The processor's name, cores and vector units, as the system says."""
    found = {}
    for line in (
        Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    units = [u for u in ("avx2", "avx512f", "amx_bf16") if u in found.get("flags", "").split()]
    name = found.get("model name", platform.processor() or platform.machine())
    return f"{name}, {torch.get_num_threads()} threads, {' '.join(units)}, torch {torch.__version__}"


def seconds_of(work: Callable[[], object], least_s: float, most: int = 50) -> float:
    """Median seconds of one call, after one that warms up, for `least_s` altogether and three calls at least."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least_s and len(times) < most):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_memory_bench(
    options: MemoryBenchOptions, report: Callable[[str, float], None] = lambda _what, _share: None
) -> dict[str, Any]:
    """The document of `titanmem bench memory --json` (docs/benchmarks.md). When the check finds a mistake it holds
    no figure."""
    torch.set_num_threads(options.threads)
    head: dict[str, Any] = {
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    report("correctness", 0.0)
    found = mistakes()
    if found:
        return head | {"correct": False, "mistakes": found}
    ratios: dict[str, float | None] = {}
    speeds: dict[str, float] = {}
    with torch.no_grad():
        for place, (expansion, users) in enumerate(((4, 1), (1, 1), (1, 8))):
            report(f"store and read, expansion {expansion}, batch {users}", 0.05 + 0.2 * place)
            name = f"e{expansion}_b{users}"
            ours = store_and_read(options, expansion, users)
            speeds[f"ours_{name}"] = ours
            theirs = peer_store_and_read(options, expansion, users) if options.peer else None
            if theirs is not None:
                speeds[f"titans_pytorch_{name}"] = theirs
            ratios[f"titans_pytorch_{name}"] = None if theirs is None else ours / theirs
        report("many users", 0.7)
        ratios[f"loop_{options.loop_users}_users"] = against_loop(options, speeds)
        for users in sorted({1, min(64, options.users), options.users}):
            report(f"sparse against dense, {users} users", 0.8)
            ratios[f"sparse_vs_dense_{users}_users"] = against_dense(options, users, speeds)
        report("write lock", 0.9)
        lock_ms = lock_hold_p99_ms(options)
        state = state_bytes(options)
    report("done", 1.0)
    return head | {
        "correct": True,
        "ratios": {name: None if x is None else round(x, 2) for name, x in ratios.items()},
        "tokens_per_s": {name: round(x, 1) for name, x in speeds.items()},
        "lock_p99_ms": round(lock_ms, 4),
        "state_bytes": state,
    }


def store_and_read(options: MemoryBenchOptions, expansion: int, users: int) -> float:
    """Tokens a second of our `NeuralMemory`, in the peer's shape: momentum and forgetting pooled a chunk, residual
    and norm, no convolution, no bound on a chunk's steps."""
    spec = MemorySpec(
        width=options.width, d_nltm=options.width, depth=DEPTH, expansion=expansion, rule="titans",
        gates="chunk", chunk_size=CHUNK, residual=True, norm=True, conv=1, lr=1e-3, bounded=False,
    )  # fmt: skip
    memory = NeuralMemory(spec)
    x = torch.randn(users, options.tokens, options.width)

    def work() -> None:
        state = memory.new_state(users)
        _, done = memory(state, x)
        assert not bool(done.refused.any()), "the memory diverged: the figure would time refusals"

    return users * options.tokens / seconds_of(work, options.seconds)


def peer_store_and_read(options: MemoryBenchOptions, expansion: int, users: int) -> float | None:
    """The same of titans-pytorch's `NeuralMemory`; None when it is not installed. Measured once, warm: it is slow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peer's own, at import
            theirs = importlib.import_module("titans_pytorch")  # an extra, so it may be missing
    except ImportError:
        return None
    model = theirs.MemoryMLP(options.width, depth=DEPTH, expansion_factor=expansion)
    peer = theirs.NeuralMemory(dim=options.width, chunk_size=CHUNK, model=model)
    peer(torch.randn(1, 4 * CHUNK, options.width))
    x = torch.randn(users, options.tokens, options.width)
    start = time.perf_counter()
    peer(x)
    return users * options.tokens / (time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """One token of each user, coded."""

    slots_U: Tensor
    columns_UK: Tensor
    values_UK: Tensor
    target_UD: Tensor
    weight_U: Tensor
    alpha_U: Tensor

    def of(self, row: slice) -> Rows:
        return Rows(**{name: getattr(self, name)[row] for name in Rows.__slots__})


def rows_of(users: int, width: int, dim: int = 128, active: int = 32) -> Rows:
    columns, values = ops.sparse_code(torch.randn(users, width), active)
    return Rows(
        slots_U=torch.arange(users),
        columns_UK=columns,
        values_UK=values,
        target_UD=torch.nn.functional.normalize(torch.randn(users, dim), dim=1),
        weight_U=torch.ones(users),
        alpha_U=torch.full((users,), 0.02),
    )


def sparse_step(slab_SHD: Tensor, rows: Rows) -> None:
    """Read one token of each user, then write it."""
    ops.sparse_read(slab_SHD, rows.slots_U, rows.columns_UK, rows.values_UK)
    ones = torch.ones_like(rows.slots_U)
    arguments = (rows.columns_UK, rows.values_UK, rows.target_UD, rows.weight_U, rows.alpha_U)
    ops.sparse_apply(slab_SHD, *ops.sparse_update(slab_SHD, rows.slots_U, ones, *arguments))


def against_loop(options: MemoryBenchOptions, speeds: dict[str, float]) -> float:
    """One launch for all users over one launch a user, read and write of one token each."""
    users = options.loop_users
    slab = torch.zeros(users, options.code_width, 128, dtype=torch.float16)
    rows = rows_of(users, options.code_width)
    each = [rows.of(slice(user, user + 1)) for user in range(users)]

    def loop() -> None:
        for one in each:
            sparse_step(slab, one)

    batched_s = seconds_of(lambda: sparse_step(slab, rows), options.seconds)
    loop_s = seconds_of(loop, options.seconds)
    speeds[f"batched_{users}_users"] = users / batched_s
    speeds[f"loop_{users}_users"] = users / loop_s
    return loop_s / batched_s


def against_dense(options: MemoryBenchOptions, users: int, speeds: dict[str, float]) -> float:
    """K-sparse read and write over the dense ones of the same float32 weights and codes, one token of each user."""
    width, dim = options.code_width, 128
    slab = torch.zeros(users, width, dim)
    rows = rows_of(users, width)
    code_UH = torch.zeros(users, width).scatter_(1, rows.columns_UK, rows.values_UK)

    def dense() -> None:
        read_UD = torch.bmm(code_UH[:, None], slab)[:, 0]
        step_UD = rows.weight_U[:, None] * (rows.target_UD - read_UD)
        slab.baddbmm_(code_UH[:, :, None], step_UD[:, None], beta=0.98)

    sparse_s = seconds_of(lambda: sparse_step(slab, rows), options.seconds)
    dense_s = seconds_of(dense, options.seconds, most=5)
    speeds[f"sparse_{users}_users"] = users / sparse_s
    speeds[f"dense_{users}_users"] = users / dense_s
    return dense_s / sparse_s


def lock_hold_p99_ms(options: MemoryBenchOptions) -> float:
    """99th percentile of how long an update of a 10^6-element memory holds its write lock while another thread
    reads, ms. Five tokens an update, the most that `top_k_ratio` allows."""
    slab = torch.zeros(1, options.code_width, 128, dtype=torch.float16)
    lock, stop, holds = ReadWriteLock(), threading.Event(), []
    slot = torch.zeros(1, dtype=torch.int64)
    rows = rows_of(5, options.code_width)

    def read() -> None:
        while not stop.is_set():
            with lock.shared():
                ops.sparse_read(slab, slot.expand(5), rows.columns_UK, rows.values_UK)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(HOLDS):
            prepared = ops.sparse_update(
                slab, slot, torch.tensor([5]), rows.columns_UK, rows.values_UK, rows.target_UD, rows.weight_U,
                rows.alpha_U[:1],
            )  # fmt: skip
            with lock.exclusive():
                start = time.perf_counter()
                ops.sparse_apply(slab, *prepared)
                holds.append(time.perf_counter() - start)
    finally:
        stop.set()
        reader.join()
    return 1000 * statistics.quantiles(holds, n=100)[98]


def state_bytes(options: MemoryBenchOptions) -> dict[str, int]:
    """Bytes of one user's state after 4,096 and after 1,000,000 tokens, which are really written."""
    spec = MemorySpec(
        width=16, d_nltm=16, depth=2, rule="titans", chunk_size=4096, window=4096, conv=4, lr=1e-5
    )
    memory, found = NeuralMemory(spec), {}
    state = memory.new_state(1)
    tokens = 0
    for goal in (4096, 1_000_000):
        while tokens < goal:
            part = min(65536, goal - tokens)
            done = memory.update(state, torch.randn(1, part, 16))
            assert not bool(done.refused.any()), "the memory diverged: its size would say nothing"
            tokens += part
        found[str(goal)] = state.bytes_per_user
    return found
