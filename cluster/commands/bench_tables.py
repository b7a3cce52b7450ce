"""What `titanmem bench` prints for people."""

from __future__ import annotations

import math
from typing import Any

from cluster.commands.terminal import byte_count, note, show_table

Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 5 % outside on both sides together."""


def show_needles(result: dict[str, Any]) -> None:
    """The recall of each length with its 95 % interval, and what it cost."""
    rows = []
    for row in result["lengths"]:
        low, high = wilson(round(row["recall"] * row["queries"]), row["queries"])
        rows.append(
            (
                f"{row['tokens']:,}",
                f"{row['facts']:,}",
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
    columns = (
        "tokens",
        "facts",
        "queries",
        "recall",
        "95 % interval",
        "first token",
        "state",
        "tokens/s",
        "written",
    )
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


def show_conversation(result: dict[str, Any]) -> None:
    """Recall by family, and how corrections, likenesses and unknown things fare."""
    families = [(name, f"{hits} of {asked}") for name, (hits, asked) in result["by_family"].items()]
    recall, asked = result["freeform"]["recall"], result["freeform"]["questions"]
    title = f"own words: {recall:.1%} of {asked}, {result['crowd']} a user"
    show_table(("family", "recalled"), families, title=title)
    corrections, apart, untold = result["corrections"], result["apart"], result["untold"]
    unseen, strangers = result["unseen"], result["strangers"]
    rows = [
        ("kinds of facts that training never had", f"{unseen['recall']:.1%}", unseen["questions"]),
        ("corrected facts, new value", f"{corrections['new']:.1%}", corrections["questions"]),
        ("corrected facts, old value", f"{corrections['old']:.1%}", corrections["questions"]),
        ("two of one kind, right", f"{apart['right']:.1%}", apart["questions"]),
        ("two of one kind, the other's", f"{apart['swapped']:.1%}", apart["questions"]),
        ("told to another user, the fact", f"{strangers['false_recall']:.1%}", strangers["questions"]),
        ("told to nobody, some other fact", f"{untold['false_recall']:.1%}", untold["questions"]),
        ("told to nobody, said so", f"{untold['refused']:.1%}", untold["questions"]),
    ]
    show_table(("what", "share", "questions"), rows)


def show_kvcache(result: dict[str, Any]) -> None:
    """Both sides and their ratio."""
    kv, nltm, ratio = result["kv"], result["nltm"], result["ratio"]
    rows = [
        ("state", byte_count(kv["state_bytes"]), byte_count(nltm["state_bytes"]), f"{ratio['state_bytes']:.3%}"),
        ("first token", f"{kv['ttft_ms']:,.0f} ms", f"{nltm['ttft_ms']:,.0f} ms", f"{ratio['ttft']:.1f} x"),
        ("reading, tokens/s", f"{kv['tokens_per_s']:,.0f}", f"{nltm['tokens_per_s']:,.0f}",
         f"{ratio['tokens_per_s']:.1f} x"),
    ]  # fmt: skip
    how = "extrapolated" if result["model"]["extrapolated"] else "measured"
    show_table(
        ("what", "full attention", "memory", "ratio"), rows, title=f"{result['tokens']:,} tokens, {how}"
    )
    note(f"seconds: {result['model']['seconds_a_piece']}")
