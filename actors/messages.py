"""What travels between the door (`cluster/`) and a shard: plain records, picklable, no Ray and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX

MemoryAccess = Literal["read_write", "read_only", "off"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedMessage:
    """One chat message after the template: its token ids and the hash of the conversation up to and with it."""

    role: str
    tokens: np.ndarray
    """int32 [n]: the ids that this message adds to the prompt."""
    prefix_hash: int
    """uint64: chained hash of all (role, content) pairs up to this message; equal prefixes have equal hashes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCall:
    """One chat completion for one user, already rendered and tokenised."""

    key: UserKey
    request_id: str
    """Names this attempt; used to cancel it and in traces."""
    update_id: str
    """Exactly-once name of the write; a retry carries the same one."""
    messages: tuple[RenderedMessage, ...]
    """The whole conversation as the client sent it; the shard finds out which of it is new."""
    generation_prompt: np.ndarray
    """int32 [n]: what the template puts before the assistant's reply."""
    conversation: str = ""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    memory: MemoryAccess = "read_write"
    mode: str | None = None
    trace: dict[str, str] = field(default_factory=dict)
    """W3C trace context (`traceparent`, `tracestate`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """Newly generated ids, in order."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneEvent:
    """The reply has ended and everything it acknowledges is in the journal."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    memory_version: int
    tokens_written: int
    """Tokens of this turn whose surprise was over the threshold."""
    surprise: float
    """Largest normalised surprise of this turn, 0 when nothing was offered."""
    text: str = ""
    """The whole reply, stop strings already cut."""
    memory: MemoryAccess = "read_write"
    """What was done, which is not what was asked for where the model has no memory or the user's is frozen."""
    frozen: bool = False
    """The guard has frozen the user's memory: it was neither read nor written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestCall:
    """Pieces of a document, of SEGMENT_TOKENS_MAX ids each and the last one of what is left."""

    key: UserKey
    update_id: str
    """Name of the one piece, or of the document where `first` is given: piece n is the update `<update_id>:<n>`."""
    conversation: str
    """Name of the document: pieces of one document follow each other in one context."""
    tokens: np.ndarray
    """int32 [n]."""
    first: int | None = None
    """Number of the first piece; None where the call is one piece, of at most SEGMENT_TOKENS_MAX ids."""
    last: bool = False
    """True for the document's last piece."""
    trace: dict[str, str] = field(default_factory=dict)

    def pieces(self) -> dict[str, np.ndarray]:
        """The pieces by their update ids, in order. Raises ValueError for one that is too long."""
        if self.first is None:
            if len(self.tokens) > SEGMENT_TOKENS_MAX:
                raise ValueError(f"a piece of {len(self.tokens)} tokens: at most {SEGMENT_TOKENS_MAX}")
            return {self.update_id: self.tokens}
        starts = range(0, len(self.tokens), SEGMENT_TOKENS_MAX)
        cut = [self.tokens[start : start + SEGMENT_TOKENS_MAX] for start in starts]
        return {f"{self.update_id}:{number}": piece for number, piece in enumerate(cut, self.first)}


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestOutcome:
    """What pieces of a document did; the same again for repeated update ids."""

    tokens: int
    chunks: int
    tokens_written: int
    memory_version: int
    pieces: int = 1
    duplicates: int = 0
    """Pieces that had been written before."""

    @property
    def duplicate(self) -> bool:
        """Whether all of it had been written before."""
        return self.duplicates == self.pieces > 0

    def plus(self, later: IngestOutcome) -> IngestOutcome:
        """Of both together."""
        both = {
            name: getattr(self, name) + getattr(later, name)
            for name in self.__slots__
            if name != "memory_version"
        }
        return IngestOutcome(**both, memory_version=max(self.memory_version, later.memory_version))

    def record(self) -> dict[str, int]:
        """What the journal keeps of one piece."""
        return {
            name: getattr(self, name) for name in ("tokens", "chunks", "tokens_written", "memory_version")
        }


NOTHING = IngestOutcome(tokens=0, chunks=0, tokens_written=0, memory_version=0, pieces=0)
