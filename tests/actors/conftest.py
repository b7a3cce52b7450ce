"""A keeper's options over a tiny random model, for the tests of a whole shard without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.options import KeeperOptions
from tests.storage.conftest import redis_url, s3_server, s3_url, shared_redis
from tests.tiny_model import tiny_folder

__all__ = ["redis_url", "s3_server", "s3_url", "shared_redis"]
"""The servers of the storage room's tests, for what must hold on each kind of store."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def options(tmp_path, model) -> KeeperOptions:
    return KeeperOptions(
        model=str(model), store_url=f"file://{tmp_path}/store", journal_dir=f"{tmp_path}/journal", shard="shard-0",
        epoch=1, slots=2, spec_overrides={"surprise_threshold": 0.05}, idle_flush_s=3600.0,
    )  # fmt: skip
