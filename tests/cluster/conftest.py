"""A model folder without a model, and real clusters on this machine for the tests that need Ray."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.numpy import save_file

from cluster.config import Config, laptop
from cluster.router import Router
from cluster.serve import Server, Signals, address, prepare_environment
from tests.cluster.fake_backend import tiny_tokenizer
from tests.servers import free_port
from titanmem.decoder_config import DecoderConfig
from titanmem.tokenizer import write_chat_files

ROOT = Path(__file__).resolve().parents[2]
FAKE_KEEPER = "tests.actors.fake_keeper:open_keeper"


def write_model_folder(folder: Path) -> Path:
    """What the door and the checks of a start read of a model, and weights that nobody reads."""
    folder.mkdir(parents=True)
    tiny_tokenizer()._tokenizer.save(str(folder / "tokenizer.json"))
    write_chat_files(folder)
    (folder / "config.json").write_text(json.dumps(DecoderConfig().to_dict()))
    save_file({"w": np.zeros(2, np.float16)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model") / "titanmem-tiny")


def _reap() -> None:
    """Waits for Ray's processes: it ends them, but leaves them to the interpreter, which warns of each."""
    rays = str(Path(ray.__file__).parent)
    processes = [it for it in gc.get_objects() if issubclass(type(it), subprocess.Popen)]
    for process in [it for it in processes if rays in str(it.args)]:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A cluster that serves."""

    config: Config
    said: list[str]

    @property
    def url(self) -> str:
        return address(self.config)

    def router(self, **options: Any) -> Router:
        """A router of the test's own event loop."""
        return Router(self.config.store, **{"request_timeout_s": 60.0, **options})


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def start(model_folder: Path) -> Start:
    """`start(folder, shards=2)`: a cluster whose keepers have no model, on store and journals in `folder`."""

    @contextmanager
    def starting(folder: Path, **settings: Any) -> Iterator[Running]:
        config = laptop(
            port=free_port(),
            model=str(model_folder),
            store=f"file://{folder}/store",
            journal_dir=f"{folder}/journal",
            snapshots=f"file://{folder}/snapshots",
            keeper=FAKE_KEEPER,
            **settings,
        )
        before = dict(os.environ)
        os.environ["PYTHONPATH"] = str(ROOT)
        prepare_environment(config)
        said: list[str] = []
        with Signals() as signals:
            server = Server(config, said.append, signals)
            try:
                server.start()
                yield Running(config=config, said=said)
            finally:
                server.stop()
                _reap()
                os.environ.clear()
                os.environ.update(before)

    return starting
