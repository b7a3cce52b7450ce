"""`titanmem snapshot` on real folders: no server, no network."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cluster import cli
from storage import snapshot
from storage.names import UserKey
from storage.objects import open_objects
from storage.store import open_store
from storage.titanmem import Memory, encode

APP = cli.build_app()
IDS = ("20260101T120000Z-aaaaaa", "20260102T120000Z-bbbbbb", "20260103T120000Z-cccccc")
ALICE, BOB, EVE = UserKey("local", "alice"), UserKey("local", "bob"), UserKey("acme", "eve")


def memory(key: UserKey, version: int) -> Memory:
    """A memory of six parameters, two of them written."""
    return Memory(
        key=key,
        memory_version=version,
        epoch=1,
        last_chunk_id=version,
        tokens_seen=100 * version,
        base="0" * 32,
        rule="sparse",
        theta_shape=((2, 3),),
        written_layers=(0,),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        nonzero_idx=np.array([1, 4], np.int64),
        theta_val=np.array([0.5, version], np.float16),
        momentum=np.zeros(1, np.float16),
        replay=None,
        tail=np.zeros(0, np.int32),
        seen=np.zeros(0, np.uint64),
        stats={},
    )


def back_up(target: str, at: int, keys: Sequence[UserKey], model: Path | None = None) -> str:
    """Snapshot number `at`: every user at version `at` + 1."""
    objects = open_objects(target)
    files = [encode(memory(key, at + 1)) for key in keys]
    part = snapshot.write_part(
        objects, IDS[at], shard="shard-0", epoch=1, model_dir=model, memories=iter(files)
    )
    made = datetime(2026, 1, at + 1, 12, tzinfo=UTC)
    return snapshot.commit_manifest(objects, IDS[at], [part], created_at=made, base="0" * 32).id


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where snapshots 0 and 1 are, and what the environment names as the default."""
    for name in [name for name in os.environ if name.startswith("TITANMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/backups"
    monkeypatch.setenv("TITANMEM_SNAPSHOTS", url)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for at in (0, 1):
        back_up(url, at, (ALICE, BOB, EVE), model)
    return url


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def run(*args: str) -> Result:
    before = signal.getsignal(signal.SIGINT)
    try:
        env = {"COLUMNS": "200", "NO_COLOR": "1"}
        return CliRunner().invoke(APP, ["snapshot", *args], env=env)
    finally:
        signal.signal(signal.SIGINT, before)


def document(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def damage(target: str, which: int) -> None:
    part = Path(target.removeprefix("file://")) / IDS[which] / "part-shard-0-e00000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 0xFF
    part.write_bytes(data)


def stored(store: str, key: UserKey) -> list[int]:
    return [info.version for info in open_store(store).versions(key)]


def test_a_list_is_newest_first(target: str, tmp_path: Path) -> None:
    listed = document("list")
    assert listed["target"] == target
    assert [row["id"] for row in listed["snapshots"]] == [IDS[1], IDS[0]]
    assert listed["snapshots"][0]["users"] == 3
    table = run("list").stdout
    assert table.index(IDS[1]) < table.index(IDS[0])
    nothing = run("list", "--target", f"file://{tmp_path}/none")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no snapshot at" in nothing.stderr


def test_a_whole_snapshot_verifies_and_a_damaged_one_does_not(target: str) -> None:
    assert document("verify", IDS[0])["ok"] is True
    assert "whole" in run("verify", IDS[0]).stdout
    damage(target, 0)
    result = run("verify", IDS[0], "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr.startswith(f"{IDS[0]} is damaged: ")
    assert result.stderr.count("\n") == 1
    assert document("verify", IDS[1])["ok"] is True


@pytest.mark.parametrize("name", ["20990101T000000Z-zzzzzz", "../../etc/passwd"])
def test_a_snapshot_that_is_none_costs_nothing(target: str, store: str, name: str, tmp_path: Path) -> None:
    for args in (["verify", name], ["restore", name, "--store", store]):
        result = run(*args)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "store" / "cluster").exists(), "no epoch was taken"


def test_a_restore_brings_everybody_and_the_model_back(target: str, store: str, tmp_path: Path) -> None:
    report = document("restore", IDS[1], "--store", store, "--model", "model-again")
    assert (report["ok"], report["restored"]) == (True, 3)
    assert {key: stored(store, key) for key in (ALICE, BOB, EVE)} == {ALICE: [2], BOB: [2], EVE: [2]}
    assert (tmp_path / "model-again" / "config.json").read_text() == "{}"
    assert open_store(store).get(ALICE).theta_val.tolist() == [0.5, 2.0]


def test_a_store_with_users_is_refused_without_force(target: str, store: str) -> None:
    document("restore", IDS[0], "--store", store)
    refused = run("restore", IDS[1], "--store", store)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert stored(store, ALICE) == [1]
    document("restore", IDS[1], "--store", store, "--force")
    assert stored(store, ALICE) == [2, 1]


def test_one_user_and_one_tenant(target: str, store: str) -> None:
    document("restore", IDS[0], "--store", store, "--user", "alice")
    assert {key: stored(store, key) for key in (ALICE, BOB, EVE)} == {ALICE: [1], BOB: [], EVE: []}
    document("restore", IDS[0], "--store", store, "--user", "bob")
    again = run("restore", IDS[1], "--store", store, "--user", "bob")
    assert again.exit_code == 1
    assert "local/bob" in again.stderr
    assert document("restore", IDS[1], "--store", store, "--tenant", "acme")["restored"] == 1
    assert stored(store, EVE) == [2]
    stranger = run("restore", IDS[1], "--store", store, "--user", "zoe")
    assert stranger.exit_code == 1
    assert "zoe" in stranger.stderr


@pytest.mark.parametrize(
    ("at", "version"),
    [
        ("2026-01-02T11:59:59", 1),
        ("2026-01-02T12:00:00Z", 2),
        ("2026-01-02T12:30:00+01:00", 1),
        ("2026-06-01", 2),
    ],
)
def test_a_point_in_time(target: str, store: str, at: str, version: int) -> None:
    document("restore", "--at", at, "--store", store)
    assert stored(store, ALICE) == [version]


def test_a_time_before_all_snapshots(target: str, store: str) -> None:
    result = run("restore", "--at", "2025-01-01", "--store", store)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_damaged_part_is_said_and_fails(target: str, store: str) -> None:
    damage(target, 1)
    result = run("restore", IDS[1], "--store", store, "--json")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_pruning_says_what_went(target: str) -> None:
    assert document("prune", "--daily", "1", "--weekly", "0", "--monthly", "0")["removed"] == [IDS[0]]
    assert [row["id"] for row in document("list")["snapshots"]] == [IDS[1]]
    assert run("prune").stderr == "nothing to prune\n"
    back_up(target, 2, (ALICE,))
    assert run("prune", "--daily", "1", "--weekly", "0", "--monthly", "0").stdout == f"{IDS[1]}\n"


def test_ctrl_c_in_a_restore_says_how_to_go_on(
    target: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "restore", interrupted)
    result = run("restore", IDS[1], "--store", store)
    assert result.exit_code == 130
    assert "--force brings the rest" in result.stderr
    assert result.stderr.count("\n") == 1
