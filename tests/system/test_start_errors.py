"""A server that cannot start says why in one line, ends with 1, and leaves nothing behind."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.config import laptop
from tests.s3_peers import localbucket, s3rver
from tests.servers import S3_ENVIRONMENT, free_port
from tests.system.server import Ended, serve_until_it_fails

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, method="signal")]


def failed(folder: Path, *arguments: str, **env: str) -> str:
    """The one line of a start that fails."""
    ended, left = serve_until_it_fails(folder, ["--store", f"file://{folder}/store", *arguments], env)
    assert left == [], "processes that outlive the command"
    return one_line(ended)


def one_line(ended: Ended) -> str:
    assert ended.code == 1, ended
    assert ended.out == ""
    first, *lines = ended.err.splitlines()
    assert first == "starting …"
    assert len(lines) == 1, ended.err
    return lines[0]


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = failed(tmp_path, "--port", str(port))
    assert f"port {port} of 127.0.0.1" in line
    assert "--port" in line
    assert not (tmp_path / "store").exists(), "nothing was begun"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(laptop().model_folder, folder)
    (folder / name).unlink()
    line = failed(tmp_path, "--model", str(folder), "--port", str(free_port()))
    assert str(folder) in line
    assert name.removeprefix("model") in line


def test_a_store_that_cannot_be_reached(tmp_path: Path) -> None:
    store = f"s3://memories/titanmem?endpoint=http://127.0.0.1:{free_port()}&region=us-east-1"
    line = failed(tmp_path, "--store", store, "--port", str(free_port()), **S3_ENVIRONMENT)
    assert "memories" in line


@pytest.mark.parametrize(("peer", "rule"), [(localbucket, "If-Match"), (s3rver, "If-None-Match")])
def test_a_store_that_ignores_a_condition(tmp_path: Path, peer: Any, rule: str) -> None:
    (tmp_path / "s3").mkdir()
    with peer(tmp_path / "s3") as server:
        server.make_bucket("memories")
        store = server.url("memories", "titanmem")
        line = failed(tmp_path, "--store", store, "--port", str(free_port()), **server.environment)
    assert f"s3://memories/titanmem: this store ignores {rule}, so two shards could write one memory" in line
