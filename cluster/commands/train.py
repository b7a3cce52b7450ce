"""`titanmem train`: the small model from text files, or a memory for another maker's checkpoint."""

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
MINUTES, SKIM_STEPS = 90.0, 500
STEADY = ("step", "spent_s", "tokens")
"""Figures of a report that say where the run stands, not how good the model is."""


@app.command(
    epilog="Example: titanmem train --out checkpoints/small --data books/one.txt.xz --data books/two.txt"
)
def train(
    data: Annotated[list[Path], typer.Option("--data", help="Text file, plain or .xz; may be repeated.")],
    out: Annotated[Path | None, typer.Option("--out", help="Model folder to write, from scratch.")] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Checkpoint folder to train a memory for; its weights stay."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--start", help="Model folder of ours whose weights --out begins with; default: none."),
    ] = None,
    phrases: Annotated[
        Path | None, typer.Option("--phrases", help="Folder of a phrase book; default: the one that ships.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", help="Sentence encoder (a BERT folder) to learn meanings from."),
    ] = None,
    lessons: Annotated[
        list[Path] | None, typer.Option("--lessons", help="Text for the teacher's lessons; may be repeated.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Wall clock to train.")] = MINUTES,
    skim_steps: Annotated[
        int, typer.Option("--skim-steps", min=1, help="Batches of the last part, beyond the minutes.")
    ] = SKIM_STEPS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the small model and its memory from scratch, or a memory for the checkpoint that --model names."""
    if (out is None) == (model is None):
        raise typer.BadParameter("give --out FOLDER (from scratch) or --model FOLDER (a memory for it)")
    folder = model or out
    assert folder is not None, "one of them is there"
    note("loading torch and the texts …")
    from titanmem.train import TrainConfig, run

    config = TrainConfig(
        out=folder, model=model, start=start, data=tuple(data), phrases=phrases, teacher=teacher,
        lessons=tuple(lessons or ()), minutes=minutes, skim_steps=skim_steps, seed=seed, threads=threads, resume=resume,
    )  # fmt: skip
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
            # The last part, which learns to skim, has steps of its own and no share of the minutes.
            step, spent_s = last.get("step", 0), last.get("spent_s", 0)
            bar.update(task, completed=spent_s, step=f"{step:.0f}", figures=shown)
            if bar.disable:
                note(f"step {step:.0f}  {spent_s / 60:.1f} min  {shown}")

        try:
            run(config, report)
        except KeyboardInterrupt:
            raise CommandStopped(f"stopped: {_what_stands(folder)}") from None
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
