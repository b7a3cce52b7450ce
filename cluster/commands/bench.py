"""`titanmem bench`: the measurements of the README, repeatable."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.commands.serve import Mode
from cluster.commands.terminal import (
    CommandFailed,
    JsonOption,
    byte_count,
    emit,
    note,
    progress_bar,
    show_table,
)

app = typer.Typer(
    help="Measurements: recall over long texts, and the memory alone.",
    no_args_is_help=True,
    add_completion=False,
)

LENGTHS = "65536,262144,1048576,2097152"
LENGTH_MAX = 1 << 28
Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 5 % outside on both sides together."""


@app.callback()
def bench() -> None:
    """Measurements: recall over long texts, and the memory alone."""


class Rule(StrEnum):
    """Update rule of the memory."""

    sparse = "sparse"
    titans = "titans"


class Asked(StrEnum):
    """How the questions see the memory."""

    read_only = "read_only"
    off = "off"


@app.command(epilog="Example: titanmem bench needle --lengths 65536,262144 --queries 20 --json")
def needle(
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of each haystack, with commas.")
    ] = LENGTHS,
    needles: Annotated[
        Path | None,
        typer.Option("--needles", exists=True, dir_okay=False, help="JSON lines: fact, question, answer."),
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option("--haystack", exists=True, dir_okay=False, help="Text to hide them in.")
    ] = None,
    mode: Annotated[Mode, typer.Option("--mode", help="How memory meets attention.")] = Mode.mac,
    rule: Annotated[Rule, typer.Option("--rule", help="Update rule of the memory.")] = Rule.sparse,
    depths: Annotated[int, typer.Option("--depths", min=1, max=1000, help="Places to hide needles at.")] = 10,
    queries: Annotated[int, typer.Option("--queries", min=1, max=100_000, help="Questions a run.")] = 20,
    runs: Annotated[int, typer.Option("--runs", min=1, max=1000, help="Runs, each with other needles.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of needles and places.")] = 0,
    memory: Annotated[
        Asked, typer.Option("--memory", help="off is the baseline: what is answered without any memory.")
    ] = Asked.read_only,
    consolidate: Annotated[
        int | None,
        typer.Option(
            "--consolidate",
            min=0,
            max=16,
            help="Passes over what was written, before asking; default: as serving.",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the one that ships.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Hide facts in a long text, ask for them in a new conversation, and count the right answers."""
    wanted = _lengths(lengths)
    note("loading the model …")
    from cluster.needle_bench import NeedleOptions, run_needle_bench

    options = NeedleOptions(
        lengths=wanted,
        needles=needles,
        haystack=haystack,
        mode=mode.value,
        rule=rule.value,
        depths=depths,
        queries=queries,
        runs=runs,
        seed=seed,
        model=model,
        memory=memory.value,
        consolidate=consolidate,
    )
    with _progress() as bar:
        task = bar.add_task("needles", total=1.0)

        def report(what: str, share: float) -> None:
            bar.update(task, completed=share, description=what)

        result = run_needle_bench(options, report)
    if json:
        emit(result)
    else:
        show_needles(result)


@app.command(epilog="Example: titanmem bench memory --json")
def memory(
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Threads of both sides.")] = 1,
    users: Annotated[
        int, typer.Option("--users", min=1, max=65536, help="Most users of the sparse and the dense path.")
    ] = 1024,
    tokens: Annotated[
        int, typer.Option("--tokens", min=64, max=1 << 20, help="Tokens that are stored and read.")
    ] = 4096,
    peer: Annotated[
        bool, typer.Option("--peer/--no-peer", help="Run titans-pytorch beside ours (extra `bench`).")
    ] = True,
    json: JsonOption = False,
) -> None:
    """The memory alone: right first, then against titans-pytorch, a loop over users, and its dense twin."""
    note("loading …")
    from importlib.util import find_spec

    from cluster.memory_bench import PEER, MemoryBenchOptions, run_memory_bench

    if peer and find_spec("titans_pytorch") is None:
        raise CommandFailed(f"{PEER} is not installed: pip install 'titanmem[bench]', or say --no-peer")
    options = MemoryBenchOptions(threads=threads, users=users, tokens=tokens, peer=peer)
    with _progress() as bar:
        task = bar.add_task("memory", total=1.0)
        result = run_memory_bench(
            options, lambda what, share: bar.update(task, completed=share, description=what)
        )
    if json:
        emit(result)
    elif result["correct"]:
        show_memory(result)
    if not result["correct"]:
        raise CommandFailed("the memory is not right, so nothing was timed: " + "; ".join(result["mistakes"]))


def show_memory(result: dict[str, Any]) -> None:
    """The ratios, speeds and sizes of one run."""
    ratios = [(name, "not measured" if x is None else f"{x:,.1f} x") for name, x in result["ratios"].items()]
    show_table(("ours over", "ratio"), ratios, title=f"memory: {result['hardware']}, {result['date']}")
    speeds = [(name, f"{x:,.0f}") for name, x in result["tokens_per_s"].items()]
    show_table(("path", "tokens/s"), speeds)
    sizes = [
        (f"state after {int(tokens):,} tokens", byte_count(x)) for tokens, x in result["state_bytes"].items()
    ]
    show_table(("what", "value"), [("write lock, p99", f"{result['lock_p99_ms']:.3f} ms"), *sizes])


def _progress() -> Progress:
    return progress_bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )


def show_needles(result: dict[str, Any]) -> None:
    """The recall of each length with its 95 % interval, and what it cost."""
    rows = []
    for row in result["lengths"]:
        low, high = wilson(round(row["recall"] * row["queries"]), row["queries"])
        rows.append(
            (
                f"{row['tokens']:,}",
                row["queries"],
                f"{row['recall']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{row['ttft_ms']:.0f} ms",
                byte_count(row["state_bytes"]),
                f"{row['ingest_tokens_per_s']:,.0f}",
                f"{row['written_share']:.3%}",
            )
        )
    title = (
        f"needles: mode {result['mode']}, rule {result['rule']}, "
        f"chunk {result['chunk_size']}, window {result['window']}"
    )
    columns = ("tokens", "queries", "recall", "95 % interval", "first token", "state", "tokens/s", "written")
    show_table(columns, rows, title=title)


def wilson(hits: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: holds at 0 and 1, where the normal one has no width.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if not 0 <= hits <= trials or trials == 0:
        raise ValueError(f"hits: {hits} of {trials} trials is no share")
    share = hits / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter("--lengths: whole numbers with commas between, like 65536,262144") from error
    if not found or not all(1 <= length <= LENGTH_MAX for length in found):
        raise typer.BadParameter(f"--lengths: each from 1 to {LENGTH_MAX}")
    return found
