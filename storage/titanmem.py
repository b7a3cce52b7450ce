"""The `.titanmem` file, version 1: one user's θ_M at one version.

A ZIP archive that `numpy.load` opens. `encode` gives the same bytes for the same memory; `decode` gives the
memory or raises the `BadMemoryFile` of the first rule that the bytes break. It checks, in this order and
before it allocates what a file merely claims: size, archive and directory, header, members and their declared
sizes; then CRC32s; then that positions rise and lie inside θ_M, that values are finite, that the base fits.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np

from storage import archive
from storage.archive import Entry, Member
from storage.errors import (
    ChecksumMismatch,
    CorruptIndex,
    NonFinite,
    NotATitanmem,
    ShapeMismatch,
    TooLarge,
    WrongBase,
)
from storage.header import (
    ELEMENTS_MAX,
    HEADER_BYTES_MAX,
    Header,
    crc_text,
    elements_of,
    parse_header,
    write_header,
)
from storage.memory import (
    REPLAY_MAX,
    REPLAY_PLACES_MAX,
    SEEN_MAX,
    TAIL_TOKENS_MAX,
    Memory,
    Replay,
    no_hashes,
    no_tokens,
)
from storage.npy import IDX_BYTES_MAX, NPY_HEADER_BYTES_MAX, decode_rising, encode_rising, from_npy, to_npy

TITANMEM_BYTES_MAX = 256 << 20
"""Largest file, and the most that one may unpack to."""

assert TITANMEM_BYTES_MAX >= 2 * ELEMENTS_MAX, "the values of the largest θ_M fit into a file"


_REPLAY = ("replay_columns", "replay_values", "replay_tokens", "replay_gates")
_ORDER = ("nonzero_idx", "theta_val", "momentum", *_REPLAY, "tail", "seen")
_REQUIRED = frozenset(("nonzero_idx", "theta_val", "momentum"))
_FORMS = {
    "nonzero_idx": ("|u1", 1),
    "theta_val": ("<f2", 1),
    "momentum": ("<f2", 1),
    "replay_columns": ("<i4", 2),
    "replay_values": ("<f2", 2),
    "replay_tokens": ("<i4", 1),
    "replay_gates": ("<f2", 1),
    "tail": ("<i4", 1),
    "seen": ("<u8", 1),
}


def encode(memory: Memory, *, bytes_max: int = TITANMEM_BYTES_MAX) -> bytes:
    """The file of `memory`, always the same bytes for the same memory.

    Raises `CorruptIndex`, `NonFinite`, `ShapeMismatch`, `TooLarge` or `NotATitanmem` as `decode` would, so
    that nothing is written that could not be read again.
    """
    file = f"memory of {memory.key}"
    _check_values(memory, file)
    index = memory.nonzero_idx
    if len(index) > 1 and int(np.diff(index).min()) < 1:
        raise CorruptIndex(file, "positions rise strictly", "a step of 1 or more", "less")
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < elements_of(memory.theta_shape):
        raise CorruptIndex(file, "positions lie inside θ_M", elements_of(memory.theta_shape), int(index[-1]))
    arrays = {"nonzero_idx": encode_rising(index), "theta_val": memory.theta_val, "momentum": memory.momentum}
    if memory.replay is not None:
        replay = memory.replay
        rows = (replay.columns, replay.values, replay.tokens, replay.gates)
        arrays.update(zip(_REPLAY, rows, strict=True))
    arrays.update((name, a) for name, a in (("tail", memory.tail), ("seen", memory.seen)) if len(a))
    members = [Member(f"{name}.npy", to_npy(a), fast=_is_noise(a)) for name, a in arrays.items()]
    crc = 0
    for member in members:
        crc = zlib.crc32(member.data, crc)
    header = write_header(_header_of(memory, crc_text(crc)))
    if len(header) > HEADER_BYTES_MAX:
        raise TooLarge(file, "the header is not too large", f"at most {HEADER_BYTES_MAX} bytes", len(header))
    parse_header(header, file)
    data = archive.pack([Member("header", header, stored=True), *members])
    if max(len(data), sum(len(member.data) for member in members)) > bytes_max:
        raise TooLarge(file, "a file is not too large", f"at most {bytes_max} bytes", len(data))
    return data


def _is_noise(array: np.ndarray) -> bool:
    """Whether matching is not worth its time: large float arrays of which hardly any byte is zero."""
    large = array.dtype == np.float16 and array.size > 8192
    return large and 2 * int(np.count_nonzero(array)) > array.size


def _header_of(memory: Memory, checksum: str) -> Header:
    return Header(
        key=memory.key,
        memory_version=memory.memory_version,
        epoch=memory.epoch,
        last_chunk_id=memory.last_chunk_id,
        tokens_seen=memory.tokens_seen,
        base=memory.base,
        rule=memory.rule,
        theta_shape=memory.theta_shape,
        written_layers=memory.written_layers,
        created_at=memory.created_at,
        nonzero=len(memory.nonzero_idx),
        stats=memory.stats,
        checksum=checksum,
    )


def _check_values(memory: Memory, file: str) -> None:
    """What holds between the arrays of a memory, for the writer and for the reader."""
    elements = elements_of(memory.theta_shape)
    if len(memory.nonzero_idx) != len(memory.theta_val):
        found = f"{len(memory.theta_val)} values"
        raise ShapeMismatch(file, "each position has a value", len(memory.nonzero_idx), found)
    if len(memory.momentum) not in (len(memory.theta_shape), len(memory.written_layers), elements):
        expected = f"{len(memory.theta_shape)}, {len(memory.written_layers)} or {elements}"
        raise ShapeMismatch(file, "momentum is one a layer or one an element", expected, len(memory.momentum))
    floats = [("theta_val", memory.theta_val), ("momentum", memory.momentum)]
    if memory.replay is not None:
        floats += [("replay_values", memory.replay.values), ("replay_gates", memory.replay.gates)]
        columns, tokens = memory.replay.columns, memory.replay.tokens
        if columns.size and not 0 <= int(columns.min()) <= int(columns.max()) < elements:
            found = f"{columns.min()} to {columns.max()}"
            raise CorruptIndex(file, "replay_columns lie inside θ_M", f"0 to {elements - 1}", found)
        if tokens.size and int(tokens.min()) < 0:
            raise CorruptIndex(file, "replay_tokens are token ids", "0 or more", int(tokens.min()))
    if memory.tail.size and int(memory.tail.min()) < 0:
        raise CorruptIndex(file, "tail holds token ids", "0 or more", int(memory.tail.min()))
    for name, value in memory.stats.items():
        if not math.isfinite(value):
            raise NonFinite(file, f"stats field {name} is finite", "a finite number", value)
    for name, values in floats:
        broken = (values.view(np.uint16) & np.uint16(0x7C00)) == 0x7C00
        if broken.any():
            raise NonFinite(file, f"{name} is finite", "finite numbers", f"{int(broken.sum())} others")


def _open(data: bytes, file: str, bytes_max: int) -> tuple[Header, list[Entry]]:
    """Directory and header of a file; all that can be known without unpacking a member."""
    if len(data) > bytes_max:
        raise TooLarge(file, "a file is not too large", f"at most {bytes_max} bytes", f"{len(data)} bytes")
    entries = archive.read_directory(data, file)
    if not entries or entries[0].name != "header":
        names = ", ".join(entry.name for entry in entries)
        raise NotATitanmem(file, "the first member is the header", "header", names or "no member")
    header = parse_header(archive.extract(data, entries[0], HEADER_BYTES_MAX, file), file)
    archive.check_bookkeeping(data, entries, file)
    return header, entries[1:]


def read_header(data: bytes, *, name: str = "", bytes_max: int = TITANMEM_BYTES_MAX) -> Header:
    """The checked header of a file; its members' own bytes are not looked at."""
    return _open(data, name, bytes_max)[0]


