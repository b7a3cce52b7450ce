"""The shard behind its ownership check, with a keeper that has no model and without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors import shard as module
from actors.errors import NotOwner, QueueFull, ShardNotOpen
from actors.messages import ChatCall, DoneEvent, IngestCall, RenderedMessage, TokenEvent
from actors.options import KeeperOptions, ShardOptions
from actors.ownership import claim, retire
from actors.shard import MemoryShard
from storage.errors import Fenced, JournalError, JournalFailed, StoreUnavailable
from storage.journal import Journal
from storage.names import BUCKETS, UserKey, bucket_of
from storage.store import MemoryStore, open_store
from tests.actors.fake_keeper import tokens

ALICE = UserKey("local", "alice")
EVERY = frozenset(range(BUCKETS))


class Place:
    """A store, a journal folder, and shards over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: MemoryStore = open_store(f"file://{folder}/store")
        self.left: list[int] = []

    def shard(
        self, buckets: frozenset[int] = EVERY, queue_max: int = 8, durability: str = "local"
    ) -> MemoryShard:
        owner = claim(self.store, "shard-0", cluster="test", incarnation="i", take_over=True)
        keeper = KeeperOptions(
            model="unused",
            store_url=self.store.url,
            journal_dir=str(self.folder / "journal"),
            shard="shard-0",
            epoch=owner.epoch,
            queue_max=queue_max,
            durability=durability,
        )
        options = ShardOptions(
            keeper=keeper, buckets=buckets, map_version=1, open_keeper="tests.actors.fake_keeper:open_keeper"
        )
        return MemoryShard(options, leave=lambda: self.left.append(owner.epoch))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def chat(name: str = "r", token_s: float = 0.0) -> ChatCall:
    message = RenderedMessage(role="user", tokens=tokens(1, 2, 3), prefix_hash=1)
    return ChatCall(
        key=ALICE,
        request_id=name,
        update_id=name,
        messages=(message,),
        generation_prompt=tokens(9),
        temperature=token_s,
    )


def ingest(name: str = "d") -> IngestCall:
    return IngestCall(key=ALICE, update_id=name, conversation="book", tokens=tokens(1, 2))


async def test_serves_what_it_owns(place: Place) -> None:
    shard = place.shard()
    about = await shard.open()
    epoch = about["epoch"]
    events = [event async for event in shard.chat(chat(), epoch)]
    assert [event.tokens for event in events if isinstance(event, TokenEvent)] == [(1,), (2,), (3,)]
    assert isinstance(events[-1], DoneEvent)
    assert (await shard.ingest(ingest(), epoch)).memory_version == 2
    assert (await shard.ingest(ingest(), epoch)).duplicate
    assert (await shard.describe(ALICE, epoch))["shard"] == "shard-0"
    assert (await shard.ping())["state"] == "ready"
    await shard.close()
    with pytest.raises(ShardNotOpen, match="stopped"):
        await shard.ingest(ingest(), epoch)


async def test_refuses_calls_before_it_is_open_and_for_other_buckets(place: Place) -> None:
    shard = place.shard(buckets=EVERY - {bucket_of(ALICE)})
    with pytest.raises(ShardNotOpen, match="starting"):
        await shard.users()
    epoch = (await shard.open())["epoch"]
    with pytest.raises(NotOwner, match=f"does not own bucket {bucket_of(ALICE)}"):
        await shard.ingest(ingest(), epoch)
    with pytest.raises(NotOwner):
        await anext(shard.chat(chat(), epoch))
    with pytest.raises(NotOwner):
        await shard.forget(ALICE, epoch)
    await shard.close()


async def test_a_caller_with_a_newer_epoch_knows_of_a_successor(place: Place) -> None:
    shard = place.shard()
    epoch = (await shard.open())["epoch"]
    with pytest.raises(NotOwner):
        await shard.ingest(ingest(), epoch + 1)
    assert (await shard.ingest(ingest(), epoch - 1)).tokens == 2, "an older map still names the right shard"
    await shard.close()


