"""The JSON header of a `.titanmem` file: written from a memory, read with every field checked."""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storage.errors import (
    BadMemoryFile,
    ChecksumMismatch,
    InvalidName,
    NotATitanmem,
    ShapeMismatch,
    TooLarge,
    UnsupportedVersion,
    shorten,
)
from storage.names import UserKey
from storage.npy import IDX_BYTES_MAX, IDX_CODING

FORMAT_VERSION = 1
HEADER_BYTES_MAX = 64 * 1024
LAYERS_MAX = 64
DIMENSIONS_MAX = 4
ELEMENTS_MAX = 1 << 26
MEMORY_VERSION_MAX = 10**12 - 1
EPOCH_MAX = 10**8 - 1
COUNT_MAX = 2**53 - 1
STATS_MAX = 64
TEXT_CHARS_MAX = 128

assert ELEMENTS_MAX < 1 << (7 * IDX_BYTES_MAX), "every distance of two positions fits the coding"
assert COUNT_MAX < 2**53, "JSON readers that keep numbers as doubles read every count exactly"

_SELF = re.compile(rb',"header_checksum":"crc32:([0-9a-f]{8})"\}')


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says about itself, already checked; see STORAGE.md for the meaning of each field."""

    key: UserKey
    memory_version: int
    epoch: int
    last_chunk_id: int
    tokens_seen: int
    base: str
    rule: str
    theta_shape: tuple[tuple[int, ...], ...]
    written_layers: tuple[int, ...]
    created_at: datetime
    nonzero: int
    """Number of positions where θ_M differs from θ_M₀."""
    stats: dict[str, float]
    checksum: str

    @property
    def elements(self) -> int:
        return elements_of(self.theta_shape)


def elements_of(theta_shape: tuple[tuple[int, ...], ...]) -> int:
    """Number of elements of all layers together."""
    return sum(math.prod(shape) for shape in theta_shape)


def crc_text(crc: int) -> str:
    return f"crc32:{crc:08x}"


def write_time(moment: datetime) -> str:
    """ISO 8601 in UTC with microseconds; `moment` must know its zone."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def write_header(fields: Header) -> bytes:
    """The header's JSON; its last field is a CRC32 over all bytes before that field."""
    plain: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "theta_shape": [[int(size) for size in shape] for shape in fields.theta_shape],
        "written_layers": [int(layer) for layer in fields.written_layers],
        "dtype": "float16",
        "last_chunk_id": int(fields.last_chunk_id),
        "checksum": fields.checksum,
        "base": fields.base,
        "rule": fields.rule,
        "tenant": fields.key.tenant,
        "user": fields.key.user,
        "memory_version": int(fields.memory_version),
        "epoch": int(fields.epoch),
        "created_at": write_time(fields.created_at),
        "tokens_seen": int(fields.tokens_seen),
        "nonzero": fields.nonzero,
        "idx_coding": IDX_CODING,
        "stats": {name: float(value) for name, value in sorted(fields.stats.items())},
    }
    body = json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + b',"header_checksum":"%s"}' % crc_text(zlib.crc32(body)).encode()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands there twice")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _parse_json(raw: bytes, file: str) -> dict[str, Any]:
    rule = "the header is JSON"
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise NotATitanmem(file, rule, "one JSON object in UTF-8", shorten(str(error))) from None
    if not isinstance(fields, dict):
        raise NotATitanmem(file, rule, "one JSON object", type(fields).__name__)
    return fields


