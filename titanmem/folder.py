"""A model on disk: Hugging Face's layout (`config.json`, `model.safetensors`, tokenizer files), read and written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.tokenizer import write_chat_files

WEIGHTS = "model.safetensors"


def base_hash(folder: Path) -> str:
    """Name of θ_F and θ_M₀ together: a memory file belongs to one base and is refused by any other."""
    digest = hashlib.sha256()
    for name in ("config.json", WEIGHTS):
        path = folder / name
        if not path.is_file():
            raise ModelFolderError(f"{folder}: {name} is missing")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def save_decoder(decoder: Decoder, folder: Path, tokenizer_json: str) -> None:
    """Write a model folder that `load_decoder` and the server read; weights are float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in decoder.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library makes it readable to its owner only
    documents = {
        "config.json": decoder.config.to_dict(),
        "generation_config.json": {"eos_token_id": 0, "temperature": 0.0, "do_sample": False},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    write_chat_files(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")


def load_decoder(folder: Path, config: DecoderConfig | None = None) -> Decoder:
    """The decoder of a model folder, float32, ready to serve.

    Raises ModelFolderError naming the file and what is missing, foreign or of another shape.
    """
    config = config or DecoderConfig.load(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelFolderError(f"{folder}: {WEIGHTS} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: not a safetensors file ({error})") from error
    decoder = Decoder(config)
    expected = decoder.state_dict()
    missing, foreign = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or foreign:
        raise ModelFolderError(
            f"{path}: missing tensors {sorted(missing)[:4]}, foreign tensors {sorted(foreign)[:4]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelFolderError(
                f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFolderError(f"{path}: {name} holds a value that is not finite")
    decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return decoder.eval().requires_grad_(False)
