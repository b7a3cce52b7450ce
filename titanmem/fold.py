"""θ_M = fold(update, segments): what a segment of tokens does to a memory, as a pure function.

`Encoder` runs the decoder's lower layers over a segment and keeps what its gate lets through; `fold` applies that
to a user's written layer, chunk by chunk. Nothing here depends on other users, on how tokens arrived, or on what the
memory answered before, so replaying a journal gives the same bits.

Axes: T tokens, B blocks, N tokens that the gate lets through, K active units, D value width, H code width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import ops, sparse
from titanmem import bounds
from titanmem.decoder import Decoder
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

SHAPE_TOKENS = 32
"""Text that is encoded is padded to a multiple of this."""
CLEAR_GATE = 0.5
"""Write gate of a token that is part of a value without doubt: the one behind it goes on with that value."""
NEAR_TOKENS = 64
"""Text on either side of a value that may name what it takes the place of."""
UNITS_AT_ONCE = 32
"""Blocks of one call: what it needs of memory does not grow with the segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What the gate lets through of one segment, in order."""

    position_N: Tensor
    """int64: place in the segment."""
    columns_NK: Tensor
    values_NK: Tensor
    target_ND: Tensor
    weight_N: Tensor
    """float32: write gate w."""
    token_N: Tensor
    """int64: whose value the target is."""
    segment_T: Tensor
    """int64: all tokens of the segment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """What folding one segment did."""

    chunks: int
    updates: int
    tokens_written: int
    surprise: float
    """Largest normalised surprise of the segment, 0 when the gate let nothing through."""
    momentum: float
    """S after the segment, on the float16 grid of its file."""
    reservoir: Reservoir | None = None
    """What is kept of all that was written; None if nothing is to be kept."""
    passed_over: int = 0
    """Surprising tokens that were not written, since their chunk had `bounds.most_written` more surprising ones."""
    utilisation: float = 0.0
    """Largest |θ_M| / max_norm before a chunk that wrote, 0 when none did."""


