"""Attention over keys and values, by whichever of two ways is right and fast on a CPU.

Axes: B rows, A heads, T queries, S keys, Z head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attended(query_BATZ: Tensor, key_BASZ: Tensor, value_BASZ: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [B, A, T, Z]; `mask` bool, True where a query may see a key, None where it sees all.

    PyTorch's CPU kernel splits one query's keys by how busy its threads are, so that a row's bits would depend on its
    neighbours (tests/titanmem/test_decoder.py), and its gradient takes more than twice as long as that of the plain
    products (docs/log.md).
    """
    if query_BATZ.shape[2] > 1 and not query_BATZ.requires_grad:
        return F.scaled_dot_product_attention(query_BATZ, key_BASZ, value_BASZ, attn_mask=mask)
    score_BATS = (query_BATZ * query_BATZ.shape[-1] ** -0.5) @ key_BASZ.transpose(-1, -2)
    if mask is not None:
        score_BATS = score_BATS.masked_fill(~mask, float("-inf"))
    return score_BATS.softmax(-1) @ value_BASZ
