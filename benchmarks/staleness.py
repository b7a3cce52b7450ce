"""How much a chunk costs: a memory whose gradients are as old as the chunk's start, against one that is never stale.

    python benchmarks/staleness.py [--tokens 4096] [--json FILE]

Hidden states of the shipped model over a book that it never saw (examples/decline-and-fall.txt.xz) go into memories
that differ in chunk size only. The one that is never stale gets its tokens one call at a time. For each chunk size:
`error`, the distance of its weights from the never stale ones, relative to how far those moved; and `loss`,
|M(k) - v|^2 over the last 512 tokens relative to |v|^2, that is, how well it knows what it was told.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from titanmem import MemorySpec, NeuralMemory  # noqa: E402
from titanmem.folder import load_decoder  # noqa: E402
from titanmem.tokenizer import ChatTokenizer  # noqa: E402

CHUNKS = (1, 16, 64, 256, 1024, 4096)
ASKED = 512
RUNS = (
    ("titans", 0.001, True),
    ("titans", 0.001, False),
    ("titans", 0.01, True),
    ("sparse", 0.01, True),
    ("sparse", 0.01, False),
)
"""Rule, step size, and whether steps that overshoot together are shortened."""


def hidden_states(tokens: int) -> Tensor:
    """float32 [1, tokens, E]: what the shipped model's memory sees."""
    folder = ROOT / "titanmem" / "default_model"
    text = lzma.decompress((ROOT / "examples" / "decline-and-fall.txt.xz").read_bytes()).decode("utf-8")
    ids = ChatTokenizer(folder).encode(text[: 8 * tokens])[:tokens]
    with torch.no_grad():
        return load_decoder(folder).lower_blocks(torch.from_numpy(ids.astype(np.int64))[None])[1]


def written(memory: NeuralMemory, x: Tensor, chunk: int) -> list[Tensor]:
    """The weights after all of x, in calls of `chunk` tokens: a call's end ends a chunk."""
    state = memory.new_state(1)
    for start in range(0, x.shape[1], chunk):
        report = memory.update(state, x[:, start : start + chunk])
        if bool(report.refused.any()):
            return [W * float("nan") for W in state.weights]
    return state.weights


def loss(memory: NeuralMemory, weights: list[Tensor], x: Tensor) -> float:
    """Mean |M(k) - v|^2 over the last tokens, relative to answering 0: below 1 is `knows something`."""
    state = memory.new_state(1)
    state.weights = weights
    # An untrained memory asks as it stores (its query projection starts equal to the key's), so to read is M(k).
    answer, value = memory.read(state, x), memory.value(torch.cat([state.history_UKE, x], 1))
    return float((answer - value)[:, -ASKED:].square().sum() / value[:, -ASKED:].square().sum())


def _finite(figure: float) -> float | None:
    """Rounded, or None for a memory that diverged."""
    return round(figure, 4) if math.isfinite(figure) else None


@torch.no_grad()
def measure(tokens: int) -> list[dict[str, float | str | int | None]]:
    x, rows = hidden_states(tokens), []
    for rule, lr, bounded in RUNS:
        torch.manual_seed(0)
        spec = MemorySpec(
            width=x.shape[2], d_nltm=256, depth=2, rule=rule, written_layers="all", lr=lr, conv=4,
            chunk_size=max(CHUNKS), window=max(CHUNKS), forget_bias=8.0, bounded=bounded,
        )  # fmt: skip
        memory = NeuralMemory(spec)
        memory.calibrate(x)
        fresh = written(memory, x, 1)
        start = memory.new_state(1).weights
        moved = sum(float((a - b).square().sum()) for a, b in zip(fresh, start, strict=True)) ** 0.5
        for chunk in CHUNKS:
            weights = fresh if chunk == 1 else written(memory, x, chunk)
            distance = sum(float((a - b).square().sum()) for a, b in zip(weights, fresh, strict=True)) ** 0.5
            rows.append(
                {
                    "rule": rule,
                    "lr": lr,
                    "bounded": bounded,
                    "chunk": chunk,
                    "error": _finite(distance / moved),
                    "loss": _finite(loss(memory, weights, x)),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = {
        "tokens": options.tokens,
        "rows": measure(options.tokens),
    }
    report(document, options.json)


if __name__ == "__main__":
    main()