class Encoder:
    """The lower layers as a function from a segment to what is to be written.

    A segment is read in blocks of half a window, each with a quarter of a window of text on either side, so that what
    is written of a block is a function of that text alone. Of a long segment only blocks that `Skim` does not pass
    over are encoded.
    """

    def __init__(self, decoder: Decoder, spec: MemorySpec) -> None:
        self.decoder, self.spec = decoder, spec
        self.values_VD = decoder.memory.vocabulary_values(decoder.embed_tokens.weight)
        self.block, self.side = spec.window // 2, spec.window // 4

    @torch.no_grad()
    def encode(self, context: np.ndarray, tokens: np.ndarray) -> Written:
        """Encode int32 [T] `tokens` behind the end of `context`.

        Raises ValueError for an id outside the vocabulary.
        """
        before = context[-self.side :]
        ids = torch.from_numpy(np.concatenate([before, tokens]).astype(np.int64))
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.values_VD):
            raise ValueError(f"token id outside the vocabulary of {len(self.values_VD)}")
        blocks = self._worth_encoding(ids, len(before))
        place_N, weight_N, key_ND = self._encoded(ids, blocks) if blocks else self._none()
        columns_NK, values_NK = self.decoder.memory.code(key_ND)
        return Written(
            position_N=place_N - len(before),
            columns_NK=columns_NK,
            values_NK=values_NK,
            target_ND=self.values_VD[ids[place_N]],
            weight_N=weight_N,
            token_N=ids[place_N],
            segment_T=ids[len(before) :],
        )

    def _none(self) -> tuple[Tensor, Tensor, Tensor]:
        empty = torch.zeros(0)
        return torch.zeros(0, dtype=torch.int64), empty, empty.view(0, self.spec.key_dim)

    def _worth_encoding(self, ids: Tensor, start: int) -> list[int]:
        """First places of the blocks to be encoded; all of a segment that is as short as a turn."""
        starts = list(range(start, len(ids), self.block))
        if len(ids) - start <= self.spec.window:
            return starts
        likely_T = self.decoder.memory.skim(ids[None])[0, start:] >= 0
        return [
            place
            for place, block in zip(starts, likely_T.split(self.block), strict=True)
            if bool(block.any())
        ]

    def _encoded(self, ids: Tensor, blocks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Places, gates and keys of what the gate lets through in these blocks, in order."""
        memory = self.decoder.memory
        spans = [(max(0, s - self.side), min(len(ids), s + self.block + self.side)) for s in blocks]
        # One shape for all, and a multiple of it for short ones: the bits are a function of the segment.
        longest = max(end - begin for begin, end in spans)
        width = min(self.spec.window, -(-longest // SHAPE_TOKENS) * SHAPE_TOKENS)
        units_BT = torch.zeros(len(spans), width, dtype=torch.int64)
        valid_BT = torch.zeros(len(spans), width, dtype=torch.bool)
        core_BT = torch.zeros(len(spans), width, dtype=torch.bool)
        places_BT = torch.zeros(len(spans), width, dtype=torch.int64)
        for row, ((begin, end), place) in enumerate(zip(spans, blocks, strict=True)):
            units_BT[row, : end - begin] = ids[begin:end]
            valid_BT[row, : end - begin] = True
            core_BT[row, place - begin : min(end, place + self.block) - begin] = True
            places_BT[row, : end - begin] = torch.arange(begin, end)
        found = []
        for part in torch.arange(len(spans)).split(UNITS_AT_ONCE):
            _, hidden = self.decoder.lower_blocks(units_BT[part])
            around = memory.lookahead(hidden, None if bool(valid_BT[part].all()) else valid_BT[part])
            weight_BT = torch.sigmoid(memory.gate_logit(around))
            # |v - M(k)| is at most about 2, so a gate below half the threshold can never reach it.
            chosen_BT = core_BT[part] & (weight_BT >= self.spec.surprise_threshold / 2)
            found.append(
                (places_BT[part][chosen_BT], weight_BT[chosen_BT], memory.keys(hidden, around)[chosen_BT])
            )
        place_N, weight_N, key_ND = (torch.cat(columns) for columns in zip(*found, strict=True))
        return place_N, weight_N, key_ND


@torch.no_grad()
def fold(
    slab_SHD: Tensor,
    slot: int,
    written: Written,
    momentum: float,
    spec: MemorySpec,
    exclusive: Callable[[], AbstractContextManager[object]] = nullcontext,
    reservoir: Reservoir | None = None,
) -> Fold:
    """Write a segment into the slot, chunk by chunk, each chunk in updates of at most `top_k_ratio` of the elements.

    A chunk writes at most `bounds.most_written` tokens, and forgets more when θ_M is nearly as large as it may be. The
    new columns are computed beside the slab and put in place inside `exclusive()`. What was written is offered to the
    reservoir, if there is one.
    """
    updates, largest, passed_over, most_used = 0, 0.0, 0, 0.0
    kept: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    slots = torch.full((len(written.position_N),), slot, dtype=torch.int64)
    chunk_N = written.position_N // spec.chunk_size
    for chunk in chunk_N.unique().tolist():
        admitted_N, refused = _admitted(slab_SHD, slots, written, (chunk_N == chunk).nonzero()[:, 0], spec)
        passed_over += refused
        used: float | None = None
        for group in admitted_N.split(spec.tokens_per_update):
            columns, values = written.columns_NK[group], written.values_NK[group]
            target, weight = written.target_ND[group], written.weight_N[group]
            surprise = sparse.surprise(slab_SHD, slots[group], columns, values, target, weight)
            largest = max(largest, float(surprise.max()))
            keep = surprise >= spec.surprise_threshold
            if not bool(keep.any()):
                continue
            momentum = spec.momentum * momentum + (1 - spec.momentum) * float(surprise.max())
            momentum = float(np.float16(momentum))
            if used is None:
                used = bounds.utilisation(slab_SHD[slot], spec)
                most_used = max(most_used, used)
            rows_M, new_MD = ops.sparse_update(
                slab_SHD,
                slots[:1],
                keep.sum()[None],
                columns[keep],
                values[keep],
                target[keep],
                weight[keep],
                torch.tensor([bounds.forget_share(momentum, spec, used)]),
            )
            with exclusive():
                ops.sparse_apply(slab_SHD, rows_M, new_MD)
            updates += 1
            kept.append(group[keep])
    kept_N = torch.cat(kept)
    return Fold(
        chunks=-(-len(written.segment_T) // spec.chunk_size),
        updates=updates,
        tokens_written=len(kept_N),
        surprise=largest,
        momentum=momentum,
        reservoir=None if reservoir is None else _offer(reservoir, written, kept_N, spec),
        passed_over=passed_over,
        utilisation=most_used,
    )


def _admitted(
    slab_SHD: Tensor, slots_N: Tensor, written: Written, offered_N: Tensor, spec: MemorySpec
) -> tuple[Tensor, int]:
    """Which of a chunk's tokens may be written, by their surprise at its start; how many surprising ones may not."""
    most = bounds.most_written(spec)
    if len(offered_N) <= most:
        return offered_N, 0
    rows = (written.columns_NK, written.values_NK, written.target_ND, written.weight_N)
    surprise_N = sparse.surprise(slab_SHD, slots_N[offered_N], *(row[offered_N] for row in rows))
    over = int((surprise_N >= spec.surprise_threshold).sum())
    return offered_N[bounds.most_surprising(surprise_N, most)], max(0, over - most)


def _offer(reservoir: Reservoir, written: Written, kept_N: Tensor, spec: MemorySpec) -> Reservoir:
    rows = (written.columns_NK, written.values_NK, written.token_N, written.weight_N)
    columns_NK, values_NK, token_N, gate_N = (row[kept_N].cpu().numpy() for row in rows)
    clear_N = written.weight_N >= CLEAR_GATE
    begins_N = ~torch.isin(written.position_N[kept_N] - 1, written.position_N[clear_N]).cpu().numpy()
    named = [_named(written, clear_N, place) for place in kept_N.tolist()]
    return reservoir.offered(columns_NK, values_NK, token_N, gate_N, spec, begins_N, named)


def _named(written: Written, clear_N: Tensor, index: int) -> np.ndarray:
    """Tokens that the text around a written one names without telling them; none around one that may be no value."""
    if not bool(clear_N[index]):
        return np.zeros(0, np.int64)
    position = int(written.position_N[index])
    near = written.segment_T[max(0, position - NEAR_TOKENS) : position + NEAR_TOKENS].cpu().numpy()
    return np.setdiff1d(near, written.token_N[clear_N].cpu().numpy())
