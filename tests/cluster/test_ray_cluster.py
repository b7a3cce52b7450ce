"""Two shards with keepers that have no model, the coordinator, the router and the door, in real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from actors.errors import QueueFull
from actors.messages import ChatCall, DoneEvent, IngestCall, RenderedMessage, TokenEvent
from actors.options import journal_path
from actors.ownership import claim
from cluster.errors import BadRequest, ShardUnavailable
from cluster.handles import COORDINATOR, NAMESPACE
from cluster.mapstore import read_map, settle
from cluster.router import Router
from storage.errors import NoSuchMemory
from storage.journal import Journal, Segment
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import verify
from storage.store import open_store
from tests.actors.fake_keeper import tokens
from tests.cluster.conftest import Running, Start

pytestmark = pytest.mark.slow

USERS = [UserKey("local", f"u{n}") for n in range(12)]


@pytest.fixture(scope="module")
def cluster(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two shards, on what a cluster of one shard has left: its map, and a journal with pending segments."""
    folder = tmp_path_factory.mktemp("cluster")
    settle(open_store(f"file://{folder}/store"), 1)
    journal = Journal(journal_path(folder / "journal", "shard-0"))
    for key in USERS:
        journal.append(segment(key)).result(10)
    journal.close()
    with start(folder, shards=2, queue_max=16) as running:
        yield running


def segment(key: UserKey) -> Segment:
    return Segment(
        key=key,
        update_id="from the cluster before",
        conversation="c",
        role="user",
        context=tokens(),
        tokens=tokens(1),
        first_chunk_id=1,
        last_chunk_id=1,
    )


@pytest.fixture
def router(cluster: Running) -> Router:
    return cluster.router()


def ingest(key: UserKey, update_id: str) -> IngestCall:
    return IngestCall(key=key, update_id=update_id, conversation="book", tokens=tokens(1, 2))


def chat(key: UserKey, name: str, length: int = 3, token_s: float = 0.0) -> ChatCall:
    message = RenderedMessage(role="user", tokens=tokens(*range(length)), prefix_hash=1)
    return ChatCall(
        key=key,
        request_id=name,
        update_id=name,
        messages=(message,),
        generation_prompt=tokens(9),
        temperature=token_s,
    )


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def collect(events: AsyncIterator[TokenEvent | DoneEvent]) -> list[TokenEvent | DoneEvent]:
    return [event async for event in events]


async def one_on(router: Router, shard: str) -> UserKey:
    """A user of that shard."""
    for key in USERS:
        await router.ingest(ingest(key, "first"))
        if (await router.describe(key))["shard"] == shard:
            return key
    raise AssertionError(f"no user on {shard}")


async def cancelled(router: Router, name: str, within_s: float = 5.0) -> float:
    """Seconds until some keeper has heard that the request of that name is over."""
    began = time.monotonic()
    while time.monotonic() < began + within_s:
        for shard in await router.shards():
            if name in shard["cancelled"]:
                return time.monotonic() - began
        await asyncio.sleep(0.02)
    raise AssertionError(f"nobody heard that {name} was cancelled")


async def test_users_are_spread_over_both_shards(cluster: Running, router: Router) -> None:
    for key in USERS:
        assert (await router.ingest(ingest(key, "first"))).tokens == 2
    about = [await router.describe(key) for key in USERS]
    assert {record["shard"] for record in about} == {"shard-0", "shard-1"}
    assert len({record["pid"] for record in about}) == 2
    found = await router.users("local")
    assert {record["user"] for record in found} >= {key.user for key in USERS}
    assert await router.users("other") == []
    assert (await router.readiness()) == (True, "")
    shards = await router.shards()
    assert [shard["state"] for shard in shards] == ["ready", "ready"]
    assert sum(shard["buckets"] for shard in shards) == 4096
    assert cluster.said[0].startswith(f"titanmem is ready at {cluster.url} (2 shards")


