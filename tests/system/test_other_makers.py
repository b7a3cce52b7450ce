"""A checkpoint of another maker: served as it is, then given a memory by one command, and served with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.foreign_model import foreign_folder
from tests.system.server import Server, run
from tests.tiny_model import TEXT
from titanmem.corpus import read_text

BOOK = Path(__file__).parents[2] / "examples" / "decline-and-fall.txt.xz"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600, method="signal")]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return foreign_folder(tmp_path / "small-llama", TEXT, vocab_size=400, width=64, layers=2)


@pytest.fixture
def server(tmp_path: Path, checkpoint: Path) -> Iterator[Server]:
    server = Server(tmp_path, TITANMEM_MODEL=str(checkpoint))
    yield server
    server.close()


def chat(server: Server, text: str) -> dict:
    asked = {
        "model": "small-llama",
        "user": "u1",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": text}],
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ingest(server: Server) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/memories/u1/ingest", json={"text": " ".join(TEXT)}, timeout=120)


def test_a_checkpoint_is_served_without_a_memory_and_then_with_one(
    tmp_path: Path, checkpoint: Path, server: Server
) -> None:
    server.start()
    assert "titanmem train --model" in server.said(), "the start says which command adds a memory"
    assert chat(server, "Hello.")["titan"]["memory"] == "off"
    unwritten = ingest(server)
    assert (unwritten.status_code, unwritten.json()["error"]["code"]) == (409, "no_memory_weights")
    assert server.stop() == 0

    train = ["train", "--model", str(checkpoint), *["--minutes", "0.02", "--skim-steps", "2", "--data"]]
    book = tmp_path / "book.txt"
    book.write_text("\n".join(TEXT))
    refused = run(*train, str(book))
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("train.data: too little text")
    book.write_text(read_text(BOOK)[:600_000])
    trained = run(*train, str(book))
    assert trained.code == 0, trained.err

    server.start()
    assert "titanmem train --model" not in server.said()
    assert chat(server, "My dog's name is Rex7.")["titan"]["memory"] == "read_write"
    told = ingest(server)
    assert told.status_code == 200, told.text
    assert told.json()["tokens"] > 100
    assert server.stop() == 0
