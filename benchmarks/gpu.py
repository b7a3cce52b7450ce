"""The kernels on one GPU: first right, then how fast, next to what this GPU can do at most.

python benchmarks/gpu.py [--toy] [--json FILE]

Every kernel is compared with its plain twin in float64 before anything is timed; if one is wrong, the names go to
stderr, the exit code is 1 and no figure is printed. Then come, each a median of many runs timed with CUDA events:

- `copy_tb_s`, `matmul_bf16_tflop_s`: this GPU's own limits, by torch, in the same run;
- `ingest`: store and read of a chunk by 3 x 512 x 512 bfloat16 weights with float32 momentum, gates given, against
  the roofline of these limits (gated: two sums of outer products a layer; pooled: one);
- `decode`: one token of each user read through those weights, as a share of copy bandwidth, since that is its limit;
- `sparse`: one token of each user read and written with K = 32 of 8,192 columns of 128 (float16).

`us` is as called from Python, one call after the other; `us_graph` is the same launches in one CUDA graph. `--toy`
runs everything once at tiny sizes, also without a GPU in Triton's interpreter (a test does); it claims no figures.
Needs torch, triton and `kernels/`, nothing else of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton

from kernels import dense, read, selection, slab, sparse, surprise, update
from kernels.dense import Coefficients, Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Of the size of a result: float32 sums, and a few roundings to 8 or 11 bits a layer."""
AIMS = {"ingest_tokens_s": 60e6, "ingest_tokens_s_accepted": 40e6, "decode_share": 0.8, "sparse_us": 20.0}
"""For an H100: what docs and tests of speed are held against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is measured."""

    width: int = 512
    depth: int = 3
    chunks: tuple[int, ...] = (1024, 2048, 4096)
    chunk_users: tuple[int, ...] = (1, 8, 64)
    decode_users: tuple[int, ...] = (64, 256, 1024)
    sparse_users: tuple[int, ...] = (1, 64, 1024)
    sparse_shape: tuple[int, int, int] = (8192, 128, 32)
    """H, D, K."""
    matmul: int = 8192
    copy_bytes: int = 2**30
    runs: int = 50
    seconds_max: float = 2.0
    """Of repetitions of one figure."""


TOY = Sizes(
    width=32,
    chunks=(20,),
    chunk_users=(2,),
    decode_users=(2,),
    sparse_users=(2,),
    sparse_shape=(64, 16, 3),
    matmul=16,
    copy_bytes=64,
    runs=1,
)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


