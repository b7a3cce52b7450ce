"""Real servers against the probe of a start: the one that honours all conditions is taken, the others are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import StoreUnfit
from storage.objects import open_objects
from storage.store import open_store
from tests import s3_peers
from tests.s3_peers import localbucket, s3rver
from tests.servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def refusal(server: S3Server) -> StoreUnfit:
    """What a start on that server says; it leaves nothing behind."""
    server.make_bucket("titanmem")
    objects = open_objects(server.url("titanmem", "store"))
    with pytest.raises(StoreUnfit) as caught:
        objects.probe()
    assert list(objects.list()) == []
    return caught.value


def test_ministack_is_taken(s3_url: str) -> None:
    objects = open_objects(s3_url)
    objects.probe()
    assert list(objects.list()) == []
    store = open_store(s3_url)
    assert [store.next_epoch(), store.next_epoch()] == [1, 2]


def test_localbucket_is_refused_since_it_ignores_if_match(tmp_path: Path) -> None:
    with localbucket(tmp_path) as server:
        error = refusal(server)
    assert error.rule == "If-Match"
    assert str(error).startswith(
        "s3://titanmem/store: this store ignores If-Match, so two shards could write"
    )


def test_s3rver_is_refused_since_it_ignores_all_conditions(tmp_path: Path) -> None:
    with s3rver(tmp_path) as server:
        error = refusal(server)
        assert error.rule == "If-None-Match"
        assert str(error).startswith("s3://titanmem/store: this store ignores If-None-Match, so two shards")


def test_an_installation_without_a_network_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_peers, "INSTALLED", tmp_path / "var")
    for name, value in {
        "registry": "http://127.0.0.1:9/",
        "fetch_retries": "0",
        "cache": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"npm_config_{name}", value)
    with pytest.raises(RuntimeError, match=r"could not be installed into .*npm needs its registry"):
        s3_peers.installed()
    assert not list((tmp_path / "var").glob("*/node_modules/s3rver"))