async def test_a_cold_start_with_more_shards_hands_pending_segments_over(cluster: Running) -> None:
    current = read_map(open_store(cluster.config.store))
    assert current is not None
    assert current.counts() == [2048, 2048]
    assert min(current.epochs) > 0
    for shard in (0, 1):
        journal = Journal(journal_path(cluster.config.journal_dir, f"shard-{shard}"))
        assert journal.users_pending() == sorted(key for key in USERS if current.owner_of(key) == shard)
        journal.close()


async def test_errors_come_back_as_they_were_raised(router: Router) -> None:
    with pytest.raises(NoSuchMemory, match="nobody-knows"):
        await router.describe(UserKey("local", "nobody-knows"))
    key = await one_on(router, "shard-0")
    waiting = [asyncio.create_task(anext(router.chat(chat(key, f"q{n}", token_s=30)))) for n in range(16)]
    await asyncio.sleep(0.3)
    with pytest.raises(QueueFull) as caught:
        await anext(router.chat(chat(key, "one too many")))
    assert caught.value.retry_after_s == 0.5
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await cancelled(router, "q15")


async def test_chat_streams_through_the_door(cluster: Running) -> None:
    body = {"model": "titanmem-tiny", "user": "door", "messages": [{"role": "user", "content": "Rex"}]}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=30) as client:
        for path in ("/livez", "/readyz", "/v1/models", "/metrics"):
            assert (await client.get(path)).status_code == 200, path
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["titan"]["memory_version"] == 1
        lines = []
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        text = "".join(
            piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"]
        )
        assert text == "Rex"
        metrics = (await client.get("/metrics")).text
        for line in ("titan:shardmap_version ", "titan:bucket_moves_total 2048.0", "titan:fenced_total 0.0"):
            assert f"\n{line}" in metrics


async def test_a_client_that_goes_away_stops_the_keeper(cluster: Running, router: Router) -> None:
    before = {name for shard in await router.shards() for name in shard["cancelled"]}
    body = {
        "model": "titanmem-tiny",
        "user": "impatient",
        "messages": [{"role": "user", "content": "my dog is called Rex " * 20}],
        "stream": True,
        "temperature": 0.2,
    }
    url = f"{cluster.url}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=30) as client, client.stream("POST", url, json=body) as stream:
        async for line in stream.aiter_lines():
            if "content" in line:
                break
    began = time.monotonic()
    while time.monotonic() < began + 5:
        if {name for shard in await router.shards() for name in shard["cancelled"]} - before:
            break
        await asyncio.sleep(0.02)
    else:
        raise AssertionError("the keeper goes on for a client that has gone")
    assert time.monotonic() - began < 2


