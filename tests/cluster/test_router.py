"""The router's decisions, with handles that need no Ray: what is asked again, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.errors import NotOwner, QueueFull, ShardNotOpen
from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, RenderedMessage, TokenEvent
from actors.ownership import claim
from cluster.errors import NotReady, ShardUnavailable
from cluster.mapstore import record_epoch, settle
from cluster.patience import Patience
from cluster.router import Router
from storage.errors import Fenced, NoSuchMemory
from storage.names import UserKey
from storage.store import MemoryStore, open_store
from tests.actors.fake_keeper import tokens

ALICE = UserKey("local", "alice")
NEVER = object()
OUTCOME = IngestOutcome(tokens=2, chunks=1, tokens_written=2, memory_version=1)
DIED = ActorDiedError()
INGEST = IngestCall(key=ALICE, update_id="u", conversation="book", tokens=tokens(1, 2))
CHAT = ChatCall(
    key=ALICE,
    request_id="r",
    update_id="u",
    messages=(RenderedMessage(role="user", tokens=tokens(1), prefix_hash=1),),
    generation_prompt=tokens(9),
)
DONE = DoneEvent(
    finish_reason="stop",
    prompt_tokens=1,
    completion_tokens=1,
    memory_version=1,
    tokens_written=1,
    surprise=0.0,
)


class Method:
    """`handle.method.remote(...)`: gives, in turn, what was put in; an error is raised when it is awaited."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    def remote(self, *args: Any) -> Any:
        self.calls.append(args)
        answer = self.answers.pop(0) if self.answers else None
        return answer if hasattr(answer, "__anext__") else Soon(answer)


class Soon:
    """Like a reference of Ray: it can be awaited, and nobody has to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __await__(self) -> Any:
        return self.result().__await__()

    async def result(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return await asyncio.sleep(30) if self.answer is NEVER else self.answer


async def stream(*events: Any) -> AsyncIterator[Any]:
    for event in events:
        if isinstance(event, BaseException):
            raise event
        yield Soon(event)


class Shard:
    """A handle: any method is a `Method`."""

    def __init__(self, **methods: Method) -> None:
        self._methods = {"cancel": Method()} | methods

    def __getattr__(self, name: str) -> Method:
        return self._methods[name]


class Clock:
    """Time that passes only when somebody looks."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Place:
    """One shard on a store, and a router whose lookups are counted."""

    def __init__(self, folder: Path) -> None:
        self.url = f"file://{folder}"
        self.store: MemoryStore = open_store(self.url)
        settle(self.store, 1)
        claim(self.store, "shard-0", cluster="c", incarnation="process-0", take_over=True)
        record_epoch(self.store, 0, 3)
        self.found: list[Shard | None] = []
        self.lookups = 0
        self.cancelled: list[Any] = []

    def router(self, *found: Shard | None, outage_s: float = 2.0, request_s: float = 5.0) -> Router:
        self.found = list(found)
        return Router(
            self.url,
            request_timeout_s=request_s,
            outage_s=outage_s,
            find=self.find,
            cancel=self.cancelled.append,
        )

    async def find(self, name: str) -> Shard | None:
        assert name == "process-0"
        self.lookups += 1
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_handles_and_map_are_kept(place: Place) -> None:
    shard = Shard(ingest=Method(OUTCOME, OUTCOME))
    router = place.router(shard)
    assert await router.ingest(INGEST) == OUTCOME
    assert await router.ingest(INGEST) == OUTCOME
    assert place.lookups == 1
    assert shard.ingest.calls == [(INGEST, 3), (INGEST, 3)]


