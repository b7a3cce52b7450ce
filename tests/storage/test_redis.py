"""Redis as it fails: killed in the middle of writes, answers that get lost, servers that would forget or make room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError, TimeoutError

from storage.attempts import Attempts
from storage.errors import StoreUnavailable, StoreUnfit, VersionConflict
from storage.objects import open_objects
from storage.redis import RedisObjects
from tests.servers import RedisServer, free_port, redis_server

QUICK = Attempts(most=3, budget_s=5.0, sleep=lambda seconds: None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


def test_all_that_was_acknowledged_is_there_after_a_kill_under_load(server: RedisServer) -> None:
    patient = Attempts(most=200, budget_s=60.0)
    writers, kept, stop = 4, [{} for _ in range(4)], threading.Event()

    def write(number: int) -> None:
        objects = RedisObjects("127.0.0.1", server.port, 0, "load", attempts=patient)
        tag, count = objects.put(f"w{number}", b"0", if_absent=True), 0
        while not stop.is_set():
            count += 1
            tag = objects.put(f"w{number}", f"{count}".encode(), if_tag=tag)
            objects.put(f"w{number}/{count}", f"{count}".encode(), if_absent=True)
            kept[number][count] = tag

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        before = sum(map(len, kept))
        while sum(map(len, kept)) < before + 200:
            pass
        server.kill()
        server.start()
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    objects = open_objects(server.url("load"))
    for number in range(writers):
        assert objects.get(f"w{number}") == (f"{max(kept[number])}".encode(), kept[number][max(kept[number])])
        for count in kept[number]:
            assert (objects.get(f"w{number}/{count}") or (b"",))[0] == f"{count}".encode()
    assert len(list(objects.list("w"))) == sum(map(len, kept)) + writers


def lost(
    objects: RedisObjects, monkeypatch: pytest.MonkeyPatch, script: list[str], between: Callable[[], Any]
) -> None:
    """Writes whose answers get lost: "lost" carries them out, "down" does not, "late" after another's."""
    real = objects._client.eval

    def scripted(*arguments: Any) -> Any:
        step = script.pop(0) if script else "fine"
        if step == "down":
            raise ConnectionError("down")
        if step == "late":
            between()
            raise TimeoutError("late")
        answer = real(*arguments)
        if step == "lost":
            raise TimeoutError("lost")
        return answer

    monkeypatch.setattr(objects._client, "eval", scripted)


def test_a_lost_answer_of_our_own_write_is_no_conflict(
    shared_redis: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_objects(redis_url)
    objects = RedisObjects("127.0.0.1", shared_redis.port, 0, redis_url.rpartition("=")[2], attempts=QUICK)
    lost(objects, monkeypatch, ["lost"], lambda: None)
    tag = objects.put("a", b"ours", if_absent=True)
    assert other.get("a") == (b"ours", tag)
    lost(objects, monkeypatch, ["down", "lost"], lambda: None)
    second = objects.put("a", b"next", if_tag=tag)
    assert other.get("a") == (b"next", second)
    lost(objects, monkeypatch, ["late"], lambda: other.put("a", b"theirs"))
    with pytest.raises(VersionConflict):
        objects.put("a", b"third", if_tag=second)
    assert (other.get("a") or (b"",))[0] == b"theirs"
    lost(objects, monkeypatch, ["down"] * 3, lambda: None)
    with pytest.raises(StoreUnavailable, match="is not known") as caught:
        objects.put("a", b"fourth", if_absent=True)
    assert caught.value.ambiguous


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--appendonly", "no"), "appendonly"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync"),
        (
            ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "allkeys-lru"),
            "maxmemory",
        ),
        (("--appendonly", "yes", "--appendfsync", "always", "--replicaof", "127.0.0.1", "1"), "role"),
    ],
)
def test_a_server_that_would_lose_what_it_was_told_is_refused(
    tmp_path: Path, options: tuple[str, ...], rule: str
) -> None:
    with redis_server(tmp_path, *options) as server, pytest.raises(StoreUnfit) as caught:
        open_objects(server.url("x")).probe()
    assert caught.value.rule.startswith(rule)


def test_a_server_that_is_not_there_or_does_not_know_us(tmp_path: Path) -> None:
    nobody = RedisObjects("127.0.0.1", free_port(), 0, attempts=QUICK)
    for ask in (lambda: nobody.get("a"), lambda: list(nobody.list()), nobody.probe):
        with pytest.raises(StoreUnavailable, match="Check that Redis answers"):
            ask()
    options = ("--appendonly", "yes", "--appendfsync", "always", "--requirepass", "a-secret")
    with redis_server(tmp_path, *options) as server, pytest.raises(StoreUnavailable, match="REDIS_PASSWORD"):
        RedisObjects("127.0.0.1", server.port, 0, attempts=QUICK).get("a")


def test_a_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "a-secret")
    options = ("--appendonly", "yes", "--appendfsync", "always", "--requirepass", "a-secret")
    with redis_server(tmp_path, *options) as server:
        open_objects(server.url("x")).probe()


def test_what_no_string_of_redis_holds_is_refused(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.redis.BYTES_MAX", 10)
    objects = open_objects(redis_url)
    (tmp_path / "big").write_bytes(b"01234567890")
    with pytest.raises(StoreUnfit, match="11 bytes"):
        objects.put("a", b"01234567890")
    with pytest.raises(StoreUnfit, match="11 bytes"):
        objects.put_file("a", tmp_path / "big")
    assert objects.get("a") is None


def test_long_lists_come_in_pages_and_databases_and_prefixes_are_apart(
    shared_redis: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.redis.PAGE", 3)
    objects = open_objects(redis_url)
    names = [f"a/{number:02}" for number in range(10)]
    for name in names:
        objects.put(name, b"x")
    objects.put("b", b"x")
    assert [info.name for info in objects.list("a/")] == names
    assert [info.name for info in objects.list()] == [*names, "b"]
    assert list(open_objects(shared_redis.url("elsewhere")).list()) == []
    assert list(open_objects(shared_redis.url(redis_url.rpartition("=")[2], db=1)).list()) == []
