"""A model on disk: Hugging Face's layout (`config.json`, weights, tokenizer files), read and written.

`titanmem.checkpoint` says which files there are, `titanmem.huggingface` what other makers call what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.errors import shorten
from titanmem.checkpoint import (
    CONFIG,
    INDEX,
    MEMORY_CONFIG,
    MEMORY_WEIGHTS,
    WEIGHTS,
    MemoryConfig,
    base_hash,
    decoder_hash,
    weight_map,
)
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.huggingface import file_name, own_name
from titanmem.spec import MemorySpec
from titanmem.token_memory import SparseMemory
from titanmem.tokenizer import write_chat_files

__all__ = ["base_hash", "check_folder", "load_base", "load_decoder", "save_decoder", "save_memory"]

DTYPES = ("F16", "BF16", "F32", "F64")
"""What weights may be stored as; all are float32 once loaded."""
MEMORY_PREFIX = "memory."


def save_decoder(decoder: Decoder, folder: Path, tokenizer_json: str) -> None:
    """Write a model folder that `load_decoder` and the server read; weights are float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in decoder.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library makes it readable to its owner only
    documents = {
        CONFIG: decoder.config.to_dict(),
        "generation_config.json": {"eos_token_id": 0, "temperature": 0.0, "do_sample": False},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    write_chat_files(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")


def save_memory(memory: SparseMemory, memory_layer: int, folder: Path) -> None:
    """Put a trained memory beside the checkpoint of another maker, for `load_decoder` and the server.

    float32, so that what serves is what was trained. Raises ModelFolderError for a folder that it does not fit.
    """
    config = _without_memory(folder)
    try:
        config.with_memory(memory.spec, memory_layer)
    except ValueError as error:
        raise ModelFolderError(f"{folder}: this memory does not fit: {error}") from error
    width = memory.key_proj.weight.shape[1]
    if width != config.hidden_size:
        raise ModelFolderError(f"{folder}: a memory of width {width}, config.json says {config.hidden_size}")
    tensors = {
        MEMORY_PREFIX + name: value.detach().float().cpu().contiguous()
        for name, value in memory.state_dict().items()
    }
    temporary = folder / f".{MEMORY_WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / MEMORY_WEIGHTS)
    MemoryConfig(base=decoder_hash(folder), memory_layer=memory_layer, memory=memory.spec).save(folder)


def load_base(folder: Path, spec: MemorySpec, memory_layer: int) -> Decoder:
    """The decoder of another maker's checkpoint with a memory at its start values, for training; float32.

    What memory lies in the folder is not looked at. Raises ModelFolderError as `load_decoder`.
    """
    try:
        config = _without_memory(folder).with_memory(spec, memory_layer)
    except ValueError as error:
        raise ModelFolderError(f"{folder}: this memory does not fit: {error}") from error
    decoder = _filled(config, _decoder_places(folder), fresh=True)
    decoder.memory = SparseMemory(config.hidden_size, config.vocab_size, config.memory)
    return decoder


def load_decoder(folder: Path, config: DecoderConfig | None = None) -> Decoder:
    """The decoder of a model folder, float32, ready to serve; `config` is the folder's with an operator's knobs.

    Raises ModelFolderError naming the file and what is missing, foreign or of another shape.
    """
    config = config or DecoderConfig.load(folder)
    return _filled(config, _all_places(folder)).eval().requires_grad_(False)


def check_folder(folder: Path) -> int:
    """Number of tensors, after all that `load_decoder` checks without reading weights: files, names, shapes, base."""
    places = _all_places(folder)
    _checked(_shapes(DecoderConfig.load(folder)), places)
    return len(places)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a tensor lies."""

    path: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: str


def _without_memory(folder: Path) -> DecoderConfig:
    """Config of another maker's checkpoint, whatever memory lies beside it."""
    config = DecoderConfig.load_alone(folder)
    if config.remembers:
        raise ModelFolderError(f"{folder / CONFIG}: a checkpoint of ours has its memory among its weights")
    return config


def _shapes(config: DecoderConfig) -> Decoder:
    """A decoder of shapes only: no memory is taken, and no start value drawn for weights that a file has."""
    with torch.device("meta"):
        return Decoder(config)


def _all_places(folder: Path) -> dict[str, _Place]:
    """Our name of each tensor of a folder → where it lies, those of a memory beside it too. Checks whose that is."""
    places = _decoder_places(folder)
    found = MemoryConfig.load(folder)
    if found is None:
        return places
    base = decoder_hash(folder)
    if found.base != base:
        raise ModelFolderError(
            f"{folder / MEMORY_CONFIG}: a memory for base {shorten(found.base, 40)}, and this checkpoint is {base}; "
            "train one for it (titanmem train --model)"
        )
    return {**places, **{place.name: place for place in _listed(folder / MEMORY_WEIGHTS)}}


def _decoder_places(folder: Path) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for file, tensors in weight_map(folder).items():
        listed = {place.name: place for place in _listed(folder / file)}
        if tensors is not None and (missing := sorted(set(tensors) - listed.keys())):
            raise ModelFolderError(f"{folder / file}: missing tensors {missing[:4]}, which {INDEX} names")
        places |= {own: place for name, place in listed.items() if (own := own_name(name)) is not None}
    return places


def _listed(path: Path) -> Iterator[_Place]:
    """The tensors of a file, by its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it has keys() and is no mapping
                part = file.get_slice(name)
                yield _Place(path=path, name=name, shape=tuple(part.get_shape()), dtype=part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: not a safetensors file ({error})") from error


def _checked(decoder: Decoder, places: dict[str, _Place], *, fresh: bool = False) -> dict[str, _Place]:
    """The places of all that the decoder needs, but for its memory if that is `fresh`."""
    config = decoder.config
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if fresh:
        expected = {name: shape for name, shape in expected.items() if not name.startswith(MEMORY_PREFIX)}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        places = {name: place for name, place in places.items() if name != "lm_head.weight"}
    missing, foreign = sorted(expected.keys() - places.keys()), places.keys() - expected.keys()
    if missing or foreign:
        prefixed = any(place.name.startswith("model.") for place in places.values())
        lacking = [
            file_name(name) if prefixed and not name.startswith(MEMORY_PREFIX) else name for name in missing
        ]
        raise ModelFolderError(
            f"{_where(places, missing, foreign)}: missing tensors {lacking[:4]}, "
            f"foreign tensors {sorted(places[name].name for name in foreign)[:4]}"
        )
    for name, shape in expected.items():
        place = places[name]
        if place.shape != shape:
            source = MEMORY_CONFIG if place.path.name == MEMORY_WEIGHTS else CONFIG
            raise ModelFolderError(
                f"{place.path}: {place.name} has shape {list(place.shape)}, {source} asks for {list(shape)}"
            )
        if place.dtype not in DTYPES:
            raise ModelFolderError(
                f"{place.path}: {place.name} is {place.dtype}: this release reads {DTYPES}"
            )
    return {name: places[name] for name in expected}


def _where(places: dict[str, _Place], missing: Collection[str], foreign: Collection[str]) -> Path:
    """The file that lacks tensors or has too many; the index where that may be any shard."""
    weights = {place.path for place in places.values()}
    memory = {path for path in weights if path.name == MEMORY_WEIGHTS}
    only_memory = memory and all(name.startswith(MEMORY_PREFIX) for name in (*missing, *foreign))
    paths = memory if only_memory else {places[name].path for name in foreign} or weights - memory
    return paths.pop() if len(paths) == 1 else paths.pop().parent / INDEX


def _filled(config: DecoderConfig, places: dict[str, _Place], *, fresh: bool = False) -> Decoder:
    """A decoder with its weights, float32; a `fresh` memory is left without any."""
    decoder = _shapes(config)
    files: dict[Path, dict[str, _Place]] = {}
    for own, place in _checked(decoder, places, fresh=fresh).items():
        files.setdefault(place.path, {})[own] = place
    tensors: dict[str, Tensor] = {}
    for path, inside in files.items():
        with safe_open(path, framework="pt") as file:
            for own, place in inside.items():
                tensors[own] = file.get_tensor(place.name).float()
                if not bool(torch.isfinite(tensors[own]).all()):
                    raise ModelFolderError(f"{path}: {place.name} holds a value that is not finite")
    decoder.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder
