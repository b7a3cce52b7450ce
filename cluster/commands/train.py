"""`titanmem train`: the small model from text files, decoder and memory together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from cluster.commands.terminal import (
    CommandFailed,
    CommandStopped,
    JsonOption,
    emit,
    figure,
    note,
    progress_bar,
    say,
)

app = typer.Typer(add_completion=False)
MINUTES = 90.0
STEADY = ("step", "spent_s", "tokens")
"""Figures of a report that say where the run stands, not how good the model is."""


@app.command(
    epilog="Example: titanmem train --out checkpoints/small --data books/one.txt.xz --data books/two.txt"
)
def train(
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    data: Annotated[list[Path], typer.Option("--data", help="Text file, plain or .xz; may be repeated.")],
    minutes: Annotated[float, typer.Option("--minutes", help="Wall clock to train.")] = MINUTES,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the small model and its memory from scratch on text files."""
    note("loading torch and the texts …")
    from titanmem.train import TrainConfig, run

    config = TrainConfig(
        out=out, data=tuple(data), minutes=minutes, seed=seed, threads=threads, resume=resume
    )
    last: dict[str, float] = {}
    bar = progress_bar(
        TextColumn("step {task.fields[step]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with bar:
        task = bar.add_task("training", total=60 * minutes, step=0, figures="")

        def report(figures: dict[str, float]) -> None:
            last.update(figures)
            shown = "  ".join(f"{name} {figure(v)}" for name, v in figures.items() if name not in STEADY)
            bar.update(task, completed=figures["spent_s"], step=f"{figures['step']:.0f}", figures=shown)
            if bar.disable:
                note(f"step {figures['step']:.0f}  {figures['spent_s'] / 60:.1f} min  {shown}")

        try:
            folder = run(config, report)
        except KeyboardInterrupt:
            raise CommandStopped(f"stopped: {_what_stands(out)}") from None
        except MemoryError as error:
            raise CommandFailed("out of memory: take fewer texts") from error
    if json:
        emit({"out": str(folder), **last})
    else:
        say(f"{folder}: trained {last.get('step', 0):.0f} steps in {last.get('spent_s', 0) / 60:.1f} min")


def _what_stands(out: Path) -> str:
    if (out / "checkpoint.pt").is_file():
        return f"{out} holds the last checkpoint; the same command with --resume goes on from it"
    return f"no checkpoint had been written to {out} yet"
