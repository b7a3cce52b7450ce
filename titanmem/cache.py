"""Attention state of some conversations: rings of the last `window` keys and values, of one size for ever.

Axes: B conversations, T new tokens, A key-value heads, W window, Z head width, E decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanmem.decoder_config import DecoderConfig


def window_mask(queries: int, before: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """True where query i may see key j, [queries, before + queries]: the last `window` tokens, itself included."""
    query = torch.arange(queries, device=device)[:, None] + before
    key = torch.arange(before + queries, device=device)[None]
    return (key <= query) & (key > query - window)


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
        self.history = torch.zeros(rows, config.memory.history, config.hidden_size, device=device)
        self.new_positions = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self._count = self.length.clone()

    def rows(self, start: int, stop: int) -> Cache:
        """A view of some rows: what is done to it is done to them."""
        view = object.__new__(Cache)
        view.window, view.context_layer = self.window, self.context_layer
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.ring_positions, view.length = self.ring_positions[start:stop], self.length[start:stop]
        view.ring_said = self.ring_said[start:stop]
        view.embeddings, view.history = self.embeddings[start:stop], self.history[start:stop]
        view.new_positions, view._count = self.new_positions[start:stop], self._count[start:stop]
        return view

    def clear(self) -> None:
        """Forget these conversations."""
        self.ring_positions.fill_(-1)
        for tensor in (self.length, self.embeddings, self.history):
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

    def keep(self, plain_BSE: Tensor, hidden_BTE: Tensor) -> None:
        """Store the last embeddings and memory inputs of each row for the convolutions of the next step."""
        taps, conv = self.embeddings.shape[1], self.history.shape[1]
        last = torch.arange(taps, device=plain_BSE.device)[None] + self._count[:, None]
        self.embeddings.copy_(plain_BSE.gather(1, last[..., None].expand(-1, -1, plain_BSE.shape[-1])))
        hidden = torch.cat([self.history, hidden_BTE], 1)
        last = torch.arange(conv, device=hidden.device)[None] + self._count[:, None]
        self.history.copy_(hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1])))

    def advance(self) -> None:
        """End the step: the new tokens are now part of the conversation."""
        place, keep = self._places()
        old = self.ring_positions.gather(1, place)
        self.ring_positions.scatter_(1, place, torch.where(keep[:, 0, :, 0], self.new_positions, old))
        self.length.add_(self._count)