def relabel(data: bytes, *, memory_version: int, epoch: int, name: str = "") -> bytes:
    """A whole file's memory under another version and epoch: the bytes that `encode` gives, without its work.

    Only bookkeeping and header are looked at. Raises `BadMemoryFile` as `decode` does for these.
    """
    header, entries = _open(data, name, TITANMEM_BYTES_MAX)
    newer = write_header(replace(header, memory_version=memory_version, epoch=epoch))
    parse_header(newer, name)
    return archive.repack(
        data, [Entry("header", 0, 0, 0, 0, 0), *entries], Member("header", newer, stored=True)
    )


def _check_members(header: Header, entries: list[Entry], file: str, bytes_max: int) -> None:
    """Which members there are, and their declared sizes against theta_shape, before any is unpacked."""
    names = [entry.name.removesuffix(".npy") for entry in entries]
    known = [name for name in _ORDER if name in names]
    has_replay = {name in names for name in _REPLAY}
    if names != known or not _REQUIRED.issubset(names) or len(has_replay) > 1:
        expected, found = ", ".join(_ORDER), ", ".join(names)
        raise NotATitanmem(file, "the members are those of version 1, in order", expected, found)
    if any(entry.name == name for entry, name in zip(entries, names, strict=True)):
        raise NotATitanmem(file, "arrays are .npy members", "nonzero_idx.npy", names[0])
    total = sum(entry.bytes for entry in entries)
    if total > bytes_max:
        raise TooLarge(file, "members unpack to a bounded size", f"at most {bytes_max} bytes", total)
    codes = REPLAY_MAX * REPLAY_PLACES_MAX
    largest = {
        "nonzero_idx": IDX_BYTES_MAX * header.nonzero,
        "theta_val": 2 * header.nonzero,
        "momentum": 2 * header.elements,
        "replay_columns": 4 * codes,
        "replay_values": 2 * codes,
        "replay_tokens": 4 * REPLAY_MAX,
        "replay_gates": 2 * REPLAY_MAX,
        "tail": 4 * TAIL_TOKENS_MAX,
        "seen": 8 * SEEN_MAX,
    }
    if header.nonzero > header.elements:
        raise ShapeMismatch(file, "nonzero fits theta_shape", f"at most {header.elements}", header.nonzero)
    for entry, name in zip(entries, names, strict=True):
        limit = max(largest[name], 2 * len(header.theta_shape)) + NPY_HEADER_BYTES_MAX
        if entry.bytes > limit:
            raise ShapeMismatch(file, f"{name} fits theta_shape", f"at most {limit} bytes", entry.bytes)


