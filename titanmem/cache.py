"""Attention state of some conversations: rings of the last `window` keys and values, of one size for ever.

Axes: B conversations, T new tokens, A key-value heads, W window, Z head width, E decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titanmem.binding import PREFIX
from titanmem.decoder_config import DecoderConfig
from titanmem.spec import MemorySpec


def window_mask(queries: int, before: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """True where query i may see key j, [queries, before + queries]: the last `window` tokens, itself included."""
    query = torch.arange(queries, device=device)[:, None] + before
    key = torch.arange(before + queries, device=device)[None]
    return (key <= query) & (key > query - window)


@dataclass(slots=True)
class Past:
    """What the memory's queries need of the tokens before, of a size that does not grow."""

    hidden_BCE: Tensor
    """`conv` hidden states."""
    words_BL: Tensor
    """Sum of the words that were asked in."""
    question_BD: Tensor
    """Query of the last token that is not part of a value that is being recited."""
    recited_BP: Tensor
    """int64: spellings of the last tokens where they are part of such a value, else 0."""

    @classmethod
    def none(cls, spec: MemorySpec, width: int, rows: int, device: torch.device | str = "cpu") -> Past:
        """That of conversations that begin, at `width` of hidden states."""
        return cls(
            hidden_BCE=torch.zeros(rows, spec.conv, width, device=device),
            words_BL=torch.zeros(rows, spec.words_dim, device=device),
            question_BD=torch.zeros(rows, spec.key_dim, device=device),
            recited_BP=torch.zeros(rows, PREFIX - 1, dtype=torch.int64, device=device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.hidden_BCE, self.words_BL, self.question_BD, self.recited_BP

    def rows(self, start: int, stop: int) -> Past:
        """A view of some rows."""
        return Past(*(tensor[start:stop] for tensor in self.tensors()))


class Cache:
    """Rings for B conversations. A step is: `begin(count)`, the decoder's cached layers, `advance()`.

    Position p lives in ring place p mod W. Rows past their `count` in a step are padding: computed, never kept.
    """

    def __init__(self, config: DecoderConfig, rows: int, device: torch.device | str = "cpu") -> None:
        layers, heads = config.num_hidden_layers + 1, config.num_key_value_heads
        self.window = config.memory.window
        self.context_layer = config.num_hidden_layers
        """Ring of the memory's answers, which one layer attends to beside the tokens."""
        shape = (layers, rows, heads, self.window, config.head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.ring_positions = torch.full((rows, self.window), -1, dtype=torch.int64, device=device)
        self.ring_said = torch.zeros(rows, self.window, dtype=torch.bool, device=device)
        """Where the memory's answer was not nothing."""
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        """Tokens seen so far in each conversation, [B]."""
        self.embeddings = torch.zeros(rows, config.embedding_conv - 1, config.hidden_size, device=device)
        self.past = Past.none(config.memory, config.hidden_size, rows, device)
        self.new_positions = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self._count = self.length.clone()

    def rows(self, start: int, stop: int) -> Cache:
        """A view of some rows: what is done to it is done to them."""
        view = object.__new__(Cache)
        view.window, view.context_layer = self.window, self.context_layer
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.ring_positions, view.length = self.ring_positions[start:stop], self.length[start:stop]
        view.ring_said = self.ring_said[start:stop]
        view.embeddings, view.past = self.embeddings[start:stop], self.past.rows(start, stop)
        view.new_positions, view._count = self.new_positions[start:stop], self._count[start:stop]
        return view

    def clear(self) -> None:
        """Forget these conversations."""
        self.ring_positions.fill_(-1)
        for tensor in (self.length, self.embeddings, *self.past.tensors()):
            tensor.zero_()

    def begin(self, count_B: Tensor, width: int) -> None:
        """Start a step of `width` columns in which row b has `count_B[b]` real tokens, 0 for an idle row."""
        if width > self.window:
            raise ValueError(f"a step of {width} tokens: the window holds {self.window}")
        self._count = count_B
        self.new_positions = self.length[:, None] + torch.arange(width, device=self.length.device)

    def extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring with the new ones behind it; the new ones are stored for the next step."""
        ring_key, ring_value = self.keys[layer], self.values[layer]
        seen = torch.cat([ring_key, key], 2), torch.cat([ring_value, value], 2)
        place, keep = self._places()
        index = place[:, None, :, None].expand_as(key)
        # A padding token writes back what its place holds; places of one step are distinct, for T <= W.
        ring_key.scatter_(2, index, torch.where(keep, key, ring_key.gather(2, index)))
        ring_value.scatter_(2, index, torch.where(keep, value, ring_value.gather(2, index)))
        return seen

    def said(self, new_BT: Tensor) -> Tensor:
        """Where the memory said something, ring places and new tokens, [B, W + T]; the new ones are stored."""
        seen = torch.cat([self.ring_said, new_BT], 1)
        place, keep = self._places()
        self.ring_said.scatter_(
            1, place, torch.where(keep[:, 0, :, 0], new_BT, self.ring_said.gather(1, place))
        )
        return seen

    def _places(self) -> tuple[Tensor, Tensor]:
        place = self.new_positions % self.window
        real = torch.arange(place.shape[1], device=place.device)[None] < self._count[:, None]
        return place, real[:, None, :, None]

    def mask(self) -> Tensor:
        """True where a new token may see a ring place or another new token, [B, 1, T, W + T]."""
        new = self.new_positions
        position = torch.cat([self.ring_positions, new], 1)[:, None]
        query = new[:, :, None]
        return ((position >= 0) & (position <= query) & (position > query - self.window))[:, None]

    def keep(self, plain_BSE: Tensor, now: Past) -> None:
        """Store what the next step needs of each row's last tokens.

        `plain_BSE` are embeddings with those before them, `now` the memory's, at every new token [B, T, …].
        """
        self._keep_last(self.embeddings, plain_BSE)
        past = self.past
        self._keep_last(past.hidden_BCE, torch.cat([past.hidden_BCE, now.hidden_BCE], 1))
        self._keep_last(past.recited_BP, torch.cat([past.recited_BP, now.recited_BP], 1))
        for kept, new in ((past.words_BL, now.words_BL), (past.question_BD, now.question_BD)):
            self._keep_last(kept[:, None], torch.cat([kept[:, None], new], 1))

    def _keep_last(self, kept: Tensor, seen: Tensor) -> None:
        """`kept` [B, C, …] becomes what ends at each row's last real token; `seen` begins with what it was."""
        index = torch.arange(kept.shape[1], device=kept.device)[None] + self._count[:, None]
        index = index.view(*index.shape, *(1,) * (kept.dim() - 2)).expand_as(kept)
        kept.copy_(seen.gather(1, index))

    def advance(self) -> None:
        """End the step: the new tokens are now part of the conversation."""
        place, keep = self._places()
        old = self.ring_positions.gather(1, place)
        self.ring_positions.scatter_(1, place, torch.where(keep[:, 0, :, 0], self.new_positions, old))
        self.length.add_(self._count)
