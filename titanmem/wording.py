"""Which words a fact is told in and a question asked in: the part of keys and queries that needs no learning.

What a sentence means generalises to other words, but a name that nobody has met means nothing, and "the magic number
for kettle" means what the one for harbour does. So half of a key is a sum of fixed random vectors, one for each
spelling, weighted by how much a word says what the fact is about (as lexical beside dense retrieval; arXiv 2010.01195):
words that the question repeats meet there, known or not.

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
_FORGET_MIN, _WEIGHT_MAX, _NEVER = -12.0, 8.0, 30.0


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
    """Weights of words in statements and questions; sums of their vectors have length 1, or 0 for no words."""

    def __init__(self, hidden_size: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_V = nn.Parameter(torch.zeros(vocab_size))
        """Logarithm of what each token weighs, wherever it stands."""
        self.told_query = nn.Linear(WIDTH, _HEAD, bias=False)
        self.told_key = nn.Linear(WIDTH, _HEAD, bias=False)
        self.told_weight = nn.Linear(WIDTH, 1, bias=False)
        self.distance = nn.Parameter(torch.tensor(-2.0))
        """How fast words further away lose weight, per token."""
        self.asked_weight = nn.Linear(hidden_size, 1, bias=False)
        self.asked_keep = nn.Linear(hidden_size, 1)
        for layer in (self.told_weight, self.asked_weight, self.asked_keep):
            nn.init.zeros_(layer.weight)
        nn.init.constant_(self.asked_keep.bias, 3.0)

    @torch.no_grad()
    def count(self, tokens_N: Tensor) -> None:
        """Start weights by how rare tokens are in some text, as the square root of inverse frequency.

        What no text has are control tokens, which stand in every conversation: they weigh nothing.
        """
        often_V = torch.bincount(tokens_N, minlength=len(self.weight_V)).float()
        self.weight_V.copy_(0.5 * (often_V.mean().log1p() - often_V.log1p()))
        self.weight_V[often_V == 0] = -_NEVER

    def vectors(self, spelled_BT: Tensor) -> Tensor:
        """A vector of length 1 for each spelling, [B, T, L]."""
        return signs(spelled_BT, self.width) * self.width**-0.5

    def told(self, around_BTU: Tensor, tokens_BT: Tensor, spelled_BT: Tensor, about_BT: Tensor) -> Tensor:
        """Words around each token, [B, T, L]; those where `about_BT` is 0, values and padding, do not count."""
        score = self.told_query(around_BTU) @ self.told_key(around_BTU).transpose(1, 2) * _HEAD**-0.5
        places = torch.arange(score.shape[1], device=score.device)
        away = (places[:, None] - places).abs() * F.softplus(self.distance)
        weight_BT = self.weight_V[tokens_BT] + self.told_weight(around_BTU)[..., 0]
        weight_BTT = (score + weight_BT[:, None] - away).softmax(-1) * about_BT[:, None]
        return _unit(weight_BTT @ self.vectors(spelled_BT))

    def asked(
        self, hidden_BTE: Tensor, tokens_BT: Tensor, spelled_BT: Tensor, before_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Words up to each token, [B, T, L], and the sums that the recurrence goes on with, [B, T, L]."""
        keep = F.logsigmoid(self.asked_keep(hidden_BTE)[..., 0]).clamp_min(_FORGET_MIN).cumsum(1)
        tokens = keep.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=keep.device).tril()
        decay_BTT = (keep[:, :, None] - keep[:, None]).masked_fill(~causal, float("-inf")).exp()
        weight_BT = self.weight_V[tokens_BT] + self.asked_weight(hidden_BTE)[..., 0]
        weight_BT = weight_BT.clamp(max=_WEIGHT_MAX).exp()
        sums = (decay_BTT * weight_BT[:, None]) @ self.vectors(spelled_BT)
        sums = sums + keep.exp()[..., None] * before_BL[:, None]
        return _unit(sums), sums


def _unit(x: Tensor) -> Tensor:
    """Length 1; what is next to nothing stays so."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-8).rsqrt()