class _Fields:
    """Typed, bounded access to the fields of a header; each error names the field."""

    def __init__(self, fields: dict[str, Any], file: str) -> None:
        self.fields, self.file = fields, file

    def fail(self, name: str, expected: object, error: type[BadMemoryFile] = NotATitanmem) -> BadMemoryFile:
        return error(self.file, f"header field {name}", expected, self.fields.get(name, "nothing"))

    def count(self, name: str, largest: int = COUNT_MAX) -> int:
        value = self.fields.get(name)
        if type(value) is not int or not 0 <= value <= largest:
            raise self.fail(name, f"a whole number from 0 to {largest}")
        return value

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= TEXT_CHARS_MAX:
            raise self.fail(name, f"text of 1 to {TEXT_CHARS_MAX} characters")
        return value

    def time(self, name: str) -> datetime:
        try:
            moment = datetime.fromisoformat(self.text(name))
        except ValueError:
            raise self.fail(name, "a time in ISO 8601") from None
        if moment.tzinfo is None:
            raise self.fail(name, "a time with its zone")
        return moment.astimezone(UTC)

    def key(self) -> UserKey:
        try:
            return UserKey(self.text("tenant"), self.text("user"))
        except InvalidName as error:
            raise NotATitanmem(
                self.file, "header fields tenant and user", "valid names", str(error)
            ) from None

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes = self.fields.get("theta_shape")
        expected = f"1 to {LAYERS_MAX} lists of 1 to {DIMENSIONS_MAX} sizes of 1 or more"
        if not isinstance(shapes, list) or not 0 < len(shapes) <= LAYERS_MAX:
            raise self.fail("theta_shape", expected, ShapeMismatch)
        for shape in shapes:
            fine = isinstance(shape, list) and 0 < len(shape) <= DIMENSIONS_MAX
            if not fine or not all(type(size) is int and size > 0 for size in shape):
                raise self.fail("theta_shape", expected, ShapeMismatch)
        result = tuple(tuple(shape) for shape in shapes)
        if elements_of(result) > ELEMENTS_MAX:
            raise self.fail("theta_shape", f"at most {ELEMENTS_MAX} elements", TooLarge)
        return result

    def layers(self) -> tuple[int, ...]:
        layers = self.fields.get("written_layers")
        if not isinstance(layers, list) or len(layers) > LAYERS_MAX:
            raise self.fail("written_layers", f"at most {LAYERS_MAX} layer numbers", ShapeMismatch)
        if not all(type(n) is int and n >= 0 for n in layers):
            raise self.fail("written_layers", "layer numbers from 0 on", ShapeMismatch)
        if any(a >= b for a, b in itertools.pairwise(layers)):
            raise self.fail("written_layers", "rising layer numbers", ShapeMismatch)
        return tuple(layers)

    def stats(self) -> dict[str, float]:
        stats = self.fields.get("stats")
        if not isinstance(stats, dict) or len(stats) > STATS_MAX:
            raise self.fail("stats", f"at most {STATS_MAX} numbers with names")
        for name, value in stats.items():
            if type(value) not in (int, float) or not abs(value) < math.inf or len(name) > TEXT_CHARS_MAX:
                raise self.fail("stats", "finite numbers with short names")
        return {name: float(value) for name, value in stats.items()}


def parse_header(raw: bytes, file: str) -> Header:
    """The header of a file, every field checked; its version first, since of later ones no more is known."""
    plain = _parse_json(raw, file)
    fields = _Fields(plain, file)
    if "version" not in plain or type(plain["version"]) is not int:
        raise fields.fail("version", "a whole number")
    if plain["version"] != FORMAT_VERSION:
        raise fields.fail("version", FORMAT_VERSION, UnsupportedVersion)
    found = _SELF.search(raw)
    crc = crc_text(zlib.crc32(raw[: found.start()])) if found else ""
    if found is None or found.end() != len(raw) or f"crc32:{found.group(1).decode()}" != crc:
        stated = plain.get("header_checksum", "nothing")
        raise ChecksumMismatch(file, "header field header_checksum, the last one", crc or "crc32:…", stated)
    for name, known in (("dtype", "float16"), ("idx_coding", IDX_CODING)):
        if plain.get(name) != known:
            raise fields.fail(name, known, UnsupportedVersion)
    return Header(
        key=fields.key(),
        memory_version=fields.count("memory_version", MEMORY_VERSION_MAX),
        epoch=fields.count("epoch", EPOCH_MAX),
        last_chunk_id=fields.count("last_chunk_id"),
        tokens_seen=fields.count("tokens_seen"),
        base=fields.text("base"),
        rule=fields.text("rule"),
        theta_shape=fields.shapes(),
        written_layers=fields.layers(),
        created_at=fields.time("created_at"),
        nonzero=fields.count("nonzero", ELEMENTS_MAX),
        stats=fields.stats(),
        checksum=fields.text("checksum"),
    )
