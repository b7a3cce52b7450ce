"""What a training run did, for people: `training.json` with every figure and `training.png` with the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

PANELS = {
    "losses": ("language", "recall", "memory", "contrast", "align", "twins"),
    "answers right": ("recall_accuracy", "refusal_accuracy", "reply_accuracy", "memory_accuracy"),
    "keys that are found, and what is not known refused": ("found", "refused", "twins_found"),
    "held-out facts recalled": ("heldout_recall",),
    "values written": ("written_found",),
    "text written by mistake": ("written_wrongly",),
}
"""Curves of one picture each; shares are from 0 to 1."""
SMOOTHED = 8
"""Reports that a curve is averaged over; the points behind it are the reports themselves."""


def write_report(folder: Path, config: Mapping[str, object], history: Sequence[Mapping[str, float]]) -> None:
    """Write both files into `folder`; the picture only when there is something to draw."""
    record = {"config": {key: str(value) for key, value in config.items()}, "history": history}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if len(history) > 1:
        _draw(folder / "training.png", history)


def _draw(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.figure import Figure  # a third of a second to import, and only training needs it

    picture = Figure(figsize=(12, 10), layout="constrained")
    for axes, (title, names) in zip(picture.subplots(3, 2).flat, PANELS.items(), strict=True):
        for name in names:
            points = [(row["spent_s"] / 60, row[name]) for row in history if name in row]
            if not points:
                continue
            minutes, values = zip(*points, strict=True)
            (line,) = axes.plot(minutes, _smooth(values), label=name)
            axes.plot(minutes, values, ".", color=line.get_color(), alpha=0.25, markersize=3)
        axes.set_title(title)
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    picture.savefig(path, dpi=110)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, at most SMOOTHED."""
    parts = [values[max(0, index + 1 - SMOOTHED) : index + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]
