"""S3 when the network fails: answers that get lost, servers that are down, wrong credentials."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from storage.errors import StoreUnavailable, StoreUnfit, VersionConflict
from storage.objects import open_objects
from storage.records import RecordStore
from storage.s3 import ATTEMPTS_MAX, S3Objects
from tests.servers import S3Server, free_port


def client_error(status: int, code: str) -> ClientError:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")


TIMEOUT = ReadTimeoutError(endpoint_url="http://127.0.0.1")


class Flaky:
    """A real client whose answers get lost: `script` says for each call of `operation` what happens.

    "lost" carries the request out and drops the answer; "down" does not carry it out; "late" carries out only
    what another writer sent, then drops the answer; anything else passes.
    """

    def __init__(self, client: Any, operation: str, script: list[Any]) -> None:
        self._client, self._operation, self._script = client, operation, script
        self.calls = 0
        self.between: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        return self._scripted(real) if name == self._operation else real

    def _scripted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            self.calls += 1
            step = self._script.pop(0) if self._script else "fine"
            if isinstance(step, Exception):
                raise step
            if step == "down":
                raise TIMEOUT
            if step == "late":
                self.between()
                raise TIMEOUT
            answer = real(**arguments)
            if step == "lost":
                self.between()
                raise TIMEOUT
            return answer

        return call


@pytest.fixture
def flaky(s3_url: str, s3_server: S3Server) -> Callable[..., tuple[S3Objects, Flaky]]:
    def build(operation: str, *script: Any) -> tuple[S3Objects, Flaky]:
        prefix = s3_url.split("?")[0].removeprefix("s3://titanmem/")
        objects = S3Objects("titanmem", prefix, endpoint=s3_server.endpoint, sleep=lambda seconds: None)
        objects._client = Flaky(objects._client, operation, list(script))
        return objects, objects._client

    return build


def test_a_lost_answer_of_a_conditional_write_is_settled(flaky: Any) -> None:
    """The retry is refused by our own first attempt: that is a success and must be told as one."""
    objects, client = flaky("put_object", "lost")
    tag = objects.put("a", b"mine", if_absent=True)
    assert objects.get("a") == (b"mine", tag)
    assert client.calls == 2


def test_the_same_with_a_tag(flaky: Any) -> None:
    objects, _ = flaky("put_object", "fine", "lost", "down")
    first = objects.put("a", b"one")
    second = objects.put("a", b"two", if_tag=first)
    assert objects.get("a") == (b"two", second)


def test_a_write_that_never_arrived_is_repeated(flaky: Any) -> None:
    objects, client = flaky(
        "put_object", "down", client_error(503, "SlowDown"), client_error(500, "InternalError")
    )
    tag = objects.put("a", b"mine", if_absent=True)
    assert objects.get("a") == (b"mine", tag)
    assert client.calls == 4


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "TooManyRequests"),
        (409, "ConditionalRequestConflict"),
        (409, "OperationAborted"),
        (503, "SlowDown"),
    ],
)
@pytest.mark.parametrize("operation", ["put_object", "get_object", "delete_object", "list_objects_v2"])
def test_a_busy_server_is_asked_again(flaky: Any, operation: str, status: int, code: str) -> None:
    """Of a 409, S3 says that the condition was not decided: it is no conflict."""
    objects, client = flaky(operation, *[client_error(status, code)] * (ATTEMPTS_MAX - 1))
    objects.put("a", b"mine", if_absent=True)
    assert (objects.get("a") or (b"",))[0] == b"mine"
    assert [info.name for info in objects.list()] == ["a"]
    objects.delete("a")
    assert client.calls >= ATTEMPTS_MAX
    assert objects.get("a") is None


def test_a_clock_that_is_off_is_named(flaky: Any) -> None:
    objects, _ = flaky("get_object", client_error(403, "RequestTimeTooSkewed"))
    with pytest.raises(StoreUnavailable, match="Set this machine's clock"):
        objects.get("a")


def test_another_writer_in_the_gap_wins(flaky: Any, s3_url: str) -> None:
    objects, client = flaky("put_object", "late")
    client.between = lambda: open_objects(s3_url).put("a", b"theirs", if_absent=True)
    with pytest.raises(VersionConflict):
        objects.put("a", b"mine", if_absent=True)
    assert (objects.get("a") or (b"", ""))[0] == b"theirs"


def test_a_lost_success_that_was_overwritten_is_a_conflict(flaky: Any, s3_url: str) -> None:
    """Ours was carried out, then somebody else's after it: the honest answer is that ours is not there."""
    objects, client = flaky("put_object", "lost")
    client.between = lambda: open_objects(s3_url).put("a", b"theirs")
    with pytest.raises(VersionConflict):
        objects.put("a", b"mine", if_absent=True)


