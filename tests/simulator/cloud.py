"""An S3 that fails: the bottom half of `storage.s3`, in virtual time, with every answer that a network can lose.

The client stands where boto3's stands, so conditions, retries and settled doubts are the product's own. A request is
carried out when it arrives, which may be after its sender has given up or died; it may arrive twice or never, and its
answer may be late or lost.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import xxhash
from botocore.exceptions import ClientError, ReadTimeoutError

from storage.attempts import Attempts
from storage.s3 import ATTEMPTS_MAX, BUDGET_S, READ_TIMEOUT_S, S3Objects
from tests.simulator.world import Process, World

URL = "s3://simulated/store"


@dataclass(kw_only=True, slots=True)
class Weather:
    """How likely each fault of one request is; all zero = a good day."""

    refused: float = 0.0
    """429 or 503; or, of a conditional write, 409. Not carried out."""
    failed: float = 0.0
    """500, carried out all the same."""
    lost: float = 0.0
    """The request never arrives; the sender's time runs out."""
    silent: float = 0.0
    """Carried out, and the answer is lost."""
    late: float = 0.0
    """Arrives up to a minute after it was sent."""
    doubled: float = 0.0
    """Arrives a second time later on."""
    down: bool = False
    """Nothing gets through."""
    ambush: Callable[[Process], float] | None = None
    """Told, once, who sends the next object of a user; says how many seconds later it shall arrive."""


@dataclass(slots=True)
class Bucket:
    """What the store holds. `watchers` hear of each change: (name, bytes before, bytes after)."""

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    watchers: list[Callable[[str, bytes | None, bytes | None], None]] = field(default_factory=list)

    def put(self, key: str, data: bytes, match: str | None, absent: bool) -> dict[str, Any]:
        found = self.objects.get(key)
        if match is not None and found is None:
            raise _error(404, "NoSuchKey")
        if (match is not None and found is not None and found[1] != match) or (absent and found is not None):
            raise _error(412, "PreconditionFailed")
        tag = xxhash.xxh3_64_hexdigest(data)
        self.objects[key] = (data, tag)
        self._tell(key, found and found[0], data)
        return {"ETag": tag}

    def get(self, key: str) -> dict[str, Any]:
        found = self.objects.get(key)
        if found is None:
            raise _error(404, "NoSuchKey")
        return {"Body": io.BytesIO(found[0]), "ETag": found[1]}

    def delete(self, key: str) -> dict[str, Any]:
        found = self.objects.pop(key, None)
        if found is not None:
            self._tell(key, found[0], None)
        return {}

    def list(self, prefix: str) -> dict[str, Any]:
        made = datetime(2026, 1, 1, tzinfo=UTC)
        lines = [
            {"Key": key, "Size": len(self.objects[key][0]), "LastModified": made}
            for key in sorted(self.objects)
            if key.startswith(prefix)
        ]
        return {"Contents": lines, "IsTruncated": False}

    def _tell(self, key: str, before: bytes | None, after: bytes | None) -> None:
        for watcher in self.watchers:
            watcher(key.removeprefix("store/"), before, after)


class Client:
    """boto3's client, as far as `S3Objects` uses it, in one process."""

    def __init__(self, process: Process, bucket: Bucket, weather: Weather) -> None:
        self._process, self._bucket, self._weather = process, bucket, weather

    def put_object(
        self, *, Key: str, Body: bytes, IfMatch: str | None = None, IfNoneMatch: str | None = None, **_: Any
    ) -> dict[str, Any]:  # fmt: skip
        absent = IfNoneMatch is not None
        ambush, held_s = self._weather.ambush, 0.0
        if ambush is not None and Key.endswith((".titanmem", ".segments")):
            self._weather.ambush = None
            held_s = ambush(self._process)
        return self._ask(
            lambda: self._bucket.put(Key, Body, IfMatch, absent),
            conditional=absent or IfMatch is not None,
            held_s=held_s,
        )

    def get_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        served: list[float] = []

        def read() -> dict[str, Any]:
            served.append(self._process.world.now)
            return self._bucket.get(Key)

        answer = self._ask(read)
        self._process.reads[Key.removeprefix("store/")] = served[0]
        return answer

    def delete_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        return self._ask(lambda: self._bucket.delete(Key))

    def list_objects_v2(self, *, Prefix: str, **_: Any) -> dict[str, Any]:
        return self._ask(lambda: self._bucket.list(Prefix))

    def _ask(
        self, carry_out: Callable[[], dict[str, Any]], conditional: bool = False, held_s: float = 0.0
    ) -> dict[str, Any]:
        """Sends the request, and waits for an answer or for the time-out, whichever this process sees first."""
        world, fiber, weather = self._process.world, self._process.world.fiber, self._weather
        assert fiber is not None, "the store is asked by blocking code"
        answers: list[dict[str, Any] | Exception] = []
        fate = _fate(world, weather)
        if fate == "refused":
            code = "ConditionalRequestConflict" if conditional and world.rng.random() < 0.5 else "SlowDown"
            answers.append(_error(409 if code.startswith("Cond") else world.rng.choice((429, 503)), code))

        def arrive(again: bool = False) -> None:
            try:
                answer: dict[str, Any] | Exception = carry_out()
            except ClientError as error:
                answer = error
            if fate == "failed":
                answer = _error(500, "InternalError")
            if fate != "silent" and not again:
                self._process.loop.call_later(world.pause(0.001, 0.01), hear, answer)

        def hear(answer: dict[str, Any] | Exception | None) -> None:
            if not answers:
                answers.append(answer or ReadTimeoutError(endpoint_url=URL))
                fiber.resume()

        if fate == "refused":
            world.sleep(world.pause(0.002, 0.02))
        else:
            if fate != "lost":
                way_s = world.pause(1.0, 60.0) if fate == "late" else world.pause(0.001, 0.01)
                world.later(way_s + held_s, arrive)
            if fate == "doubled":
                world.later(world.pause(0.01, 30.0), arrive, True)
            timer = self._process.loop.call_later(READ_TIMEOUT_S, hear, None)
            fiber.park()
            timer.cancel()
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def _fate(world: World, weather: Weather) -> str:
    if weather.down:
        return "refused" if world.rng.random() < 0.7 else "lost"
    draw = world.rng.random()
    for fate in ("refused", "failed", "lost", "silent", "late", "doubled"):
        draw -= getattr(weather, fate)
        if draw < 0:
            return fate
    return "fine"


def _error(status: int, code: str) -> ClientError:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "Simulated")


class SimulatedS3(S3Objects):
    """`S3Objects` itself over another client: boto3's takes longer to make than a whole life takes here."""

    def __init__(self, process: Process, bucket: Bucket, weather: Weather) -> None:
        world = process.world
        self.bucket, self.prefix, self.url = "simulated", "store/", URL
        self._attempts = Attempts(
            most=ATTEMPTS_MAX, budget_s=BUDGET_S, sleep=world.sleep, clock=process.loop.time, jitter=world.rng.random
        )  # fmt: skip
        self._client = Client(process, bucket, weather)
