"""What a journalled segment does to its user's slot: pure arithmetic under the slot's lock, in the fold thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from actors.figures import Figures
from actors.slab import Resident, Slab
from storage.segment import Segment
from titanmem.consolidation import consolidate, replay
from titanmem.fold import Encoder, Fold, fold
from titanmem.reservoir import Reservoir


class SlotWriter:
    """Folds segments into slots. Blocking; whoever calls holds the user's turn."""

    def __init__(self, slab: Slab, encoder: Encoder, figures: Figures) -> None:
        self._slab, self._encoder, self._figures = slab, encoder, figures

    def fold(self, resident: Resident, segment: Segment) -> Fold:
        """Write a segment into the slot. One of role `replay` is worked out in a copy, as it was the first time."""
        if segment.role == "replay":
            copy_1HD = self._slab.copy(resident)
            spec, values_VD = self._slab.spec, self._encoder.values_VD
            updates = consolidate(copy_1HD, 0, resident.reservoir, values_VD, spec, int(segment.tokens[0]))
            return self.put_replayed(resident, copy_1HD, updates)
        written = self._encoder.encode(segment.context, segment.tokens)
        return fold(
            self._slab.written_SHD, resident.slot, written, resident.momentum, self._slab.spec,
            self._exclusive(resident), resident.reservoir,
        )  # fmt: skip

    def replay(self, copy_1HD: torch.Tensor, reservoir: Reservoir, passes: int) -> Iterator[int]:
        """Consolidate a copy of a slot, an update for each item taken; see `titanmem.consolidation.replay`."""
        return replay(copy_1HD, 0, reservoir, self._encoder.values_VD, self._slab.spec, passes)

    def put_replayed(self, resident: Resident, copy_1HD: torch.Tensor, updates: int) -> Fold:
        """Put a consolidated copy in place."""
        self._slab.put(resident, copy_1HD, self._exclusive(resident))
        return Fold(chunks=0, updates=updates, tokens_written=0, surprise=0.0, momentum=resident.momentum)

    def _exclusive(self, resident: Resident) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def exclusive():
            with resident.lock.exclusive():
                started = time.perf_counter()
                yield
                self._figures.lock_s.observe(time.perf_counter() - started)

        return exclusive
