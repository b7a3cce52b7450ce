"""Which words a fact is told in and a question asked in, exactly: the part of keys and queries that needs no learning.

What a sentence means generalises to other words, but a name that nobody has met means nothing, and "the magic number for
kettle" means what the one for harbour does. So half of a key is a sum of fixed random vectors, one for each spelling,
weighted by how much a word says what the fact is about (as lexical beside dense retrieval; arXiv 2010.01195): words
that the question repeats meet there, known or not.

A statement is seen from both sides; a question is summed up from left to right, by a linear recurrence.

Axes: B rows, T tokens, E decoder width, U width of the lookahead, L width of this part, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from titanmem.binding import signs
from titanmem.lookahead import WIDTH

SPACES = ("Ġ", "▁")
"""What a vocabulary writes for a space before a word."""
_HEAD = 64
_FORGET_MIN = -12.0


def spaced(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """From a token at the very start of a text to the same behind a space."""
    return {
        index: vocabulary[space + word]
        for word, index in vocabulary.items()
        for space in SPACES
        if space + word in vocabulary
    }


def spellings(vocabulary: Mapping[str, int], size: int) -> Tensor:
    """A number for the letters of each token, case and a space before them aside, int64 [V], never 0."""
    letters = [f"\0{index}" for index in range(size)]
    for word, index in vocabulary.items():
        if index < size:
            letters[index] = word.lstrip("".join(SPACES)).casefold() or letters[index]
    return torch.tensor([1 + xxhash.xxh3_64_intdigest(text.encode()) // 2**2 for text in letters])


class Wording(nn.Module):
    """Weights of words, for statements and for questions; the sums of their vectors are at most 1 long."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.told_query = nn.Linear(WIDTH, _HEAD, bias=False)
        self.told_key = nn.Linear(WIDTH, _HEAD, bias=False)
        self.told_weight = nn.Linear(WIDTH, 1)
        self.distance = nn.Parameter(torch.tensor(0.1))
        """How fast words further away lose weight, per token."""
        self.asked_weight = nn.Linear(hidden_size, 1)
        self.asked_keep = nn.Linear(hidden_size, 1)
        for weight in (self.told_weight.weight, self.asked_weight.weight, self.asked_keep.weight):
            nn.init.zeros_(weight)
        nn.init.zeros_(self.told_weight.bias)
        nn.init.zeros_(self.asked_weight.bias)
        nn.init.constant_(self.asked_keep.bias, 3.0)

    def vectors(self, spelled_BT: Tensor) -> Tensor:
        """A vector of length 1 for each spelling, [B, T, L]."""
        return signs(spelled_BT, self.width) * self.width**-0.5

    def told(self, around_BTU: Tensor, spelled_BT: Tensor, about_BT: Tensor) -> Tensor:
        """Words around each token, [B, T, L]; those where `about_BT` is 0, values and padding, do not count."""
        score = self.told_query(around_BTU) @ self.told_key(around_BTU).transpose(1, 2) * _HEAD**-0.5
        places = torch.arange(score.shape[1], device=score.device)
        away = (places[:, None] - places).abs() * F.softplus(self.distance)
        weight_BTT = torch.sigmoid(score + self.told_weight(around_BTU).transpose(1, 2) - away)
        return _bounded((weight_BTT * about_BT[:, None]) @ self.vectors(spelled_BT))

    def asked(self, hidden_BTE: Tensor, spelled_BT: Tensor, before_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Words up to each token, [B, T, L], and the sums that the recurrence goes on with, [B, T, L]."""
        keep = F.logsigmoid(self.asked_keep(hidden_BTE)[..., 0]).clamp_min(_FORGET_MIN).cumsum(1)
        tokens = keep.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=keep.device).tril()
        decay_BTT = (keep[:, :, None] - keep[:, None]).masked_fill(~causal, float("-inf")).exp()
        weight_BT = torch.sigmoid(self.asked_weight(hidden_BTE)[..., 0])
        sums = (decay_BTT * weight_BT[:, None]) @ self.vectors(spelled_BT)
        sums = sums + keep.exp()[..., None] * before_BL[:, None]
        return _bounded(sums), sums


def _bounded(x: Tensor) -> Tensor:
    return x * (1.0 + x.square().sum(-1, keepdim=True)).rsqrt()