@pytest.mark.parametrize(
    "error",
    [
        NotOwner("shard-0", 1, 3),
        ShardNotOpen("shard-0", "starting"),
        Fenced("over"),
        DIED,
        ActorUnavailableError("away", None),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_repeatable_call_is_asked_again_with_the_new_epoch(place: Place, error: Exception) -> None:
    first, second = Shard(ingest=Method(error)), Shard(ingest=Method(OUTCOME))
    router = place.router(first, second)

    async def successor() -> None:
        record_epoch(place.store, 0, 4)

    await asyncio.gather(successor(), router.readiness())
    assert await router.ingest(INGEST) == OUTCOME
    assert second.ingest.calls == [(INGEST, 4)]


@pytest.mark.parametrize("error", [QueueFull("the queue", 2.0), NoSuchMemory("nobody"), ValueError("a bug")])
async def test_an_answer_that_is_an_error_is_not_asked_again(place: Place, error: Exception) -> None:
    shard = Shard(ingest=Method(error, OUTCOME))
    with pytest.raises(type(error)):
        await place.router(shard).ingest(INGEST)
    assert len(shard.ingest.calls) == 1


async def test_one_back_is_never_repeated_when_its_outcome_is_unknown(place: Place) -> None:
    shard = Shard(rollback=Method(DIED, {}))
    with pytest.raises(ShardUnavailable, match="look whether the change was made"):
        await place.router(shard).rollback(ALICE)
    assert len(shard.rollback.calls) == 1
    shard = Shard(rollback=Method(NotOwner("shard-0", 1, 3), {"memory_version": 4}))
    assert await place.router(shard).rollback(ALICE) == {"memory_version": 4}
    shard = Shard(rollback=Method(DIED, {"memory_version": 2}))
    assert await place.router(shard).rollback(ALICE, 2) == {"memory_version": 2}


async def test_waits_for_a_shard_that_is_being_started(place: Place) -> None:
    shard = Shard(ingest=Method(OUTCOME))
    assert await place.router(None, None, None, shard).ingest(INGEST) == OUTCOME


async def test_gives_up_on_a_shard_that_stays_away(place: Place) -> None:
    with pytest.raises(ShardUnavailable, match="not running"):
        await place.router(None, outage_s=0.2).ingest(INGEST)
    shard = Shard(ingest=Method(*[DIED] * 100))
    with pytest.raises(ShardUnavailable, match="no answer for"):
        await place.router(shard, outage_s=0.2).ingest(INGEST)
    assert 2 < len(shard.ingest.calls) < 20, "bounded backoff"


async def test_a_shard_that_never_answers_is_a_timeout(place: Place) -> None:
    shard = Shard(ingest=Method(NEVER))
    with pytest.raises(ShardUnavailable, match="did not answer in time"):
        await place.router(shard, request_s=0.1).ingest(INGEST)


async def test_a_store_without_a_map_is_a_cluster_that_starts(tmp_path: Path) -> None:
    router = Router(f"file://{tmp_path}", request_timeout_s=1.0, outage_s=0.1, find=never)
    assert await router.readiness() == (False, "the cluster is starting")
    with pytest.raises(NotReady, match="starting"):
        await router.ingest(INGEST)


async def never(name: str) -> Shard | None:
    raise AssertionError(f"{name} was looked for")


async def collect(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def test_chat_passes_events_on_and_leaves_a_finished_request_alone(place: Place) -> None:
    shard = Shard(chat=Method(stream(TokenEvent(tokens=(1,)), DONE)))
    assert await collect(place.router(shard).chat(CHAT)) == [TokenEvent(tokens=(1,)), DONE]
    assert place.cancelled == []
    assert shard.cancel.calls == []


async def test_chat_is_asked_again_before_the_first_token(place: Place) -> None:
    errors = (DIED, ShardNotOpen("shard-0", "starting"), NotOwner("shard-0", 1, 3))
    shard = Shard(chat=Method(*map(stream, errors), stream(TokenEvent(tokens=(1,)), DONE)))
    assert len(await collect(place.router(shard).chat(CHAT))) == 2
    assert shard.cancel.calls == [], "a cancel would end the next try, which has the same request id"


@pytest.mark.parametrize("error", [DIED, Fenced("over")], ids=lambda error: type(error).__name__)
async def test_chat_that_has_spoken_is_not_asked_again(place: Place, error: Exception) -> None:
    shard = Shard(chat=Method(stream(TokenEvent(tokens=(1, 2)), error), stream(DONE)))
    with pytest.raises(ShardUnavailable, match="after 2 tokens"):
        await collect(place.router(shard).chat(CHAT))
    assert len(shard.chat.calls) == 1


async def test_a_reply_without_an_end_is_an_error(place: Place) -> None:
    shard = Shard(chat=Method(stream(TokenEvent(tokens=(1,)))))
    with pytest.raises(ShardUnavailable, match="the reply ended early"):
        await collect(place.router(shard).chat(CHAT))


async def test_closing_a_chat_cancels_it_in_the_middle_of_a_wait(place: Place) -> None:
    endless = stream(TokenEvent(tokens=(1,)), NEVER)
    shard = Shard(chat=Method(endless))
    events = place.router(shard).chat(CHAT)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert place.cancelled == [endless]
    assert shard.cancel.calls == [("r",)]


async def test_closing_a_chat_between_two_events_cancels_it(place: Place) -> None:
    shard = Shard(chat=Method(stream(TokenEvent(tokens=(1,)), DONE)))
    events = place.router(shard).chat(CHAT)
    await anext(events)
    await events.aclose()
    assert shard.cancel.calls == [("r",)]


async def test_readiness_says_which_shard_and_why(place: Place) -> None:
    assert await place.router(Shard(ping=Method({"state": "ready"}))).readiness() == (True, "")
    assert await place.router(Shard(ping=Method({"state": "draining"}))).readiness() == (
        False,
        "shard-0 of 1 is draining",
    )
    away = {"state": "ready", "store": "the store is away"}
    assert await place.router(Shard(ping=Method(away))).readiness() == (True, "the store is away")
    ready, why = await place.router(Shard(ping=Method(DIED))).readiness()
    assert not ready
    assert "shard-0" in why


async def test_readiness_answers_within_a_second_whatever_the_shards_do(place: Place) -> None:
    router = place.router(Shard(ping=Method(NEVER)))
    ready, _ = await asyncio.wait_for(router.readiness(), 2)
    assert not ready


async def test_users_are_all_or_an_error(place: Place) -> None:
    records = [
        {"tenant": "local", "user": "b"},
        {"tenant": "other", "user": "x"},
        {"tenant": "local", "user": "a"},
    ]
    found = await place.router(Shard(users=Method(records))).users("local")
    assert [record["user"] for record in found] == ["a", "b"]
    with pytest.raises(ShardUnavailable):
        await place.router(Shard(users=Method(DIED))).users("local")


def patience(clock: Callable[[], float], slept: list[float]) -> tuple[Patience, Callable[[float], Any]]:
    async def sleep(pause_s: float) -> None:
        slept.append(pause_s)
        clock.now += pause_s  # type: ignore[attr-defined]

    return Patience(10.0, 100.0, clock), sleep


async def test_patience_grows_its_pauses_and_ends() -> None:
    clock, slept = Clock(), []
    left, sleep = patience(clock, slept)
    clock.now = 50.0
    while await left.pause(sleep):
        pass
    assert slept[0] < slept[1] < slept[2]
    assert max(slept) <= 0.5
    assert 9 < sum(slept) <= 10
    assert 39 < left.left_s() < 41
