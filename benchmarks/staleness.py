"""How much a chunk costs: a memory whose gradients are as old as the chunk's start, against one that is never stale.

    python benchmarks/staleness.py [--tokens 4096] [--json FILE]

Hidden states of the shipped model over a book that it never saw (examples/decline-and-fall.txt.xz) go into memories
that differ in chunk size only. The one that is never stale gets its tokens one call at a time. For each chunk size:
`error`, the distance of its weights from the never stale ones, relative to how far those moved; and `surprise`, that
of the last 512 tokens relative to an unwritten memory, that is, how well it knows what it was told.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from titanmem import MemorySpec, NeuralMemory  # noqa: E402
from titanmem.folder import load_decoder  # noqa: E402
from titanmem.tokenizer import ChatTokenizer  # noqa: E402

CHUNKS = (1, 16, 64, 256, 1024, 4096)
ASKED = 512


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


def surprise(memory: NeuralMemory, weights: list[Tensor], x: Tensor) -> float:
    """Mean surprise with these weights over that of the start: 0 is `knows it all`, 1 is `has learnt nothing`."""
    state = memory.new_state(1)
    unwritten = memory.surprise(state, x).mean()
    state.weights = weights
    return float(memory.surprise(state, x).mean() / unwritten)


@torch.no_grad()
def measure(tokens: int) -> list[dict[str, float | str | int]]:
    x, rows = hidden_states(tokens), []
    for rule, lr in (("titans", 0.001), ("titans", 0.01), ("sparse", 0.01)):
        torch.manual_seed(0)
        spec = MemorySpec(
            width=x.shape[2], d_nltm=256, depth=2, rule=rule, written_layers="all", lr=lr, conv=4,
            chunk_size=max(CHUNKS), window=max(CHUNKS), forget_bias=8.0,
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
                    "chunk": chunk,
                    "error": round(distance / moved, 4),
                    "surprise": round(surprise(memory, weights, x[:, -ASKED:]), 4),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tokens": options.tokens,
        "rows": measure(options.tokens),
    }
    text = json.dumps(document, indent=1)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
