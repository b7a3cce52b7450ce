"""`titanmem bench`: the measurements of the README, repeatable."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.commands.bench_tables import show_conversation, show_kvcache, show_memory, show_needles
from cluster.commands.serve import Mode
from cluster.commands.terminal import CommandFailed, JsonOption, emit, note, progress_bar

app = typer.Typer(
    help="Measurements: recall over long texts and of people's own words, the memory alone, a cache beside it.",
    no_args_is_help=True,
    add_completion=False,
)

LENGTHS = "65536,262144,1048576,2097152"
LENGTH_MAX = 1 << 28
FACTS_MAX = 100_000


@app.callback()
def bench() -> None:
    """Measurements: recall over long texts and of people's own words, the memory alone, a cache beside it."""


class Rule(StrEnum):
    """Update rule of the memory."""

    sparse = "sparse"
    titans = "titans"


class Asked(StrEnum):
    """How the questions see the memory."""

    read_only = "read_only"
    off = "off"


KnobsOption = Annotated[
    list[str] | None,
    typer.Option("--spec", help="A knob of the memory, as code_active=32; may be repeated."),
]


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
    facts: Annotated[
        str, typer.Option("--facts", help="Facts to hide a run, with commas; default: as many as questions.")
    ] = "",
    runs: Annotated[int, typer.Option("--runs", min=1, max=1000, help="Runs, each with other needles.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of needles and places.")] = 0,
    knobs: KnobsOption = None,
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
    wanted = _numbers("--lengths", lengths, LENGTH_MAX)
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
        facts=_numbers("--facts", facts, FACTS_MAX) if facts else (),
        runs=runs,
        seed=seed,
        model=model,
        memory=memory.value,
        consolidate=consolidate,
        spec=_spec(knobs or []),
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


@app.command(epilog="Example: titanmem bench conversation --crowd 200 --json")
def conversation(
    crowd: Annotated[int, typer.Option("--crowd", min=1, max=200, help="Facts that one user is told.")] = 20,
    mode: Annotated[Mode, typer.Option("--mode", help="How memory meets attention.")] = Mode.mac,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--needles", exists=True, file_okay=False, help="Folder of the four files; default: ours."
        ),
    ] = None,
    knobs: KnobsOption = None,
    consolidate: Annotated[
        int | None,
        typer.Option("--consolidate", min=0, max=16, help="Passes before asking; default: as serving."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the one that ships.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Facts in people's own words, told in chat: what is recalled, corrected, kept apart, and not made up."""
    note("loading the model …")
    from cluster.conversation_bench import FOLDER, ConversationOptions, run_conversation_bench

    options = ConversationOptions(
        folder=folder or FOLDER, crowd=crowd, mode=mode.value, model=model, consolidate=consolidate,
        spec=_spec(knobs or []),
    )  # fmt: skip
    with _progress() as bar:
        task = bar.add_task("conversation", total=1.0)
        result = run_conversation_bench(
            options, lambda what, share: bar.update(task, completed=share, description=what)
        )
    if json:
        emit(result)
    else:
        show_conversation(result)


@app.command(epilog="Example: titanmem bench kvcache --tokens 65536 --json")
def kvcache(
    tokens: Annotated[
        int, typer.Option("--tokens", min=1024, max=LENGTH_MAX, help="Tokens of the text.")
    ] = 65536,
    measured: Annotated[
        int,
        typer.Option(
            "--measured", min=1024, max=LENGTH_MAX, help="Longest cache that is allocated and timed."
        ),
    ] = 262_144,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Threads of both sides.")] = 2,
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the one that ships.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """The same decoder with a memory and a window, and with full attention over a cache of all it has read."""
    note("loading the model …")
    from cluster.kvcache_bench import KvCacheOptions, run_kvcache_bench

    options = KvCacheOptions(tokens=tokens, measured_tokens=measured, threads=threads, model=model)
    with _progress() as bar:
        task = bar.add_task("kvcache", total=1.0)
        try:
            result = run_kvcache_bench(
                options, lambda what, share: bar.update(task, completed=share, description=what)
            )
        except (MemoryError, RuntimeError) as error:
            raise CommandFailed(f"{error}: take fewer --measured tokens") from error
    if json:
        emit(result)
    else:
        show_kvcache(result)


def _progress() -> Progress:
    return progress_bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )


def _numbers(option: str, text: str, largest: int) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{option}: whole numbers with commas between, like 10,100") from error
    if not found or not all(1 <= number <= largest for number in found):
        raise typer.BadParameter(f"{option}: each from 1 to {largest}")
    return found


def _spec(knobs: list[str]) -> dict[str, object]:
    from cluster.config import checked_spec

    try:
        return checked_spec(dict(_pair(knob) for knob in knobs))
    except ValueError as error:
        raise typer.BadParameter(f"--spec: {error}") from error


def _pair(knob: str) -> tuple[str, str]:
    name, equals, value = knob.partition("=")
    if not equals:
        raise ValueError(f"{knob!r}: write NAME=NUMBER")
    return name, value
