"""Training of `Skim` by itself: it depends on token ids and on what is to be written, and on nothing else of the model.

Axes: B rows, T tokens, N written tokens, M blocks of book text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmem.lookahead import Skim
from titanmem.stream import WRITTEN, Batch

REACH = 8
"""A value counts as noticed when a token at most this far from it is."""
BLOCK = 64
"""Text without a fact is judged in blocks of so many tokens."""
KEPT, ENCODED = 0.998, 0.03
"""The threshold is set to keep this share of values, and lower as long as no more than that share of book blocks is
encoded: phrasings that nobody has trained are less sure to be noticed than those that training has."""


def noticed(logits_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Largest logit near each written token [N], and in each block of text that is far from any [M]."""
    near_BT = F.max_pool1d(logits_BT[:, None], 2 * REACH + 1, 1, REACH)[:, 0]
    written_BT = torch.from_numpy(batch.gate[:, :-1] == WRITTEN)
    around_BT = F.max_pool1d(written_BT.float()[:, None], 2 * BLOCK + 1, 1, BLOCK)[:, 0] > 0
    empty_BK = ~around_BT.unfold(1, BLOCK, BLOCK).any(-1)
    return near_BT[written_BT], logits_BT.unfold(1, BLOCK, BLOCK).amax(-1)[empty_BK]


def train_skim(
    skim: Skim, make: Callable[[], Batch], steps: int, progress: Callable[[dict[str, float]], None]
) -> None:
    """Train for `steps` batches of `make`, then set the threshold on fresh ones; `progress` gets figures."""
    optimizer = torch.optim.AdamW(
        skim.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1.0 - 0.97 * step / steps)
        batch = make()
        written_N, book_M = noticed(skim(torch.from_numpy(batch.tokens[:, :-1]).long()), batch)
        loss = 2.0 * F.softplus(-written_N).mean() + F.softplus(book_M).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            progress({"skim_step": step, "skim_loss": float(loss.detach())} | _shares(written_N, book_M))
    with torch.no_grad():
        batches = [make() for _ in range(12)]
        pairs = [noticed(skim(torch.from_numpy(b.tokens[:, :-1]).long()), b) for b in batches]
        written_N, book_M = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        threshold = torch.minimum(
            torch.quantile(written_N, 1.0 - KEPT), torch.quantile(book_M, 1.0 - ENCODED)
        )
        skim.bias.sub_(threshold)
        progress({"skim_step": steps} | _shares(written_N - threshold, book_M - threshold))


def _shares(written_N: Tensor, book_M: Tensor) -> dict[str, float]:
    """Values that skimming would lose, and text without any that it would have encoded."""
    return {
        "skimmed_over": float((written_N < 0).float().mean()),
        "encoded": float((book_M >= 0).float().mean()),
    }