@pytest.mark.parametrize("call", ["chat", "ingest", "rollback", "pin", "import_", "forget"])
async def test_nothing_is_acknowledged_once_the_epoch_is_over(
    place: Place, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FENCED_EXIT_S", 0.01)
    shard = place.shard()
    epoch = (await shard.open())["epoch"]
    await shard.ingest(ingest("before"), epoch)
    claim(place.store, "shard-0", cluster="other", incarnation="j", take_over=True)
    arguments = {"rollback": (ALICE, epoch, 1), "import_": (ALICE, epoch, b"{}")}.get(call, (ALICE, epoch))
    seen: list[Any] = []

    async def ask() -> None:
        if call == "chat":
            async for event in shard.chat(chat(), epoch):
                seen.append(event)
        elif call == "ingest":
            await shard.ingest(ingest(), epoch)
        else:
            await getattr(shard, call)(*arguments)

    with pytest.raises(Fenced, match=f"epoch {epoch} is over"):
        await ask()
    assert not any(isinstance(event, DoneEvent) for event in seen)
    assert (await shard.ping())["state"] == "fenced"
    with pytest.raises(ShardNotOpen, match="fenced"):
        await shard.describe(ALICE, epoch)
    await asyncio.sleep(0.05)
    assert place.left == [epoch], "a fenced shard's process ends"


@pytest.mark.parametrize("durability", ["local", "replicated", "sync"])
async def test_while_the_store_is_away_only_what_the_durability_allows_is_acknowledged(
    place: Place, durability: str
) -> None:
    shard = place.shard(durability=durability)
    epoch = (await shard.open())["epoch"]
    (place.folder / "store").rename(place.folder / "away")
    acknowledges = durability != "sync"
    for number in range(2):
        if acknowledges:
            await shard.ingest(ingest(f"d{number}"), epoch)
        else:
            with pytest.raises(StoreUnavailable):
                await shard.ingest(ingest(f"d{number}"), epoch)
    assert (await shard.ping())["unconfirmed"] == 2 * acknowledges
    shard._keeper.holds = False
    with pytest.raises(StoreUnavailable):
        await shard.ingest(ingest("e"), epoch)
    (place.folder / "away").rename(place.folder / "store")
    assert (await shard.ingest(ingest("e"), epoch)).duplicate, "a retry is told of what was written"
    await shard.close()


async def test_a_shard_that_the_map_has_no_more_hears_of_it_when_it_comes_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FENCED_EXIT_S", 0.01)
    shard = place.shard()
    epoch = (await shard.open())["epoch"]
    await shard.ingest(ingest(), epoch)
    assert retire(place.store, [], cluster="new") == ["shard-0"]
    with pytest.raises(Fenced):
        await shard.ingest(ingest("after"), epoch)
    await asyncio.sleep(0.05)
    assert place.left == [epoch]


async def test_a_shard_whose_journal_failed_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started again, and only then is known what the disk has."""
    monkeypatch.setattr(module, "FENCED_EXIT_S", 0.01)
    shard = place.shard()
    epoch = (await shard.open())["epoch"]

    async def fail(call: object) -> None:
        raise JournalFailed("disk I/O error")

    monkeypatch.setattr(shard._keeper, "ingest", fail)
    with pytest.raises(JournalFailed):
        await shard.ingest(ingest(), epoch)
    with pytest.raises(ShardNotOpen, match="stopped"):
        await shard.ingest(ingest(), epoch)
    await asyncio.sleep(0.05)
    assert place.left == [epoch]


async def test_a_shard_whose_epoch_is_over_does_not_open(place: Place) -> None:
    first = place.shard()
    place.shard()
    with pytest.raises(Fenced):
        await first.open()


async def test_cancel_ends_the_reply_in_the_middle_of_a_wait(place: Place) -> None:
    shard = place.shard()
    epoch = (await shard.open())["epoch"]

    async def consume() -> None:
        async for _ in shard.chat(chat("slow", token_s=30.0), epoch):
            pass

    running = asyncio.create_task(consume())
    await asyncio.sleep(0.02)
    assert (await shard.ping())["chats"] == 1
    assert await shard.cancel("slow")
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)
    assert (await shard.stats())["cancelled"] == ["slow"]
    assert (await shard.ping())["chats"] == 0
    await shard.close()


async def test_a_cancel_that_overtakes_its_request_still_counts(place: Place) -> None:
    shard = place.shard()
    epoch = (await shard.open())["epoch"]
    assert not await shard.cancel("early")
    assert [event async for event in shard.chat(chat("early"), epoch)] == []
    assert [event async for event in shard.chat(chat("early"), epoch)], "but only once"
    await shard.close()


async def test_remembered_cancels_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EARLY_CANCELS_MAX", 3)
    shard = place.shard()
    for number in range(10):
        await shard.cancel(f"r{number}")
    assert list(shard._early_cancels) == ["r7", "r8", "r9"]


async def test_the_keepers_own_errors_pass_through(place: Place) -> None:
    shard = place.shard(queue_max=0)
    epoch = (await shard.open())["epoch"]
    with pytest.raises(QueueFull) as caught:
        await anext(shard.chat(chat(), epoch))
    assert caught.value.retry_after_s == 0.5
    await shard.close()


async def test_one_process_at_a_time_has_the_journal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = place.shard()
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.1)
    other = Journal(shard._options.keeper.journal)
    with pytest.raises(JournalError, match="still has this journal open"):
        await shard.open()
    other.close()
    await shard.open()
    await shard.close()


async def test_draining_is_said_and_calls_are_still_served(place: Place) -> None:
    shard = place.shard()
    epoch = (await shard.open())["epoch"]
    await shard.drain()
    assert (await shard.ping())["state"] == "draining"
    assert (await shard.ingest(ingest(), epoch)).tokens == 2
    await shard.close()
    assert (await shard.ping())["state"] == "stopped"
