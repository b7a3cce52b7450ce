"""One file of a cold backup: Parquet with the model's files and the memories of one shard's users.

Model first, one row a tensor (raw bytes) or a piece of another file, then one row a user with the user's
`.titanmem`. Each row carries a CRC32 of its data. Row groups are small, so that one user is read alone.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SnapshotDamaged
from storage.names import UserKey
from storage.objects import Objects
from storage.titanmem import read_header

PART_VERSION = 1
GROUP_BYTES = 4 << 20
GROUP_ROWS_MAX = 256
ZSTD_LEVEL = 1

SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # tensor, file or user
        pa.field("name", pa.string(), nullable=False),  # file:tensor, file, or tenant/user
        pa.field("meta", pa.string(), nullable=False),  # JSON: of a piece its file, offset, dtype, shape, …
        pa.field("memory_version", pa.int64()),
        pa.field("epoch", pa.int64()),
        pa.field("base", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ],
    metadata={b"titanmem-snapshot": str(PART_VERSION).encode()},
)
_KEYS = ["kind", "name", "memory_version", "epoch", "created_at"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row, its CRC32 already checked."""

    kind: str
    name: str
    meta: dict[str, Any]
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRow:
    """Where a user's memory lies in a part, and at which version."""

    key: UserKey
    memory_version: int
    epoch: int
    created_at: datetime
    group: int
    row: int


class PartWriter:
    """Writes the rows of a part to a local file; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.users = 0
        self.rows = 0
        self.bases: set[str] = set()
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._writer = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=False,
            write_statistics=["kind", "name"],  # type: ignore[arg-type]
            write_page_checksum=True,
        )

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._flush()
        self._writer.close()

    def add_user(self, data: bytes) -> None:
        """One user's `.titanmem`. Raises `BadMemoryFile` when its header or structure is broken."""
        header = read_header(data, name="memory for a snapshot")
        self._add(
            {
                "kind": "user",
                "name": str(header.key),
                "meta": "{}",
                "memory_version": header.memory_version,
                "epoch": header.epoch,
                "base": header.base,
                "created_at": header.created_at,
            },
            data,
        )
        self.users += 1
        self.bases.add(header.base)

    def add_piece(self, kind: str, name: str, meta: dict[str, Any], data: bytes) -> None:
        """A piece of a file of the model."""
        blank = dict.fromkeys(("memory_version", "epoch", "base", "created_at"))
        self._add({"kind": kind, "name": name, "meta": json.dumps(meta), **blank}, data)

    def _add(self, row: dict[str, Any], data: bytes) -> None:
        kinds = {other["kind"] == "user" for other in self._pending}
        if kinds == {row["kind"] != "user"}:
            self._flush()  # users and model never share a group
        self._pending.append({**row, "crc32": zlib.crc32(data), "data": data})
        self._pending_bytes += len(data)
        self.rows += 1
        if self._pending_bytes >= GROUP_BYTES or len(self._pending) >= GROUP_ROWS_MAX:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_pylist(self._pending, schema=SCHEMA)
            self._writer.write_table(table, row_group_size=len(self._pending))
        self._pending, self._pending_bytes = [], 0


class PartReader:
    """Reads a part, row group by row group. Every error of the file is a `SnapshotDamaged` that names it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        with self.reporting():
            self._file = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
            schema = self._file.schema_arrow
        version = (schema.metadata or {}).get(b"titanmem-snapshot")
        if version != str(PART_VERSION).encode() or not schema.equals(SCHEMA):
            found = f"version {version.decode(errors='replace')}" if version else "another Parquet file"
            raise SnapshotDamaged(f"{name}: not a snapshot part of version {PART_VERSION}, but {found}")

    def rows(self) -> Iterator[Row]:
        """All rows, in order; those that are damaged raise."""
        for group in range(self._file.num_row_groups):
            yield from self.load(group).rows()

    def load(self, group: int, bytes_max: int | None = None) -> Group:
        """One row group, in memory; refused before it is read when it says that it unpacks to more."""
        with self.reporting():
            declared = self._file.metadata.row_group(group).total_byte_size
            if bytes_max is not None and declared > bytes_max:
                raise ValueError(f"row group {group}: {declared} bytes: expected at most {bytes_max}")
            return Group(
                self, self._file.read_row_group(group, columns=["kind", "name", "meta", "crc32", "data"])
            )

    def model_rows(self) -> Iterator[Row]:
        """The rows of the model only."""
        for group in range(self._file.num_row_groups):
            with self.reporting():
                kinds = self._file.read_row_group(group, columns=["kind"])[0].to_pylist()
            if any(kind != "user" for kind in kinds):
                yield from (row for row in self.load(group).rows() if row.kind != "user")

    def users(self, key: UserKey | None = None) -> Iterator[UserRow]:
        """Where users' memories lie, all or one user's, without reading them.

        Names are read, not the statistics of row groups: pyarrow 26 ends the process when it takes statistics out of a
        footer that is damaged.
        """
        for group in range(self._file.num_row_groups):
            with self.reporting():
                columns = self._file.read_row_group(group, columns=_KEYS).to_pydict()
                found = [
                    UserRow(
                        key=UserKey.parse(name),
                        memory_version=version,
                        epoch=epoch,
                        created_at=at,
                        group=group,
                        row=n,
                    )
                    for n, (kind, name, version, epoch, at) in enumerate(
                        zip(*(columns[column] for column in _KEYS), strict=True)
                    )
                    if kind == "user" and (key is None or name == str(key))
                ]
            yield from found

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise SnapshotDamaged(f"{self.name}: can not be read: {error}", part=self.name) from error


class Group:
    """The rows of one row group, each checked when it is taken out."""

    def __init__(self, reader: PartReader, table: pa.Table) -> None:
        self._reader, self._table = reader, table

    def rows(self) -> Iterator[Row]:
        return (self.row(number) for number in range(self._table.num_rows))

    def row(self, number: int) -> Row:
        """One row. Raises `SnapshotDamaged` when its CRC32 does not fit."""
        with self._reader.reporting():
            kind, name, meta, crc, data = (column[number].as_py() for column in self._table.itercolumns())
            fields = json.loads(meta)
        if zlib.crc32(data) != crc:
            raise SnapshotDamaged(f"{self._reader.name}: row {name}: its CRC32 is not {crc:08x} any more")
        return Row(kind=kind, name=name, meta=fields, data=data)


@contextlib.contextmanager
def open_part(target: Objects, name: str) -> Iterator[PartReader]:
    """A part, open for reading. Raises `SnapshotDamaged` when it is missing or no part."""
    try:
        raw = target.open_read(name)
    except FileNotFoundError as error:
        raise SnapshotDamaged(f"{name}: this part is missing", part=name) from error
    with raw:
        yield PartReader(raw, name)
