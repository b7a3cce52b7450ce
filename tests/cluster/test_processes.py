"""Which process becomes a shard, with handles that need no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from cluster import processes as module
from cluster.processes import Process, Processes


class Method:
    """`handle.method.remote(...)`: can be awaited, and gives the answer or raises it."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def remote(self, *_: Any) -> Method:
        return self

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Handle:
    def __init__(self, node: str, dead: bool = False) -> None:
        self.node = node
        self.ping = Method(ActorDiedError() if dead else {"state": "spare"})
        self.warm = Method()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Nodes that there are; actors that were made and killed."""
    known: dict[str, list[Any]] = {"nodes": ["a", "b"], "made": [], "killed": []}

    def new(*, num_gpus: int, node: str = "") -> Process:
        process = Process(f"process-{len(known['made'])}", Handle(node), node)
        known["made"].append((num_gpus, node))
        return process

    monkeypatch.setattr(module, "_new", new)
    monkeypatch.setattr(module, "_nodes", lambda: known["nodes"])
    monkeypatch.setattr(module, "kill", lambda handle: known["killed"].append(handle.node))
    monkeypatch.setattr(module, "REFILL_INTERVAL_S", 0.0)
    return known


async def filled(
    *, anywhere: bool, spares: int = 1, shards_on: Callable[[str], int] = lambda node: 0
) -> Processes:
    processes = Processes("keeper:open", "model", spares=spares, anywhere=anywhere, shards_on=shards_on)
    task = asyncio.create_task(processes.keep(lambda: True))
    await asyncio.sleep(0.1)
    task.cancel()
    return processes


async def test_each_node_has_its_spares_and_they_hold_no_gpu(world: dict[str, list[Any]]) -> None:
    processes = await filled(anywhere=True, spares=2)
    assert processes.spares == 4
    assert world["made"] == [(0, "a"), (0, "a"), (0, "b"), (0, "b")]
    processes.end()
    assert sorted(world["killed"]) == ["a", "a", "b", "b"]


async def test_no_spares_when_none_are_wanted_or_something_is_more_urgent(
    world: dict[str, list[Any]],
) -> None:
    assert (await filled(anywhere=True, spares=0)).spares == 0
    processes = Processes("keeper:open", "model", spares=1, anywhere=True)
    task = asyncio.create_task(processes.keep(lambda: False))
    await asyncio.sleep(0.05)
    task.cancel()
    assert world["made"] == []


async def test_the_spare_on_the_same_node_comes_first(world: dict[str, list[Any]]) -> None:
    processes = await filled(anywhere=True)
    assert (await processes.take("b")).node == "b"
    assert (await processes.take("b")).node == "a", "the journal's content is in the store"
    assert (await processes.take("b")).node == ""
    assert world["made"][-1] == (1, ""), "a new process takes a GPU"


async def test_elsewhere_means_where_the_fewest_shards_are(world: dict[str, list[Any]]) -> None:
    world["nodes"] = ["a", "b", "c"]
    processes = await filled(anywhere=True, shards_on={"a": 1, "b": 0, "c": 2}.__getitem__)
    taken = [(await processes.take("lost")).node for _ in range(3)]
    assert taken == ["b", "a", "c"]


async def test_a_journal_that_only_its_node_has_keeps_the_shard_there(world: dict[str, list[Any]]) -> None:
    processes = await filled(anywhere=False)
    assert (await processes.take("b")).node == "b"
    assert (await processes.take("b")).node == ""
    assert processes.spares == 1


async def test_the_first_start_leaves_the_spares_alone(world: dict[str, list[Any]]) -> None:
    processes = await filled(anywhere=True)
    assert (await processes.take()).node == ""
    assert processes.spares == 2


async def test_a_spare_that_is_dead_is_passed_over_and_replaced(world: dict[str, list[Any]]) -> None:
    processes = await filled(anywhere=True)
    processes._spares[0] = Process("process-x", Handle("a", dead=True), "a")
    assert (await processes.take("a")).node == "b"
    assert world["killed"] == ["a"]
    processes._spares.append(Process("process-y", Handle("a", dead=True), "a"))
    task = asyncio.create_task(processes.keep(lambda: True))
    await asyncio.sleep(0.1)
    task.cancel()
    assert sorted(spare.node for spare in processes._spares) == ["a", "b"]
    assert world["killed"] == ["a", "a"]
