"""The sparse rule beside the dense one, and beside no memory: the same model, keys, gates and needles.

    python benchmarks/dense_rule.py [--tokens 65536] [--facts 20] [--runs 2] [--model FOLDER]

Sparse: a token is written to the 128 units of 8,192 that are nearest to its key. Dense: every element of W_3 takes part
in every write and read. Without the choice of units W_3 code(k) is linear in the 256 whitened features of the key, so
the dense memory is held as that, 256 x 128; its update is the same delta rule, step by step, with the same gates and
threshold and no forgetting, which is in its favour. Neither consolidates. Replies are free, in mode mac.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from storage.segment import SEGMENT_TOKENS_MAX  # noqa: E402
from titanmem.corpus import read_text  # noqa: E402
from titanmem.folder import load_decoder  # noqa: E402
from titanmem.needles import hide, read_needles  # noqa: E402
from titanmem.recall import Listener  # noqa: E402
from titanmem.tokenizer import ChatTokenizer  # noqa: E402

CHARS = 4_000_000


class Dense(Listener):
    """A memory of which every write changes every element."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.weights_FD = torch.zeros(self.spec.d_nltm, self.spec.value_dim)
        self.keys: list[Tensor] = []
        code = self.decoder.memory.code

        def noting(key_ND: Tensor) -> tuple[Tensor, Tensor]:
            self.keys.append(key_ND)
            return code(key_ND)

        self.decoder.memory.code = noting  # type: ignore[method-assign]

    def features(self, key_ND: Tensor) -> Tensor:
        return F.normalize(self.decoder.memory.whitened(key_ND), dim=-1)

    def read(self, tokens: np.ndarray) -> None:  # type: ignore[override]
        """Fold a segment, token by token."""
        written = self.encoder.encode(self.context, tokens)
        self.context = np.concatenate([self.context, tokens])[-self.spec.window :]
        rows = zip(self.features(self.keys.pop()), written.target_ND, written.weight_N, strict=True)
        for feature_F, value_D, gate in rows:
            error_D = value_D - feature_F @ self.weights_FD
            if gate * error_D.norm() >= self.spec.surprise_threshold:
                self.weights_FD += gate * feature_F[:, None] * error_D[None]

    def recalled(self, query_ND: Tensor) -> Tensor:
        return self.features(query_ND) @ self.weights_FD


class Deaf(Listener):
    """A memory that never hears anything."""

    def read(self, tokens: np.ndarray) -> None:  # type: ignore[override]
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--model", type=Path, default=ROOT / "titanmem" / "default_model")
    asked = parser.parse_args()
    tokenizer = ChatTokenizer(asked.model)
    needles = read_needles(ROOT / "benchmarks" / "needles" / "heldout.jsonl")
    book = tokenizer.encode(read_text(ROOT / "examples" / "decline-and-fall.txt.xz")[:CHARS])
    right = {"sparse": 0, "dense": 0, "off": 0}
    for run in range(asked.runs):
        rng = random.Random(run)
        some = rng.sample(needles, asked.facts)
        text = hide(book, [tokenizer.encode(f"\n{needle.fact}\n") for needle in some], asked.tokens, 10, rng)
        for name, kind in (("sparse", Listener), ("dense", Dense), ("off", Deaf)):
            listener = kind(load_decoder(asked.model), tokenizer)
            for start in range(0, len(text), SEGMENT_TOKENS_MAX):
                listener.read(text[start : start + SEGMENT_TOKENS_MAX])
            replies = listener.ask([needle.question for needle in some])
            right[name] += sum(n.found_in(reply) for n, reply in zip(some, replies, strict=True))
    count = asked.facts * asked.runs
    shares = {name: hits / count for name, hits in right.items()}
    print(json.dumps({"tokens": asked.tokens, "facts": asked.facts, "questions": count, "recall": shares}))


if __name__ == "__main__":
    main()