async def test_closing_a_reply_reaches_the_keeper_at_once(router: Router) -> None:
    key = await one_on(router, "shard-1")
    events = router.chat(chat(key, "closed", length=500, token_s=0.01))
    assert isinstance(await anext(events), TokenEvent)
    await events.aclose()
    assert await cancelled(router, "closed") < 1
    waiting = asyncio.ensure_future(anext(router.chat(chat(key, "unborn", token_s=60))))
    await asyncio.sleep(0.2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await cancelled(router, "unborn") < 1


async def test_a_router_with_an_old_map_corrects_itself(router: Router) -> None:
    key = await one_on(router, "shard-0")
    current = router._routes.map
    assert current is not None
    router._routes.map = type(current)(
        version=current.version, owners=tuple(1 - owner for owner in current.owners), epochs=current.epochs
    )
    assert (await router.describe(key))["shard"] == "shard-0"
    assert router._routes.map == current


async def test_killing_a_shard_loses_nothing_and_disturbs_nobody_else(router: Router) -> None:
    mine, other = await one_on(router, "shard-0"), await one_on(router, "shard-1")
    before = await router.describe(mine)
    stop = asyncio.Event()
    answers: list[Any] = []

    async def others() -> None:
        while not stop.is_set():
            answers.append(await router.describe(other))
            await asyncio.sleep(0.01)

    busy = asyncio.create_task(others())
    outcome = await router.ingest(ingest(mine, "acknowledged"))
    os.kill(before["pid"], signal.SIGKILL)
    began = time.monotonic()
    asked = asyncio.create_task(collect(router.chat(chat(mine, "asked while it was dead"))))
    again = await router.ingest(ingest(mine, "acknowledged"))
    took_s = time.monotonic() - began
    assert again.duplicate
    assert again.memory_version == outcome.memory_version
    after = await router.describe(mine)
    assert after["pid"] != before["pid"]
    assert after["epoch"] > before["epoch"]
    assert took_s < 30, "a machine under load starts a process slowly; this one starts Python and imports"
    assert isinstance((await asked)[-1], DoneEvent)
    stop.set()
    await busy
    assert len(answers) > 3
    assert len({answer["pid"] for answer in answers}) == 1
    shards = {shard["shard"]: shard for shard in await router.shards()}
    assert shards["shard-0"]["restarts"] == 1
    assert shards["shard-1"]["restarts"] == 0


async def test_requests_go_on_without_the_coordinator_and_it_comes_back(router: Router) -> None:
    before = await router.shards()
    key = await one_on(router, "shard-0")
    ray.kill(ray.get_actor(COORDINATOR, namespace=NAMESPACE), no_restart=False)
    for n in range(20):
        assert (await router.ingest(ingest(key, f"without-{n}"))).tokens == 2
    assert (await router.readiness())[0]
    began = time.monotonic()
    while True:
        shards = await router.shards()
        if [shard["state"] for shard in shards] == ["ready", "ready"]:
            break
        assert time.monotonic() < began + 20, shards
        await asyncio.sleep(0.1)
    kept = ("shard", "pid", "epoch", "buckets")
    assert [[shard[name] for name in kept] for shard in shards] == [
        [shard[name] for name in kept] for shard in before
    ], "shards that live are adopted, not started again"


async def test_moves_while_serving_are_refused_with_advice(router: Router) -> None:
    with pytest.raises(BadRequest, match="start it with --shards 3"):
        await router.scale(3)
    assert (await router.scale(2))["map_version"] >= 1
    with pytest.raises(BadRequest, match="cannot be emptied while it runs"):
        await router.drain("shard-1")
    with pytest.raises(BadRequest, match="no shard 'shard-7'"):
        await router.drain("shard-7")


async def test_a_snapshot_has_both_shards(cluster: Running, router: Router, tmp_path: Path) -> None:
    await one_on(router, "shard-0")
    await one_on(router, "shard-1")
    made = await router.snapshot()
    assert {part["shard"] for part in made["parts"]} == {"shard-0", "shard-1"}
    assert [part["model_files"] > 0 for part in made["parts"]] == [True, False], "θ_F once"
    assert made["users"] >= len({record["user"] for record in await router.users("local")})
    report = verify(open_objects(cluster.config.snapshots), made["id"])
    assert report["users"] == made["users"]
    elsewhere = await router.snapshot(f"file://{tmp_path}/elsewhere")
    assert (tmp_path / "elsewhere" / elsewhere["id"] / "manifest.json").is_file()
    async with httpx.AsyncClient(base_url=cluster.url, timeout=30) as client:
        assert (await client.post("/admin/snapshots")).status_code == 200
        assert "titan:snapshot_age_seconds" in (await client.get("/metrics")).text


async def test_another_cluster_on_the_store_ends_our_shard_and_it_stays_down(cluster: Running) -> None:
    """Last in this file: shard-1 does not come back."""
    router = cluster.router(outage_s=3.0)
    mine, other = await one_on(router, "shard-1"), await one_on(router, "shard-0")
    before = await router.describe(mine)
    claim(open_store(cluster.config.store), "shard-1", cluster="another", incarnation="i", take_over=True)
    with pytest.raises(ShardUnavailable, match="shard-1"):
        await router.ingest(ingest(mine, "too late"))
    shards = {shard["shard"]: shard for shard in await router.shards()}
    assert shards["shard-1"]["state"] == "fenced"
    assert "belongs to another cluster" in shards["shard-1"]["error"]
    assert not alive(before["pid"]), "a fenced shard's process ends"
    ready, why = await router.readiness()
    assert not ready
    assert "shard-1" in why
    assert (await router.ingest(ingest(other, "still served"))).tokens == 2
