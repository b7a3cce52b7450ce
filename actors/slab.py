"""The slab: the written layers of all resident users of a shard, one slot each, in one tensor.

A slot is found by user, given out by a free list, and taken back in the order of last use (`residents`). The
slab knows no disk: whoever releases a slot has made sure that its memory rests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from storage.memory import Memory
from storage.names import UserKey
from titanmem import bounds
from titanmem.probes import Probes
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

BLOCK_ROWS = 512
"""Rows that are put in place under one hold of the write lock: 128 KiB of the shipped model's."""


class ReadWriteLock:
    """Many readers or one writer; a waiting writer goes before new readers. Held for microseconds."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._free:
                self._readers -= 1
                self._free.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._free:
            self._writers_waiting += 1
            self._free.wait_for(lambda: not self._writing and not self._readers)
            self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._free:
                self._writing = False
                self._free.notify_all()


@dataclass(kw_only=True, eq=False)
class Resident:
    """One user in a slot, with everything of the state that is not in the slab."""

    key: UserKey
    slot: int
    reservoir: Reservoir
    """What is kept of all that was written."""
    memory_version: int = 0
    last_chunk_id: int = 0
    """Last chunk folded into the slot. A rollback or an import takes an id too: its loss shows as a gap."""
    journaled_chunk_id: int = 0
    """Last chunk in the journal: a turn's last chunk is journalled before it is folded."""
    tokens_seen: int = 0
    tokens_written: int = 0
    updates: int = 0
    consolidated: int = 0
    """`tokens_written` at the last consolidation: whatever was written since then is to be consolidated."""
    momentum: float = 0.0
    tail: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: the last window of the document that is being read, context of its next piece."""
    tail_of: int = 0
    """Which document that is: 48 bits of its name's hash, which a float of the file's header holds exactly."""
    seen: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hashes of what was already written, oldest first."""
    stored_version: int = 0
    """Newest version in the store."""
    claimed: bool = False
    """HEAD carries this owner's epoch: nobody who was owner before can store a version any more."""
    swept: bool = False
    """What crashes of earlier owners may have left of versions is removed."""
    stored_chunk_id: int = 0
    """Last chunk of that version. The journal is trimmed to it only when the next version is stored."""
    unsettled: Memory | None = None
    """What was last sent to the store and may or may not be there: it is sent again as it is."""
    tokens_since_stored: int = 0
    segments_since_stored: int = 0
    probes: Probes | None = None
    """What the newest stored version answers; None before there is one."""
    recall: float = 1.0
    """Share of those probes that was answered when they were last asked."""
    crowded: bool = False
    """What was told since then has made it answer fewer: judged when it has been consolidated."""
    falls: int = 0
    """Times that its recall has fallen and it was taken back."""
    frozen: bool = False
    """Neither read nor written until somebody rolls it back or imports another."""
    users: int = 0
    """Requests that hold this slot now; it is not evicted before they are done."""
    used_at_s: float = 0.0
    lock: ReadWriteLock = field(default_factory=ReadWriteLock)

    @property
    def dirty(self) -> bool:
        """Holds something that no stored version has."""
        return self.memory_version > self.stored_version


class Slab:
    """Slots for `slots` users; `written_SHD` float16 [S, H, D] is on the grid of the memory's file."""

    def __init__(self, spec: MemorySpec, slots: int, device: torch.device | str = "cpu") -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots}: must be at least 1")
        self.spec = spec
        self.written_SHD = torch.zeros(slots, *spec.written_shape, dtype=torch.float16, device=device)
        self._free = list(range(slots - 1, -1, -1))
        self._residents: OrderedDict[UserKey, Resident] = OrderedDict()

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def slots(self) -> int:
        return len(self.written_SHD)

    def residents(self) -> list[Resident]:
        """All residents, the one who rested longest first."""
        return list(self._residents.values())

    def get(self, key: UserKey) -> Resident | None:
        """The user's resident, now the most recently used; None if the user has no slot."""
        resident = self._residents.get(key)
        if resident is not None:
            self._residents.move_to_end(key)
        return resident

    def peek(self, key: UserKey) -> Resident | None:
        """The same, but it does not count as a use."""
        return self._residents.get(key)

    def has_room(self) -> bool:
        return bool(self._free)

    def place(self, key: UserKey) -> Resident:
        """A zeroed slot for a user who has none; the caller has made sure of room."""
        assert self._free, "make room before placing"
        assert key not in self._residents, "a user is placed once"
        slot = self._free.pop()
        self.written_SHD[slot].zero_()
        resident = Resident(key=key, slot=slot, reservoir=Reservoir.empty(self.spec))
        self._residents[key] = resident
        return resident

    def release(self, resident: Resident) -> None:
        """Give the slot back. What was in it is gone."""
        assert resident.users == 0, "a slot in use is not released"
        del self._residents[resident.key]
        self.written_SHD[resident.slot].zero_()
        self._free.append(resident.slot)

    def load(self, resident: Resident, positions: np.ndarray, values: np.ndarray) -> None:
        """Set the slot from flat positions (int64) of the written layer and their float16 values."""
        flat = self.written_SHD[resident.slot].view(-1)
        with resident.lock.exclusive():
            flat.zero_()
            flat[torch.from_numpy(positions)] = torch.from_numpy(values).to(flat.device)

    def copy(self, resident: Resident) -> torch.Tensor:
        """The slot as a slab of its own, [1, H, D]."""
        with resident.lock.shared():
            return self.written_SHD[resident.slot][None].clone()

    def put(
        self,
        resident: Resident,
        copy_1HD: torch.Tensor,
        exclusive: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """The slot from such a copy, block by block. Nobody may read in between: the caller holds the user's turn."""
        for start in range(0, self.spec.code_width, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            with exclusive():
                self.written_SHD[resident.slot, rows] = copy_1HD[0, rows]

    def nonzero(self, resident: Resident) -> tuple[np.ndarray, np.ndarray]:
        """Flat positions int64, rising, and float16 values of what is not zero in the slot."""
        with resident.lock.shared():
            values = self.written_SHD[resident.slot].view(-1).cpu().numpy().copy()
        positions = values.nonzero()[0]
        return positions, values[positions]

    def norm(self, resident: Resident) -> float:
        """|θ_M| of the written layer."""
        with resident.lock.shared():
            return bounds.norm(self.written_SHD[resident.slot])
