"""The model's files in a cold backup: taken apart into tensors, put together again byte for byte."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import SnapshotDamaged, SnapshotError
from storage.objects import check_object_name
from storage.snapshot_part import GROUP_BYTES, PartWriter, Row

PIECE_BYTES = 64 << 20
SAFETENSORS_HEADER_BYTES_MAX = 100 << 20

assert GROUP_BYTES < PIECE_BYTES, "a row group holds many users, or one large piece"


def add_model(writer: PartWriter, folder: Path) -> int:
    """Adds every file under `folder` but hidden ones; the number of files. Raises `SnapshotError`."""
    if not folder.is_dir():
        raise SnapshotError(f"{folder}: there is no such model folder", folder=str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    count = 0
    for path in files:
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        check_object_name(name)
        _add_file(writer, path, name)
        count += 1
    return count


def _add_file(writer: PartWriter, path: Path, name: str) -> None:
    with open(path, "rb") as file:
        whole = {"file": name, "bytes": path.stat().st_size, "sha256": _sha256(file)}
        file.seek(0)
        pieces = _tensor_pieces(file, whole["bytes"]) if path.suffix == ".safetensors" else None
        for start, length, meta in pieces or _plain_pieces(0, whole["bytes"]):
            file.seek(start)
            kind = "tensor" if "tensor" in meta else "file"
            title = f"{name}:{meta['tensor']}" if kind == "tensor" else name
            writer.add_piece(kind, title, {**whole, "offset": start, **meta}, file.read(length))


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _plain_pieces(start: int, end: int) -> list[tuple[int, int, dict[str, Any]]]:
    starts = range(start, end, PIECE_BYTES) if end > start else [start]
    return [(at, min(PIECE_BYTES, end - at), {}) for at in starts]


def _tensor_pieces(file: BinaryIO, size: int) -> list[tuple[int, int, dict[str, Any]]] | None:
    """Offset, length and description of each tensor and of the header; None when the file is not so made."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(SAFETENSORS_HEADER_BYTES_MAX, size - 8):
        return None
    try:
        lines = json.loads(file.read(length))
        tensors = sorted((*line["data_offsets"], n) for n, line in lines.items() if n != "__metadata__")
        position = 8 + length
        pieces = _plain_pieces(0, position)
        for begin, end, name in tensors:
            if 8 + length + begin != position:
                return None
            meta = {"tensor": name, "dtype": lines[name]["dtype"], "shape": lines[name]["shape"]}
            pieces.append((position, end - begin, meta))
            position += end - begin
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return pieces if position == size else None


def assemble(rows: Iterable[Row], problems: list[str] | None, folder: Path | None = None) -> list[str]:
    """Puts the model's files together, into `folder` if given; names of the files that came out whole."""
    whole: list[str] = []
    digest, position, current = hashlib.sha256(), 0, ""
    for row in rows:
        name, offset = str(row.meta.get("file")), row.meta.get("offset")
        if name != current:
            digest, position, current = hashlib.sha256(), 0, name
        if offset != position:
            raise SnapshotDamaged(f"{name}: expected the piece at {position}, found the one at {offset}")
        digest.update(row.data)
        position += len(row.data)
        if folder is not None:
            path = folder / check_object_name(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(row.data)
        if position == row.meta.get("bytes") and name not in whole:
            if digest.hexdigest() == row.meta.get("sha256"):
                whole.append(name)
            elif problems is None:
                raise SnapshotDamaged(f"{name}: its SHA-256 is not the one it had")
            else:
                problems.append(f"{name}: its SHA-256 is not the one it had")
    return whole
