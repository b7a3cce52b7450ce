"""What is known of layers that are not ours: the names and shapes that Hugging Face's decoders call them with.

Nothing of that library is imported. Axes as in `titanmem.modes`; H heads, X any width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titanmem.modes import Context, Rows

CACHES = ("past_key_values", "past_key_value", "layer_past")
"""What layers call their KV cache, the newest name first."""
MASKED_ATTENTION = (None, "eager", "sdpa")
"""Attention implementations that take a mask of our own making, which mode `mac` needs."""


def valid_tokens(mask: Any, x: Tensor, past: int) -> Tensor | None:
    """Which tokens of x [B, T, E] are no padding, bool [B, T]: those that see themselves. None is all.

    `mask` is [B, keys], or [B or 1, H or 1, T, keys] of bool (True sees) or of scores that are added. `past` tokens
    stand before in the cache; where that has a window, the newest key is the last column. Raises ValueError for what
    is no tensor, and for other shapes.
    """
    if mask is None:
        return None
    rows, tokens = x.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < tokens:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask {shape}: padding can be read from [rows, keys] or [rows, heads, tokens, keys]; take the "
            "attention implementation sdpa or eager"
        )
    start = past if past + tokens <= mask.shape[-1] else mask.shape[-1] - tokens
    if mask.dim() == 2:
        own = mask[:, start : start + tokens]
    else:
        own = mask[:, 0].diagonal(start, -2, -1)[:, :tokens]
    if own.is_floating_point() and mask.dim() == 4:
        own = own > torch.finfo(own.dtype).min / 2
    return own.bool().expand(rows, tokens)


class SegmentCall:
    """Calls a foreign layer on one extended segment of mode `mac`, with mask and positions to match."""

    def __init__(self, call: Callable[..., Tensor], given: dict[str, Any], rows: Rows) -> None:
        self.call, self.rows = call, rows
        self.given = {k: v for k, v in given.items() if k not in CACHES}
        if given.get("alibi") is not None:
            raise ValueError("mode mac builds masks of its own and knows no alibi: take mag or mal")
        if "use_cache" in given:
            self.given["use_cache"] = False
        self.scores_BHTT = self._scores(given.get("attention_mask"))

    def _scores(self, mask: Tensor | None) -> Tensor | None:
        """What the caller's 4-D mask adds to each pair of tokens, in the rows' order; 2-D only says what is there."""
        if mask is None or mask.dim() == 2:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(
                ~mask, torch.finfo(torch.float32).min
            )
        if self.rows.order_BT is not None:
            mask = mask.expand(len(self.rows.order_BT), -1, -1, -1)
            mask = self.rows.front(self.rows.front(mask.transpose(1, 2)).transpose(1, 3)).permute(0, 2, 3, 1)
        return mask

    def __call__(self, context: Context) -> Tensor:
        given = dict(self.given)
        given["attention_mask"] = self._mask(context)
        for name, value in self.given.items():
            if name.startswith("position_embeddings") and value is not None:
                if not isinstance(value, tuple) or len(value) != 2 or value[0].dim() != 3:
                    raise ValueError(f"mode mac knows {name} as (cos, sin), each [rows, tokens, head]")
                # No rotation for persistent tokens: they stand at position 0.
                given[name] = (self._placed(value[0], context, 1.0), self._placed(value[1], context, 0.0))
            elif name == "position_ids" and isinstance(value, Tensor) and value.dim() == 2:
                given[name] = self._placed(value, context, 0)
        hidden = self.call(context.hidden_BNE, **given)
        return hidden[:, hidden.shape[1] - (context.segment.stop - context.segment.start) :]

    def _mask(self, context: Context) -> Tensor:
        """Scores that are added, [B, 1 or H, N, N], as eager attention and sdpa both take them."""
        dtype, visible = context.hidden_BNE.dtype, context.visible_BNN[:, None]
        lowest = torch.finfo(dtype).min
        scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        if self.scores_BHTT is not None:
            own = self.scores_BHTT[:, :, context.segment, context.first : context.segment.stop]
            scores = scores.repeat(1, own.shape[1], 1, 1)
            scores[:, :, -own.shape[2] :, -own.shape[3] :] = own.clamp_min(lowest).to(dtype)
        return torch.where(visible, scores, lowest)

    def _placed(self, x: Tensor, context: Context, first: float) -> Tensor:
        """Something of each token [B or 1, T, ...], for each column: h_j has token j's, persistent tokens `first`."""
        if self.rows.order_BT is not None:
            x = self.rows.front(x.expand(len(self.rows.order_BT), *x.shape[1:]))
        persistent = x.new_full((len(x), context.persistent, *x.shape[2:]), first)
        return torch.cat([persistent, x[:, context.segment], x[:, context.first : context.segment.stop]], 1)


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a layer's forward, the hidden states first."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(layer.forward).parameters.values() if p.kind in kinds)


def check_attention(layer: nn.Module) -> None:
    """Raises ValueError for an implementation that takes no mask of our making."""
    for module in layer.modules():
        found = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if found not in MASKED_ATTENTION:
            raise ValueError(f"mode mac needs the attention implementation eager or sdpa, not {found}")


def cached_tokens(cache: Any, layer: int) -> int:
    """Tokens that a KV cache has of a layer, before this call."""
    count: Callable[[int], Any] | None = getattr(cache, "get_seq_length", None)
    if count is None:
        raise ValueError(
            f"KV cache {type(cache).__name__}: has no get_seq_length, as Hugging Face's caches have"
        )
    return int(count(layer))


def count_tokens(cache: Any, x: Tensor, layer: int) -> None:
    """Tell the cache of tokens of a layer that keeps no keys: models ask one layer for the length of all."""
    nothing = x.new_zeros(len(x), 1, x.shape[1], 1)
    cache.update(nothing, nothing, layer)
