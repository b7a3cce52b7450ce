"""The application's configuration, as Serve hands it over."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cluster.app import build, config_of

KEYS = {"TITANMEM_API_KEYS": "acme=key-of-acme"}


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "titanmem.toml"
    file.write_text("slots = 5\nshards = 5\nqueue_max = 5\n")
    env = {"TITANMEM_SLOTS": "6", "TITANMEM_SHARDS": "6", **KEYS}
    config = config_of({"config": str(file), "shards": 7}, env)
    assert (config.queue_max, config.slots, config.shards) == (5, 6, 7)


def test_a_door_that_serve_opens_to_others_needs_keys() -> None:
    with pytest.raises(ValueError, match="host: 0\\.0\\.0\\.0 can be reached from outside, so api_keys"):
        config_of({}, {})
    assert config_of({}, KEYS).host == "0.0.0.0"
    assert config_of({"host": "127.0.0.1"}, {}).api_keys == {}


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ValueError, match="shard: no such field"):
        build({"shard": 2, "host": "127.0.0.1"})


def test_the_application_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANMEM_HOST", "127.0.0.1")
    application = build({"ingress_replicas": 3})
    deployment = application._bound_deployment
    assert deployment.name == "door"
    assert deployment.num_replicas == 3
    (config,) = deployment.init_args
    assert pickle.loads(pickle.dumps(config)).ingress_replicas == 3