def mlp(users: int, width: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    return [random(users, width, width, scale=width**-0.5, dtype=dtype) for _ in range(depth)]


def gates(users: int, chunk: int, pooled: bool) -> Coefficients:
    """Steps so small that many runs on the same chunk stay finite."""
    eta, theta, alpha = (x * torch.ones(users, chunk, device=DEVICE) for x in (0.9, 1e-3 / chunk, 1e-3))
    valid = torch.ones(users, chunk, dtype=torch.bool, device=DEVICE)
    if pooled:
        return dense.pooled_coefficients(eta[:, 0], theta, alpha[:, 0], valid)
    return dense.coefficients(eta, theta, alpha, valid)


# ---- first right ----


def exact(c: Coefficients) -> Coefficients:
    return Coefficients(**{field.name: getattr(c, field.name).double() for field in fields(c)})


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, of the size of what is wanted; infinite for NaN."""
    difference = float((got.double() - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-30)
    return difference if difference == difference else float("inf")


def check_dense(width: int, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(name of a kernel, its error) for every dense kernel, unequal users and every bias."""
    users, chunk = 3, 70
    slots, tokens = torch.tensor([2, 0, 4], device=DEVICE), torch.tensor([chunk, 0, 33], device=DEVICE)
    layers = mlp(5, width, 3, dtype)
    key, value = (random(users, chunk, width, dtype=dtype) for _ in range(2))
    wide, key_64, value_64 = [W.double() for W in layers], key.double(), value.double()
    for bias, parameter in (("l2", 0.0), ("huber", 0.7), ("lp", 3.0), ("dot", 0.0)):
        form = Form(bias=bias, bias_parameter=parameter, residual=bias != "lp", norm=bias != "l2")
        got = surprise.dense_surprise(layers, slots, key, value, tokens, form)
        wanted = slab.dense_surprise(wide, slots, key_64, value_64, tokens, form)
        pairs = zip(
            [*got.deltas, *got.inputs, got.norm_LUC],
            [*wanted.deltas, *wanted.inputs, wanted.norm_LUC],
            strict=True,
        )
        yield f"dense_surprise {bias}", max(error(*pair) for pair in pairs)
        for width_of_chunk in (chunk, 1):
            x, count = key[:, :width_of_chunk].contiguous(), tokens.clamp_max(width_of_chunk)
            want = slab.dense_read(wide, slots, x.double(), count, form)
            yield f"dense_read {width_of_chunk}", error(read.dense_read(layers, slots, x, count, form), want)
    delta, inputs = (random(users, chunk, width, dtype=dtype) for _ in range(2))
    delta_64, inputs_64 = delta.double(), inputs.double()
    for pooled in (False, True):
        W, S, c = random(5, width, width, dtype=dtype), random(5, width, width), gates(users, chunk, pooled)
        start = W[slots].double()
        want_W, want_S = dense.step(start, S[slots].double(), delta_64, inputs_64, exact(c), 1e-2 * start)
        update.dense_step_(W, S, slots, delta, inputs, c, 1e-2)
        yield "dense_step_", max(error(W[slots], want_W), error(S[slots], want_S))
    W, weight, keep = random(5, width, width, dtype=dtype), random(users, chunk), random(users)
    rows, columns = selection.selected_rows_columns(delta_64, inputs_64, weight, 0.1)
    start, keep_64 = W[slots].double(), keep.double()
    block = selection.masked_step(
        start, delta_64, inputs_64, weight.double(), keep_64, 0.1 * keep_64, rows, columns
    )
    update.masked_step_(W, slots, delta, inputs, weight, keep, 0.1 * keep, rows, columns)
    yield "masked_step_", error(W[slots], selection.scatter_block(start, rows, columns, block))


def codes(users: int, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slab, slots, one token each, its columns and values, target, gate, and each user's alpha."""
    width, dim, active = sizes.sparse_shape
    memory = torch.empty(users, width, dim, device=DEVICE, dtype=torch.float16).normal_(0, 0.1)
    columns, values = sparse.sparse_code(random(users, width), active)
    target = torch.nn.functional.normalize(random(users, dim), dim=-1)
    slots, tokens = torch.randperm(users, device=DEVICE), torch.ones_like(columns[:, 0])
    gate, alpha = torch.rand(2, users, device=DEVICE)
    return memory, slots, tokens, columns, values, target, gate, alpha


def check_sparse(sizes: Sizes) -> Iterator[tuple[str, float]]:
    """The same for the sparse kernels; the twin of a step is float32 throughout."""
    memory, slots, tokens, columns, values, target, weight, alpha = codes(7, sizes)
    want = (memory.double()[slots[:, None], columns] * values.double()[..., None]).sum(1)
    yield "sparse_read", error(read.sparse_read(memory, slots, columns, values), want)
    turns = torch.tensor([4, 0, 3], device=DEVICE)
    for name, counts in (("one token", tokens), ("turns", turns)):
        users = len(counts)
        step = (memory, slots[:users], counts, columns, values, target, weight, alpha[:users])
        (rows, new), (wanted_rows, wanted) = update.sparse_step(*step), sparse.sparse_step(*step)
        right = torch.equal(rows, wanted_rows)
        yield f"sparse_step {name}", error(new, wanted.double()) if right else float("inf")


def wrong(sizes: Sizes) -> list[str]:
    """What is further from its twin than its dtype explains."""
    found = [(name, value, 1e-5) for name, value in check_sparse(sizes)]
    for dtype in (torch.float32, torch.bfloat16):
        for width in sorted({60, sizes.width}) if DEVICE == "cuda" else [60]:
            found += [
                (f"{name}, {dtype}, {width} wide", value, TOLERANCE[dtype])
                for name, value in check_dense(width, dtype)
            ]
    return [
        f"{name}: error {value:.3g}, {most:.3g} allowed" for name, value, most in found if not value <= most
    ]


# ---- then how fast ----


def seconds(call: Callable[[], object], sizes: Sizes) -> float | None:
    """Median time of one call; nothing is said of a toy."""
    call()
    if sizes.runs == 1:
        return None
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(calls: int) -> float:
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    once = timed(5)
    calls = max(1, min(100, int(1e-3 / once)))  # a millisecond at least, so that launches follow each other
    runs = max(5, min(sizes.runs, int(sizes.seconds_max / (once * calls))))
    return float(torch.tensor([timed(calls) for _ in range(runs)]).median())


def graph_seconds(call: Callable[[], object], sizes: Sizes) -> float | None:
    """The same of the launches alone: captured once, replayed without Python between them."""
    if sizes.runs == 1:
        return None
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return seconds(graph.replay, sizes)


def per(amount: float, time: float | None) -> float | None:
    return None if time is None else amount / time


def share(value: float | None, limit: float | None) -> float | None:
    return None if value is None or limit is None else round(value / limit, 4)


def micro(time: float | None) -> float | None:
    return None if time is None else round(1e6 * time, 2)


def limits(sizes: Sizes) -> tuple[float | None, float | None]:
    """Bytes a second of a copy (read and written), floating point operations a second of a bfloat16 product."""
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(source)
    copy = per(2 * sizes.copy_bytes, seconds(lambda: into.copy_(source), sizes))
    a, b = (random(sizes.matmul, sizes.matmul, dtype=torch.bfloat16) for _ in range(2))
    return copy, per(2 * sizes.matmul**3, seconds(lambda: torch.matmul(a, b), sizes))


def ingest(
    sizes: Sizes, users: int, chunk: int, pooled: bool, copy: float | None, flops: float | None
) -> dict[str, object]:
    """Tokens a second of one chunk of every user: read, surprise, and the step of each layer in place."""
    width, depth, form = sizes.width, sizes.depth, Form(residual=True)
    layers = mlp(users + 1, width, depth, torch.bfloat16)
    momenta = [torch.zeros_like(W, dtype=torch.float32) for W in layers]
    slots = torch.randperm(users + 1, device=DEVICE)[:users]
    query, key, value = (
        torch.nn.functional.normalize(random(users, chunk, width), dim=-1).bfloat16() for _ in range(3)
    )
    tokens, c = torch.full((users,), chunk, device=DEVICE), gates(users, chunk, pooled)

    def store_and_read() -> None:
        read.dense_read(layers, slots, query, tokens, form)
        found = surprise.dense_surprise(layers, slots, key, value, tokens, form)
        for W, S, delta, inputs in zip(layers, momenta, found.deltas, found.inputs, strict=True):
            update.dense_step_(W, S, slots, delta, inputs, c, 1e-4)

    time = seconds(store_and_read, sizes)
    assert all(bool(torch.isfinite(W).all()) for W in layers), "a timed run may not diverge"
    # read and forward 2 D^2 a layer each, backward one layer less, one or two sums of outer products
    work = users * chunk * 2 * width**2 * (2 * depth + (depth - 1) + (1 if pooled else 2) * depth)
    # a step reads and writes weights and momentum; queries, keys and values come in, answers go out
    moved = users * (depth * width**2 * (2 * 2 + 2 * 4) + 4 * chunk * width * 2)
    bound = None if copy is None or flops is None else users * chunk / max(work / flops, moved / copy)
    rate = per(users * chunk, time)
    return {
        "users": users, "chunk": chunk, "gates": "pooled" if pooled else "by token", "us": micro(time),
        "tokens_s": rate, "roofline_tokens_s": bound, "share_of_roofline": share(rate, bound),
        "tflop_s": None if time is None else round(work / time / 1e12, 1),
    }  # fmt: skip


def decode(sizes: Sizes, users: int, copy: float | None) -> dict[str, object]:
    """One token of each user."""
    layers = mlp(users, sizes.width, sizes.depth, torch.bfloat16)
    slots, x = torch.randperm(users, device=DEVICE), random(users, 1, sizes.width, dtype=torch.bfloat16)
    tokens = torch.ones(users, dtype=torch.int64, device=DEVICE)

    def call() -> None:
        read.dense_read(layers, slots, x, tokens, Form(residual=True))

    time, in_graph = seconds(call, sizes), graph_seconds(call, sizes)
    size = users * sizes.depth * sizes.width**2 * 2
    return {
        "users": users, "us": micro(time), "us_graph": micro(in_graph),
        "us_at_copy_bandwidth": None if copy is None else micro(size / copy),
        "share_of_copy_bandwidth": share(per(size, time), copy),
        "share_of_copy_bandwidth_graph": share(per(size, in_graph), copy),
    }  # fmt: skip


def sparse_figures(sizes: Sizes, users: int) -> dict[str, object]:
    """One token of each user read; its new columns made; those put in place."""
    memory, slots, tokens, columns, values, *rest = codes(users, sizes)
    rows, new = update.one_token_step(memory, slots, tokens, columns, values, *rest)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read.sparse_read(memory, slots, columns, values),
        "step": lambda: update.one_token_step(memory, slots, tokens, columns, values, *rest),
        "put": lambda: memory.view(-1, memory.shape[2]).__setitem__(rows, new.to(memory.dtype)),
    }
    out: dict[str, object] = {"users": users}
    for name, call in calls.items():
        out[f"{name}_us"] = micro(seconds(call, sizes))
        out[f"{name}_us_graph"] = micro(graph_seconds(call, sizes))
    return out


def measure(sizes: Sizes, toy: bool) -> dict[str, object]:
    copy, flops = limits(sizes)
    return {
        "benchmark": "kernels on one GPU",
        "toy": toy,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{platform.machine()}, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "correct": True,
        "copy_tb_s": None if copy is None else round(copy / 1e12, 3),
        "matmul_bf16_tflop_s": None if flops is None else round(flops / 1e12, 1),
        "aims": AIMS,
        "ingest": [
            ingest(sizes, users, chunk, pooled, copy, flops)
            for pooled in (False, True)
            for chunk in sizes.chunks
            for users in sizes.chunk_users
        ],
        "decode": [decode(sizes, users, copy) for users in sizes.decode_users],
        "sparse": [sparse_figures(sizes, users) for users in sizes.sparse_users],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure the kernels on one GPU.")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, no figures; runs without a GPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document there as well")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.toy:
        parser.error("no GPU is here: only --toy runs without one")
    sizes = TOY if arguments.toy else Sizes()
    torch.manual_seed(0)
    failures = wrong(sizes)
    if failures:
        sys.stderr.write("not measured, since wrong:\n" + "".join(f"  {line}\n" for line in failures))
        return 1
    document = json.dumps(measure(sizes, arguments.toy), indent=1)
    sys.stdout.write(document + "\n")
    if arguments.json:
        arguments.json.write_text(document + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
