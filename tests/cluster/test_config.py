"""The configuration: layers, types, ranges, and messages that name the field."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from pathlib import Path

import pytest

from cluster import config as module
from cluster.config import Config, from_mapping, laptop, load, one_h100


def test_every_field_has_a_docstring() -> None:
    source = inspect.getsource(Config)
    lines = [line.strip() for line in source.splitlines()]
    for field in dataclasses.fields(Config):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        assert lines[at + 1].startswith('"""'), field.name


def test_layers_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "titanmem.toml"
    file.write_text(
        "port = 8001\nshards = 2\nslots = 7\n"
        '[spec]\nsurprise_threshold = 0.2\n[api_keys]\nacme = "key-of-acme"\n'
    )
    env = {"TITANMEM_SHARDS": "3", "TITANMEM_SLOTS": "8", "TITANMEM_SPEC_TOP_K_RATIO": "0.03", "PATH": "/bin"}
    config = load(file, env=env, flags={"slots": 9, "port": None})
    assert (config.port, config.shards, config.slots) == (8001, 3, 9)
    assert config.spec == {"surprise_threshold": 0.2, "top_k_ratio": 0.03}
    assert config.api_keys == {"acme": "key-of-acme"}


def test_defaults_serve_the_shipped_model_from_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(env={})
    assert config.store == f"file://{tmp_path}/var/store"
    assert config.snapshots == f"file://{tmp_path}/var/snapshots"
    assert config.journal_dir == f"{tmp_path}/var/journal"
    assert config.model_folder.parts[-2:] == ("titanmem", "default_model")
    assert config == laptop()


def test_survives_pickle_and_json() -> None:
    config = one_h100(
        store="s3://bucket/p?endpoint=http://127.0.0.1:9", api_keys={"acme": "key-of-acme"}, seed=5
    )
    assert pickle.loads(pickle.dumps(config)) == config
    assert from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_keys_are_never_shown() -> None:
    config = laptop(api_keys={"acme": "very-secret-key"}, admin_key="other-secret")
    assert "secret" not in repr(config)
    with pytest.raises(ValueError, match="tenant acme") as caught:
        laptop(api_keys={"acme": "has space in it"})
    assert "has space" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("port", 0, "port: 0 is outside 1 to 65535"),
        ("port", "http", "port: 'http' is not a whole number"),
        ("port", True, "port: True is not a number"),
        ("port", 80.5, "port: 80.5 is not a whole number"),
        ("shards", 0, "shards: 0 is outside 1 to 1024"),
        ("request_timeout_s", float("nan"), "request_timeout_s: nan is not a number"),
        ("idle_flush_s", -1, "idle_flush_s: -1.0 is outside"),
        ("consolidate_after_s", -1, "consolidate_after_s: -1.0 is outside 0.1 to 86400"),
        ("consolidate_after_s", 0.01, "consolidate_after_s: 0.01 is outside 0.1 to 86400"),
        ("snapshot_interval_s", 5, "snapshot_interval_s: 5.0 is outside 60 to"),
        ("mode", "max", "mode: 'max' is not one of mac"),
        ("rule", "", "rule: '' is not one of sparse"),
        ("durability", "always", "durability: 'always' is not one of local, replicated, sync"),
        ("replicate_interval_s", 0, "replicate_interval_s: 0.0 is outside 0.1 to 3600"),
        ("sync_timeout_s", 0, "sync_timeout_s: 0.0 is outside 0.1 to 3600"),
        ("unconfirmed_s", -1, "unconfirmed_s: -1.0 is outside 0 to 3600"),
        ("store", "gopher://h:1/0", "store: no store for gopher://; there are file://, s3://"),
        ("store", "file://", "store: file:// names no path"),
        ("host", "0.0.0.0", "host: 0.0.0.0 can be reached from outside"),
        ("host", 5, "host: 5 is not text"),
        ("api_keys", "acme", "api_keys: expected name=value"),
        ("api_keys", {"../x": "key-of-acme"}, "api_keys: tenant"),
        ("api_keys", {"a": "same-key-1", "b": "same-key-1"}, "api_keys: two tenants"),
        ("spec", {"lr": 1}, "spec: lr: the knobs are chunk_size, code_active"),
        ("spec", {"mode": "mac"}, "spec: mode: set mode itself"),
        ("spec", {"chunk_size": "big"}, "spec: chunk_size: 'big' is not a number from 16 to 8192"),
        ("spec", {"chunk_size": 4}, "spec: chunk_size: 4 is not a number from"),
        ("keeper", "nowhere", "keeper: 'nowhere' is not of the form module:function"),
        ("nonsense", 1, "nonsense: no such field; there are admin_key"),
    ],
)
def test_a_wrong_value_names_field_value_and_range(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_mapping({field: value})
    assert str(caught.value).startswith(says)


def test_an_answer_says_why_it_ends_before_its_request_is_over() -> None:
    with pytest.raises(ValueError, match=r"^sync_timeout_s: 10 is not less than request_timeout_s, 5$"):
        from_mapping({"durability": "sync", "request_timeout_s": 5})
    assert from_mapping({"request_timeout_s": 5}).sync_timeout_s == 10, (
        "nothing waits for the store otherwise"
    )


def test_errors_name_where_the_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text("port = 99999")
    with pytest.raises(ValueError, match=rf"^{file}: port: 99999"):
        load(file, env={})
    file.write_text("port = ")
    with pytest.raises(ValueError, match="not valid TOML"):
        load(file, env={})
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load(tmp_path / "none.toml", env={})
    with pytest.raises(ValueError, match=r"^from the environment: shards: 'many'"):
        load(env={"TITANMEM_SHARDS": "many"})


def test_only_the_whole_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('host = "0.0.0.0"')
    assert load(file, env={"TITANMEM_API_KEYS": "acme=key-of-acme"}).host == "0.0.0.0"
    assert load(file, env={"TITANMEM_SHARDS": "0"}, flags={"host": "127.0.0.1", "shards": 2}).shards == 2
    with pytest.raises(ValueError, match=rf"^{file}: host: 0\.0\.0\.0 can be reached"):
        load(file, env={})


def test_outside_addresses_need_keys() -> None:
    assert not laptop(host="0.0.0.0", api_keys={"acme": "key-of-acme"}).loopback
    assert laptop(host="127.0.0.2").loopback


def test_recipes_can_be_overridden() -> None:
    assert one_h100().slots > laptop().slots
    assert one_h100(slots=3).slots == 3


def test_ranges_cover_every_number() -> None:
    ranged = {name for name, _, _ in module._RANGES} | {"snapshot_interval_s", "consolidate_after_s"}
    numbers = {f.name for f in dataclasses.fields(Config) if f.type in ("int", "float")}
    assert ranged == numbers