def decode(
    data: bytes,
    *,
    expect_base: str | None = None,
    expect_shape: tuple[tuple[int, ...], ...] | None = None,
    name: str = "",
    bytes_max: int = TITANMEM_BYTES_MAX,
) -> Memory:
    """The memory in `data`, with every rule checked; `name` is what errors call the file.

    Raises one of the classes under `BadMemoryFile` and nothing else, whatever `data` holds. `expect_shape`
    lets a server refuse, before anything is allocated, what could not fit its model.
    """
    header, entries = _open(data, name, bytes_max)
    if expect_shape is not None and header.theta_shape != expect_shape:
        raise ShapeMismatch(name, "theta_shape is that of the model", expect_shape, header.theta_shape)
    _check_members(header, entries, name, bytes_max)
    crc = 0
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, bytes] = {}
    for entry in entries:
        member = entry.name.removesuffix(".npy")
        plain[member] = archive.extract(data, entry, bytes_max, name)
        crc = zlib.crc32(plain[member], crc)
    if crc_text(crc) != header.checksum:
        raise ChecksumMismatch(name, "checksum over the members", header.checksum, crc_text(crc))
    for member, raw in plain.items():
        arrays[member] = from_npy(raw, *_FORMS[member], member, name)
    index = decode_rising(arrays["nonzero_idx"], header.nonzero, header.elements, name)
    memory = _build(header, arrays, index, name)
    _check_values(memory, name)
    if expect_base is not None and header.base != expect_base:
        raise WrongBase(name, "the memory belongs to the model that serves", expect_base, header.base)
    return memory


def _build(header: Header, arrays: dict[str, np.ndarray], index: np.ndarray, file: str) -> Memory:
    replay = None
    try:
        if "replay_columns" in arrays:
            columns, values, tokens, gates = (arrays[name] for name in _REPLAY)
            replay = Replay(columns=columns, values=values, tokens=tokens, gates=gates)
        return Memory(
            key=header.key,
            memory_version=header.memory_version,
            epoch=header.epoch,
            last_chunk_id=header.last_chunk_id,
            tokens_seen=header.tokens_seen,
            base=header.base,
            rule=header.rule,
            theta_shape=header.theta_shape,
            written_layers=header.written_layers,
            created_at=header.created_at,
            nonzero_idx=index,
            theta_val=arrays["theta_val"],
            momentum=arrays["momentum"],
            replay=replay,
            tail=arrays.get("tail", no_tokens()),
            seen=arrays.get("seen", no_hashes()),
            stats=header.stats,
        )
    except ValueError as error:
        raise ShapeMismatch(file, "arrays fit each other", "lengths of version 1", str(error)) from None
