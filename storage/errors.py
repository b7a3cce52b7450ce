"""The one error tree of the project, drawn once.

    TitanmemError
    ├── InvalidName            a tenant, user or object name that may not exist
    ├── BadMemoryFile          a `.titanmem` file that breaks one rule of the format
    │   ├── NotATitanmem       not such an archive at all, or with members that do not belong
    │   ├── UnsupportedVersion written by a newer program
    │   ├── ChecksumMismatch   bytes have changed since they were written
    │   ├── ShapeMismatch      sizes do not fit each other or the model
    │   ├── WrongBase          made for another model
    │   ├── CorruptIndex       positions do not rise or lie outside θ_M
    │   ├── NonFinite          a value is NaN or infinite
    │   ├── TooLarge           more bytes than TITANMEM_BYTES_MAX, packed or unpacked
    │   └── Truncated          the end is missing
    ├── StoreError
    │   ├── VersionConflict    a precondition did not hold
    │   ├── Fenced             the writer's epoch is over
    │   ├── NoSuchMemory       nothing is stored under that name or version
    │   ├── StoreUnavailable   cannot be reached, or its answer is not known
    │   │   └── NotReplicated  in the journal here, but not in the store in time; ask again
    │   ├── StoreUnfit         reachable, but it breaks a rule that we depend on
    │   └── WrongStore         not the one that the journals beside us belong to
    ├── Forgotten              the user has been erased and may not come back by a restore
    ├── JournalError
    │   ├── JournalFull        journal_bytes_max is reached
    │   ├── JournalFailed      the disk refused a write: nothing more is taken before the next start
    │   └── JournalCorrupt     the database is damaged
    └── SnapshotError
        ├── NoSuchSnapshot
        ├── SnapshotDamaged
        └── StoreNotEmpty      a restore would mix with users that are there

Ray carries errors between processes, so every one of them survives pickling whatever its constructor takes.
"""

from __future__ import annotations

from typing import Any

FOUND_CHARS_MAX = 200
"""Longest piece of foreign text that a message repeats."""


def shorten(value: object, chars_max: int = FOUND_CHARS_MAX) -> str:
    """`value` as text of at most `chars_max` characters, safe to print."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: chars_max + 1])
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


def _rebuild(cls: type[TitanmemError], args: tuple[Any, ...], state: dict[str, Any]) -> TitanmemError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class TitanmemError(Exception):
    """Base of all errors of the project: a message for people, and `details` for programs.

    Every entry of `details` can also be read as an attribute (`error.retry_after_s`).
    """

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidName(TitanmemError, ValueError):
    """A tenant, user or object name that breaks the rule for names."""


class BadMemoryFile(TitanmemError):
    """A `.titanmem` file that breaks one rule: `file`, `rule`, `expected`, `found`, `advice`."""

    advice_default = "Take the previous version of this memory, or restore it from a snapshot."

    def __init__(
        self, file: str = "", rule: str = "", expected: object = "", found: object = "", advice: str = ""
    ) -> None:
        name = shorten(file) or "memory file"
        advice = advice or self.advice_default
        text = f"{name}: {rule}: expected {shorten(expected)}, found {shorten(found)}. {advice}"
        super().__init__(
            text,
            file=name,
            rule=rule,
            expected=shorten(expected),
            found=shorten(found),
            advice=advice,
        )


class NotATitanmem(BadMemoryFile):
    """The bytes are not a `.titanmem` archive, or it holds what does not belong there."""

    advice_default = "Give a file that `titanmem users export` or a store of titanmem has written."


class UnsupportedVersion(BadMemoryFile):
    """The file says that it follows a version of the format, or a coding, that this program does not know."""

    advice_default = "Read it with the release of titanmem that wrote it, or a newer one."


class ChecksumMismatch(BadMemoryFile):
    """Bytes have changed since the file was written."""


class ShapeMismatch(BadMemoryFile):
    """Sizes in the file do not fit each other, or not the shapes in its header."""


class WrongBase(BadMemoryFile):
    """The memory belongs to another model."""

    advice_default = (
        "Serve the model that this memory was made with, or start this user with an empty memory."
    )


class CorruptIndex(BadMemoryFile):
    """Positions do not rise strictly or lie outside θ_M."""


class NonFinite(BadMemoryFile):
    """A value of the memory is NaN or infinite."""


class TooLarge(BadMemoryFile):
    """The file, or what it says it unpacks to, is over a limit."""

    advice_default = "No memory that titanmem wrote is this large: do not trust the file."


class Truncated(BadMemoryFile):
    """The end of the file is missing."""

    advice_default = (
        "Copy the file again, completely; else take the previous version or restore it from a snapshot."
    )


class StoreError(TitanmemError):
    """A store did not do what it was asked."""


class VersionConflict(StoreError):
    """A precondition did not hold: somebody else has written first."""


class Fenced(StoreError):
    """The writer's epoch is over: a newer owner has written. `epoch` is the writer's, `seen` the newer."""


class NoSuchMemory(StoreError):
    """Nothing is stored under that user or version."""


class StoreUnavailable(StoreError):
    """The store cannot be reached in time, or the outcome of a write is not known."""


class NotReplicated(StoreUnavailable):
    """`durability = sync`: the update is in the journal of its shard, and was not in the store in time.

    It will get there; asking again with the same update id waits for it and writes nothing twice.
    """


class StoreUnfit(StoreError):
    """The store answers, but breaks a rule that safety depends on (conditional writes)."""


class WrongStore(StoreError):
    """The journals of this node belong to another store: `expected` is its id, `found` this one's, if it has one."""


class Forgotten(TitanmemError):
    """The user was erased; a tombstone keeps a restore or a late write from bringing them back."""


class JournalError(TitanmemError):
    """The journal of a shard did not do what it was asked."""


class JournalFull(JournalError):
    """`bytes_max` of the journal is reached; nothing was appended."""


class JournalFailed(JournalError):
    """The disk failed in a write; what of it is there is not known before the journal is opened anew."""


class JournalCorrupt(JournalError):
    """The journal's database is damaged."""


class SnapshotError(TitanmemError):
    """A cold backup did not do what it was asked."""


class NoSuchSnapshot(SnapshotError):
    """No manifest of that name: the snapshot does not exist or was never finished."""


class SnapshotDamaged(SnapshotError):
    """A snapshot's parts do not hold what its manifest says."""


class StoreNotEmpty(SnapshotError):
    """A restore was to fill an empty store, and the store has users."""
