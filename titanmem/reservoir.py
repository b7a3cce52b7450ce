"""A bounded sample of what was written into a memory: (code, token, gate) entries, on the grid of their file.

Consolidation replays it (`titanmem/consolidation.py`). Two rules say who stays:

- The newer wins. An entry whose code overlaps a new one's by REPLACED_OVERLAP or more leaves, whatever its token, so
  that no replay can bring back what a correction has replaced; for a new one that begins a value CORRECTED_OVERLAP is
  enough. One that the text around the new one names ("I left Dr Rao and go to Dr Okafor") gets the new one's token, so
  that whoever asks in the old words is told the new value; for that NAMED_OVERLAP is enough.
- When there are too many, those of the smallest hash of their own content leave. That is a uniform sample of all
  different entries ever offered (bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", PODC
  2007), without a counter or random state: the same entries in the same order leave the same sample, bit for bit.

Axes: R entries in order of arrival, N entries offered, K active units of a code, H code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from titanmem.spec import MemorySpec

REPLACED_OVERLAP = 0.8
"""Overlap a . b of two unit codes from which on the newer entry replaces the older.

Lower, and facts that only resemble each other push each other out; higher, and a fact and its correction in other words
are both kept and replayed, which takes back what the correction won: after one full delta step each, what is read at
the older code is (1 - c^2) v_a + c v_b with c = a . b, the newer value from c = 0.618 on. docs/log.md has the recall of
facts and of corrections for each value."""

CORRECTED_OVERLAP = 0.5
"""The same where the newer begins a value: its key is what the fact is about, and not the word before it, which keys of
later tokens have in common with many others'. Of facts corrected in own words about half overlap by as much, of two
about different people a fifth (docs/log.md)."""

NAMED_OVERLAP = 0.2
"""The same where the text around the newer names the older's token, which does not happen to whom it merely resembles:
of pairs of facts about different people none name each other (docs/log.md)."""

UNIT_TOLERANCE = 0.01
"""Rounding K values of a unit code to float16 moves its norm by at most 2^-11."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reservoir:
    """Entries in order of arrival. Never changed: `offered` gives another one."""

    columns_RK: np.ndarray
    """int32, rising in each row."""
    values_RK: np.ndarray
    """float16, unit norm."""
    token_R: np.ndarray
    """int32."""
    gate_R: np.ndarray
    """float16: write gate w."""
    priority_R: np.ndarray
    """uint64: hash of the entry; the smallest leave first. Not stored, since it follows from the rest."""

    def __len__(self) -> int:
        return len(self.token_R)

    @classmethod
    def of(
        cls, columns_RK: np.ndarray, values_RK: np.ndarray, token_R: np.ndarray, gate_R: np.ndarray
    ) -> Reservoir:
        """Entries as they come, rounded to the grid of their file."""
        columns = np.ascontiguousarray(columns_RK, "<i4")
        values = np.ascontiguousarray(values_RK, "<f2")
        token, gate = np.ascontiguousarray(token_R, "<i4"), np.ascontiguousarray(gate_R, "<f2")
        rows = zip(columns, values, token, strict=True)
        hashes = [xxhash.xxh3_64_intdigest(c.tobytes() + v.tobytes() + t.tobytes()) for c, v, t in rows]
        priority = np.array(hashes, np.uint64)
        return cls(columns_RK=columns, values_RK=values, token_R=token, gate_R=gate, priority_R=priority)

    @classmethod
    def empty(cls, spec: MemorySpec) -> Reservoir:
        none = np.zeros((0, spec.code_active))
        return cls.of(none, none, none[:, 0], none[:, 0])

    @classmethod
    def loaded(
        cls, columns_RK: np.ndarray, values_RK: np.ndarray, token_R: np.ndarray, gate_R: np.ndarray,
        spec: MemorySpec, vocabulary: int,
    ) -> Reservoir:  # fmt: skip
        """The reservoir of a file, cut to `spec.reservoir`; none if its codes have another K than the spec's.

        Raises ValueError for entries that no fold can have written: units outside the code or not rising, codes that
        are not of unit norm, gates outside 0 to 1, tokens outside the vocabulary.
        """
        if columns_RK.shape[1] != spec.code_active or not len(columns_RK):
            return cls.empty(spec)
        if columns_RK.min() < 0 or columns_RK.max() >= spec.code_width:
            raise ValueError(f"units {columns_RK.min()} to {columns_RK.max()} in a code of {spec.code_width}")
        if bool((np.diff(columns_RK, axis=1) < 1).any()):
            raise ValueError("the units of a code do not rise")
        norm_R = np.linalg.norm(values_RK.astype(np.float32), axis=1)
        # A code of nothing but zeros comes from a key whose units are all equal; it moves nothing.
        if not bool(((np.abs(norm_R - 1) <= UNIT_TOLERANCE) | (norm_R == 0)).all()) or values_RK.min() < 0:
            raise ValueError("a code is not of unit norm, or has negative values")
        if not (gate_R.min() >= 0 and gate_R.max() <= 1):
            raise ValueError(f"gates {gate_R.min()} to {gate_R.max()}, outside 0 to 1")
        if token_R.min() < 0 or token_R.max() >= vocabulary:
            raise ValueError(f"tokens {token_R.min()} to {token_R.max()} in a vocabulary of {vocabulary}")
        return cls.of(columns_RK, values_RK, token_R, gate_R).cut(spec.reservoir)

    def offered(
        self, columns_NK: np.ndarray, values_NK: np.ndarray, token_N: np.ndarray, gate_N: np.ndarray,
        spec: MemorySpec, begins_N: np.ndarray | None = None, named: Sequence[np.ndarray] | None = None,
    ) -> Reservoir:  # fmt: skip
        """The reservoir after these entries were written, in this order; at most `spec.reservoir` entries.

        `begins_N`, bool, says which are the first token of a value; None is none of them. `named` has for each the
        tokens that the text around it names; None is none.
        """
        if not spec.reservoir or not len(token_N):
            return self
        both = self._with(Reservoir.of(columns_NK, values_NK, token_N, gate_N))
        stays, enough_N = np.ones(len(both), bool), np.full(len(token_N), REPLACED_OVERLAP)
        if begins_N is not None:
            enough_N[begins_N] = CORRECTED_OVERLAP
        values_RK, dense_H = both.values_RK.astype(np.float32), np.zeros(spec.code_width, np.float32)
        token_R = both.token_R.copy()
        for new, place in enumerate(range(len(self), len(both))):
            columns_K = both.columns_RK[place]
            dense_H[columns_K] = values_RK[place]
            overlap = np.einsum("rk,rk->r", dense_H[both.columns_RK[:place]], values_RK[:place])
            stays[:place] &= overlap < enough_N[new]
            if named is not None and enough_N[new] < REPLACED_OVERLAP:
                older = np.isin(token_R[: len(self)], named[new]) & (overlap[: len(self)] >= NAMED_OVERLAP)
                token_R[: len(self)][older] = token_R[place]
            dense_H[columns_K] = 0
        if (token_R != both.token_R).any():
            both = Reservoir.of(both.columns_RK, both.values_RK, token_R, both.gate_R)
        return both.take(stays.nonzero()[0]).cut(spec.reservoir)

    def _with(self, new: Reservoir) -> Reservoir:
        pairs = {name: (getattr(self, name), getattr(new, name)) for name in Reservoir.__slots__}
        return Reservoir(**{name: np.concatenate(pair) for name, pair in pairs.items()})

    def take(self, places: np.ndarray) -> Reservoir:
        """Only the entries at these places, in their order: int64, or bool [R]."""
        return Reservoir(**{name: getattr(self, name)[places] for name in Reservoir.__slots__})

    def cut(self, longest: int) -> Reservoir:
        """At most `longest` entries, those of the largest hash: a uniform sample of them all."""
        if len(self) <= longest:
            return self
        first = np.argsort(self.priority_R, kind="stable")[len(self) - longest :]
        return self.take(np.sort(first))
