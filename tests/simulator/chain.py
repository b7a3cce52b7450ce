"""A memory in place of θ_M: a hash chain over the updates that were folded, so that a state says what went into it.

Slots, residents, files, versions, journal and turns are the product's. What is put in its place is the arithmetic: 64
bits of a chain, kept as eight float16 numbers of the written layer, and folding a segment adds one link.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import xxhash

from actors.keeper import MemoryKeeper
from actors.options import KeeperOptions
from actors.replicator import Replicator
from actors.roster import Roster
from actors.slab import Resident, Slab
from actors.vault import Layout, Vault
from storage.segment import Segment
from storage.store import open_store
from storage.titanmem import decode
from tests.simulator.disk import ProcessJournal
from tests.simulator.world import World
from titanmem.fold import Fold

BYTES = 8
SPEC: Any = SimpleNamespace(
    written_shape=(1, BYTES), code_width=1, code_active=2, key_dim=1, d_nltm=1, window=16, chunk_size=4, reservoir=8,
    max_norm=1.0, state_bytes=2 * BYTES, parameters=BYTES,
)  # fmt: skip
LAYOUT = Layout(shape=((1, BYTES),), offset=0, rule="sparse", base="0" * 32, vocabulary=1)
_links: dict[int, tuple[int, str]] = {0: (0, "")}


def link(chain: int, update_id: str) -> int:
    """The chain with one update more."""
    new = xxhash.xxh3_64_intdigest(f"{chain}/{update_id}".encode())
    _links[new] = (chain, update_id)
    return new


def history(chain: int) -> list[str]:
    """Ids of all updates that a chain holds, oldest first."""
    found: list[str] = []
    while chain:
        chain, update_id = _links[chain]
        found.append(update_id)
    return found[::-1]


def history_in(file: bytes) -> list[str]:
    """The same, of a `.titanmem` file."""
    return history(_chain(decode(file).theta_val))


def _chain(values: np.ndarray) -> int:
    return int.from_bytes(bytes(int(value) - 1 for value in values), "big")


class Row:
    """A slot."""

    def __init__(self) -> None:
        self.chain = 0

    def zero_(self) -> None:
        self.chain = 0


class ChainSlab(Slab):
    """The slab, with chains in its slots. A byte is kept as 1 to 256: all of them exact, and none of them zero."""

    def __init__(self, slots: int) -> None:
        super().__init__(SimpleNamespace(written_shape=(1, 1)), slots)  # type: ignore[arg-type]
        self.spec = SPEC
        self.written_SHD: Any = [Row() for _ in range(slots)]

    def load(self, resident: Resident, positions: np.ndarray, values: np.ndarray) -> None:
        self.written_SHD[resident.slot].chain = _chain(values)

    def nonzero(self, resident: Resident) -> tuple[np.ndarray, np.ndarray]:
        raw = self.written_SHD[resident.slot].chain.to_bytes(BYTES, "big")
        return np.arange(BYTES), np.array([byte + 1 for byte in raw], np.float16)

    def norm(self, resident: Resident) -> float:
        return 0.0


class ChainWriter:
    """`actors.writer.SlotWriter`, one link a segment."""

    def __init__(self, slab: ChainSlab) -> None:
        self._slab = slab

    def fold(self, resident: Resident, segment: Segment) -> Fold:
        row = self._slab.written_SHD[resident.slot]
        row.chain = link(row.chain, segment.update_id)
        chunks = segment.last_chunk_id - segment.first_chunk_id + 1
        return Fold(chunks=chunks, updates=1, tokens_written=len(segment.tokens), surprise=0.0, momentum=0.0)


class Null:
    """Figures that nobody reads, and an engine that nobody asks."""

    def __getattr__(self, name: str) -> Any:
        return Null()

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


async def open_keeper(options: KeeperOptions) -> MemoryKeeper:
    """The product's keeper, roster and vault over chains."""
    process = World.current.process
    assert process is not None, "a keeper belongs to a process"
    figures: Any = Null()
    slab = ChainSlab(options.slots)
    vault = Vault(open_store(options.store_url), LAYOUT, options.epoch, on_damage=figures.rollbacks.add)
    journal = ProcessJournal(options.journal)
    replicator = Replicator(journal, vault.store.segments, options, figures, clock=process.loop.time)
    roster = Roster(
        slab=slab, vault=vault, journal=journal, replicator=replicator, figures=figures,
        encoder=SimpleNamespace(spec=SPEC, values_VD=None),  # type: ignore[arg-type]
        persist_tokens=options.persist_tokens, clock=process.loop.time,
    )  # fmt: skip
    roster.watch = Null()  # type: ignore[assignment]
    roster.writer = ChainWriter(slab)  # type: ignore[assignment]
    engine: Any = SimpleNamespace(
        decoder=SimpleNamespace(config=SimpleNamespace(remembers=True)), close=lambda: None
    )
    replicator.start()
    return MemoryKeeper(options, engine=engine, roster=roster, tokenizer=Null(), figures=figures)  # type: ignore[arg-type]