def test_when_all_attempts_are_lost_the_last_word_is_a_read(flaky: Any) -> None:
    objects, client = flaky("put_object", "lost", *["down"] * 10)
    assert objects.put("a", b"mine", if_absent=True)
    assert client.calls == ATTEMPTS_MAX
    objects, _ = flaky("put_object", *["down"] * 10)
    with pytest.raises(StoreUnavailable, match="is not known") as caught:
        objects.put("b", b"mine", if_absent=True)
    assert caught.value.ambiguous


def test_two_claims_of_one_epoch_never_both_succeed(flaky: Any, s3_url: str) -> None:
    """Both write {"epoch": 1}; the nonce tells whose it is, though ours got lost and theirs is there."""
    objects, client = flaky("put_object", "late")
    theirs: list[int] = []
    client.between = lambda: theirs.append(RecordStore(open_objects(s3_url)).next_epoch())
    mine = RecordStore(objects).next_epoch()
    assert (theirs, mine) == ([1], 2)


def test_reads_are_repeated(flaky: Any) -> None:
    objects, client = flaky("get_object", "down", "lost", client_error(500, "InternalError"))
    objects.put("a", b"x")
    assert (objects.get("a") or (b"", ""))[0] == b"x"
    assert client.calls == 4


def test_pauses_grow_and_stop_at_the_budget() -> None:
    pauses: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    objects = S3Objects(
        "titanmem", endpoint="http://127.0.0.1:9", sleep=sleep, clock=lambda: clock[0], jitter=lambda: 1.0
    )
    objects._client = Flaky(objects._client, "get_object", ["down"] * 99)
    with pytest.raises(StoreUnavailable, match="tried again and again"):
        objects.get("a")
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    objects._attempts, pauses[:] = replace(objects._attempts, budget_s=0.25), []
    with pytest.raises(StoreUnavailable):
        objects.get("a")
    assert pauses == [0.1, 0.2]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (client_error(403, "AccessDenied"), StoreUnavailable, "permissions"),
        (client_error(404, "NoSuchBucket"), StoreUnavailable, "no bucket"),
        (client_error(501, "NotImplemented"), StoreUnfit, "can not do"),
    ],
)
def test_what_does_not_pass_is_not_repeated(flaky: Any, error: Exception, kind: type, message: str) -> None:
    objects, client = flaky("put_object", error)
    with pytest.raises(kind, match=message):
        objects.put("a", b"x", if_absent=True)
    assert client.calls == 1


def test_a_server_that_is_down(s3_server: S3Server) -> None:
    objects = open_objects(f"s3://titanmem/x?endpoint=http://127.0.0.1:{free_port()}")
    objects._sleep = lambda seconds: None  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="Check that the endpoint answers"):
        objects.probe()


def test_a_bucket_that_is_not_there(s3_server: S3Server) -> None:
    with pytest.raises(StoreUnavailable, match="there is no bucket nowhere"):
        open_objects(s3_server.url("nowhere")).probe()


def test_no_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreUnavailable, match="Check the credentials"):
        open_objects(s3_server.url("titanmem")).get("a")


def test_an_endpoint_that_is_none() -> None:
    with pytest.raises(ValueError, match="store: s3://titanmem/"):
        open_objects("s3://titanmem?endpoint=not-a-url")


def test_the_endpoint_may_come_from_the_environment(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    objects = open_objects("s3://titanmem/from-environment")
    objects.put("a", b"x")
    assert [info.name for info in objects.list()] == ["a"]


def test_large_files_go_in_parts(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.s3.PART_BYTES", 5 << 20)
    objects = open_objects(s3_url)
    data = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(data)
    objects.put_file("large", tmp_path / "large")
    with objects.open_read("large") as file:
        assert file.read() == data
    tag = (objects.get("large") or (b"", ""))[1]
    assert tag.strip('"').endswith("-3"), "three parts"


def test_lists_go_on_over_pages(s3_url: str) -> None:
    objects: Any = open_objects(s3_url)
    for number in range(5):
        objects.put(f"a/{number}", b"")
    real = objects._client.list_objects_v2
    pages: list[int] = []

    class Paged:
        def list_objects_v2(self, **arguments: Any) -> Any:
            pages.append(1)
            return real(**arguments, MaxKeys=2)

    objects._client = Paged()
    assert [info.name for info in objects.list("a/")] == [f"a/{n}" for n in range(5)]
    assert len(pages) == 3


def test_an_object_that_changes_while_it_is_read(s3_url: str) -> None:
    objects = open_objects(s3_url)
    objects.put("a", b"x" * 1_000_000)
    with objects.open_read("a") as file:
        file.read(10)
        objects.put("a", b"y" * 1_000_000)
        file.seek(900_000)
        with pytest.raises(StoreUnavailable, match="changed while it was read"):
            file.read(10)
