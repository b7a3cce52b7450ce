"""The files of a model folder: which they are, whether they are there, and their hash. No torch here.

A checkpoint holds its weights in `model.safetensors`, or in shards that `model.safetensors.index.json` names. The
memory of a checkpoint of another maker lies beside them:

| file | what it holds |
| --- | --- |
| `memory.safetensors` | the tensors of `SparseMemory`, float32, each named `memory.…` |
| `titanmem.json` | `format` (1), `base` (`decoder_hash`), `memory_layer`, `memory` (the `MemorySpec`) |

A checkpoint of our own has its memory among its weights, and neither of these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import shorten
from titanmem.errors import ModelFolderError
from titanmem.spec import MemorySpec

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MEMORY_WEIGHTS = "memory.safetensors"
MEMORY_CONFIG = "titanmem.json"
MEMORY_FORMAT = 1


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ModelFolderError naming folder and file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path.parent}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: not JSON: {shorten(str(error))}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: must hold one JSON object")
    return value


def weight_map(folder: Path) -> dict[str, tuple[str, ...] | None]:
    """File → the tensors that the index says it holds; None for a single file, which says so itself.

    Raises ModelFolderError for a file that is missing.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        other = next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), None)
        hint = f" ({other} is there: save it again with safe_serialization)" if other else ""
        raise ModelFolderError(f"{folder}: {WEIGHTS} is missing, and so is {INDEX}{hint}")
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelFolderError(f"{folder / INDEX}: weight_map must name a file for each tensor")
    files: dict[str, list[str]] = {}
    for tensor, file in named.items():
        files.setdefault(file, []).append(tensor)
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelFolderError(
                f"{folder / INDEX}: {shorten(file)!r} is no .safetensors file of the folder"
            )
        if not (folder / file).is_file():
            raise ModelFolderError(f"{folder}: {file} is missing, which {INDEX} names")
    return {file: tuple(tensors) for file, tensors in sorted(files.items())}


def decoder_hash(folder: Path) -> str:
    """Name of θ_F alone, 32 hexadecimal digits: config and weights, whatever memory lies beside them."""
    return _hash(folder, _decoder_files(folder))


def base_hash(folder: Path) -> str:
    """Name of θ_F and θ_M₀ together: a user's memory belongs to one base and is refused by any other."""
    own = (MEMORY_CONFIG, MEMORY_WEIGHTS) if (folder / MEMORY_CONFIG).is_file() else ()
    return _hash(folder, (*_decoder_files(folder), *own))


def _decoder_files(folder: Path) -> tuple[str, ...]:
    weights = weight_map(folder)
    return (CONFIG, *weights) if WEIGHTS in weights else (CONFIG, INDEX, *weights)


def _hash(folder: Path, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelFolderError(f"{folder}: {name} is missing")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """`titanmem.json`: the memory that somebody has trained for a checkpoint of another maker."""

    base: str
    """`decoder_hash` of the checkpoint that it was trained for."""
    memory_layer: int
    """First layer that sees it."""
    memory: MemorySpec

    def save(self, folder: Path) -> None:
        """Write the file; a reader sees the old one or the new one."""
        document = {
            "format": MEMORY_FORMAT,
            "base": self.base,
            "memory_layer": self.memory_layer,
            "memory": self.memory.to_dict(),
        }
        temporary = folder / f".{MEMORY_CONFIG}.tmp"
        temporary.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        temporary.replace(folder / MEMORY_CONFIG)

    @classmethod
    def load(cls, folder: Path) -> MemoryConfig | None:
        """The file's values, None where the folder has no memory. Raises ModelFolderError naming file and field."""
        path = folder / MEMORY_CONFIG
        there = [name for name in (MEMORY_CONFIG, MEMORY_WEIGHTS) if (folder / name).is_file()]
        if not there:
            return None
        if len(there) == 1:
            missing = MEMORY_WEIGHTS if there == [MEMORY_CONFIG] else MEMORY_CONFIG
            raise ModelFolderError(f"{folder}: {missing} is missing, which belongs to {there[0]}")
        values = read_json(path)
        if values.get("format") != MEMORY_FORMAT:
            raise ModelFolderError(
                f"{path}: format = {values.get('format')!r}: this release reads {MEMORY_FORMAT}"
            )
        if not isinstance(values.get("base"), str) or type(values.get("memory_layer")) is not int:
            raise ModelFolderError(f"{path}: base must be a hash, and memory_layer a number")
        try:
            memory = MemorySpec().overridden(values.get("memory", {}))
        except (ValueError, TypeError) as error:
            raise ModelFolderError(f"{path}: {error}") from error
        return cls(base=values["base"], memory_layer=values["memory_layer"], memory=memory)
