"""What a start says before anything runs: one line that names the thing and what to do."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, laptop
from cluster.preflight import CannotServe, check, check_port, check_ray_address, machine_gpus, remarks
from cluster.serve import address, welcome
from storage.errors import StoreUnavailable, TitanmemError, WrongStore
from storage.identity import recognise
from storage.store import open_store
from tests.servers import free_port
from titanmem.errors import ModelFolderError


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def config(folder: Path, model: Path, **settings: Any) -> Config:
    places = {"store": f"file://{folder}/store", "journal_dir": f"{folder}/journal"}
    return laptop(**{"port": free_port(), "model": str(model), **places, **settings})


def test_a_fit_machine_passes_and_has_its_folders(tmp_path: Path, model: Path) -> None:
    check(config(tmp_path, model))
    assert (tmp_path / "journal").is_dir()


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_model_folder_that_lacks_a_file(tmp_path: Path, model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(TitanmemError, match="safetensors" if "model" in missing else missing) as caught:
        check(config(tmp_path, model))
    assert str(model) in str(caught.value)


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere"):
        check(config(tmp_path, tmp_path / "nowhere"))


def test_a_model_that_remembers_needs_no_remark(tmp_path: Path, model: Path) -> None:
    assert remarks(config(tmp_path, model)) == []


def test_a_store_on_the_journals_disk_is_remarked_on_when_it_is_to_outlive_the_disk(
    tmp_path: Path, model: Path
) -> None:
    (said,) = remarks(config(tmp_path, model, durability="sync"))
    assert said.startswith(
        f"durability sync with file://{tmp_path}/store: unless other nodes mount that folder"
    )
    assert remarks(config(tmp_path, model, durability="sync", store="s3://bucket/prefix")) == []


def test_a_checkpoint_without_memory_or_template_is_remarked_on(tmp_path: Path, model: Path) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = {"model_type": "llama", "num_attention_heads": 2, **sizes}
    (model / "config.json").write_text(json.dumps(llama))
    (model / "chat_template.jinja").unlink()
    check(config(tmp_path, model))
    memory, template = remarks(config(tmp_path, model))
    assert memory.startswith("memory is off for every request")
    assert f"`titanmem train --model {model}`" in memory
    assert "no chat template" in template
    (model / "model.safetensors").rename(model / "elsewhere")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"model-00001-of-00002\.safetensors is missing"):
        check(config(tmp_path, model))


def test_knobs_that_do_not_go_with_the_model(tmp_path: Path, model: Path) -> None:
    window = json.loads((model / "config.json").read_text())["memory"]["window"]
    with pytest.raises(CannotServe, match="chunk_size"):
        check(config(tmp_path, model, spec={"chunk_size": 2 * window}))


def test_a_store_that_cannot_be_reached(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    url = f"s3://bucket/prefix?endpoint=http://127.0.0.1:{free_port()}&region=us-east-1"
    with pytest.raises(StoreUnavailable):
        check(config(tmp_path, model, store=url))


def test_journals_of_another_store_are_no_start_into_this_one(tmp_path: Path, model: Path) -> None:
    known = config(tmp_path, model)
    recognise(open_store(known.store), Path(known.journal_dir))
    check(known)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(WrongStore, match="Is its disk mounted"):
        check(known)
    assert not (tmp_path / "store").exists(), "not even the probe wrote"
    check(config(tmp_path, model, ray_address="auto"))  # the journals are elsewhere


def test_a_journal_folder_that_is_a_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(CannotServe, match=f"{tmp_path}/journal: File exists"):
        check(config(tmp_path, model))


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CannotServe, match=f"port {port} of 127.0.0.1 cannot be used: .*--port"):
            check_port("127.0.0.1", port, wait_s=0.0)


def test_a_port_that_is_given_back_in_a_moment_is_waited_for() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Timer(0.3, listener.close).start()
    began = time.monotonic()
    check_port("127.0.0.1", listener.getsockname()[1], wait_s=10.0)
    assert 0.2 < time.monotonic() - began < 8


def test_an_address_of_another_machine() -> None:
    with pytest.raises(CannotServe, match=r"203\.0\.113\.7"):
        check_port("203.0.113.7", free_port(), wait_s=0.0)


def test_a_ray_address_where_nobody_listens() -> None:
    with pytest.raises(CannotServe, match="no Ray cluster answers there"):
        check_ray_address(f"127.0.0.1:{free_port()}")
    check_ray_address("auto")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_ray_address(f"127.0.0.1:{listener.getsockname()[1]}")


def test_hidden_gpus_do_not_count() -> None:
    assert machine_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert machine_gpus({}) >= machine_gpus({"CUDA_VISIBLE_DEVICES": "0"})


def test_the_welcome_gives_an_example_that_works() -> None:
    text = welcome(laptop(port=8123, shards=2), 12.3)
    assert "http://127.0.0.1:8123 (2 shards, 12 s)" in text
    assert "http://127.0.0.1:8123/console" in text
    body = text.split("-d '")[1].split("'\n")[0]
    assert json.loads(body)["user"] == "alice"
    keyed = welcome(laptop(host="0.0.0.0", api_keys={"acme": "key-of-acme"}), 1.0)
    assert "Authorization: Bearer KEY" in keyed
    assert "key-of-acme" not in keyed
    assert "http://127.0.0.1:8000" in keyed


def test_addresses() -> None:
    assert address(laptop(host="::1")) == "http://[::1]:8000"
    assert address(laptop(host="localhost")) == "http://localhost:8000"
