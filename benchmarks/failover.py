"""Kill and freeze shards and nodes under load, and take the time until their users are answered.

    python benchmarks/failover.py [--kills 50] [--losses 5] [--freezes 5] [--seed 0] [--json FILE]

Two shards with the shipped model and the default keeper serve a dozen users through the HTTP door. First one machine:
`titanmem serve`, and one shard's process after the other is ended by SIGKILL. Then a Ray cluster of a head and three
nodes, `durability` sync, a journal folder for each node, the store on a real redis-server: a node with a shard is
killed with all its processes (`--losses`), or frozen (`--freezes`). At that moment one of the shard's users, who has
nothing on its way, asks: what counts is when that user has a good answer. What all others get meanwhile is counted too,
the users of the node's shards and all others apart. In the end every acknowledged update must be known.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from cluster.config import DEFAULT_MODEL_NAME, Config, laptop  # noqa: E402
from cluster.serve import Server as ClusterServer  # noqa: E402
from cluster.serve import Signals, address  # noqa: E402
from tests.cluster.load import Answer, Load, table  # noqa: E402
from tests.cluster.nodes import Nodes, nodes  # noqa: E402
from tests.servers import free_port, redis_server  # noqa: E402
from tests.system.server import Server  # noqa: E402

USERS = 8
PROBES = 6
SHARDS = 2
NODES = 3
SETTLE_TIMEOUT_S = 120.0
SPARES = "titan:spare_processes"

Fault = Callable[[dict[str, Any]], Awaitable[tuple[float, Callable[[], object]]]]
"""Does it to the shard of that record: when it was done, and what brings the cluster back to what it was."""


async def settled(load: Load, spares: int) -> float:
    """Waits until all shards serve and processes stand ready for the next fault; seconds that took."""
    began = time.monotonic()
    while time.monotonic() < began + SETTLE_TIMEOUT_S:
        ready = (await load.get("/readyz")).status_code == 200
        text = (await load.get("/metrics")).text if ready else ""
        figures = [line.split() for line in text.splitlines() if line.startswith(SPARES)]
        if ready and (not figures or float(figures[0][-1]) >= spares):
            return time.monotonic() - began
        await asyncio.sleep(0.1)
    raise TimeoutError(f"the cluster has not settled within {SETTLE_TIMEOUT_S:g} s")


async def drill(url: str, plan: Sequence[tuple[str, Fault]], seed: int, spares: int) -> dict[str, Any]:
    """One fault after the other, each when the cluster has settled; tables by the fault's name."""
    rng = random.Random(seed)
    load = Load(url=url, model=DEFAULT_MODEL_NAME, seed=seed)
    names = [f"user{n}" for n in range(USERS)]
    at = await load.users_by_shard([*names, *(f"probe{n}" for n in range(PROBES))])
    probes = {shard: [u for u in users if u.startswith("probe")] for shard, users in at.items()}
    assert len(at) == SHARDS, "each shard has users"
    calm = [(await load.chat(users[0], "undisturbed")).seconds for users in probes.values() for _ in range(5)]
    load.start(names)
    outages: list[tuple[str, float, float]] = []
    took: dict[str, list[float]] = {}
    settle: list[float] = []
    for name, fault in plan:
        settle.append(await settled(load, spares))
        await asyncio.sleep(rng.uniform(0.5, 2.0))
        shard = rng.choice(sorted(probes))
        records = (await load.get("/admin/shards")).json()["shards"]
        record = next(record for record in records if record["shard"] == shard)
        # A node takes all of its shards with it, a process its own.
        node = record["node"] if name.startswith("node") else None
        beside = [r["shard"] for r in records if r is not record and r["node"] == node]
        began, undo = await fault(record)
        ended = await load.until_answered(rng.choice(probes[shard]))
        undo()  # Ray sets signals in it, so in the main thread
        outages.append((shard, began, ended))
        for other in beside:
            outages.append((other, began, await load.until_answered(rng.choice(probes[other]))))
        took.setdefault(name, []).append(ended - began)
        print(f"{name}, {' and '.join([shard, *beside])}: {ended - began:.2f} s", file=sys.stderr, flush=True)
    await settled(load, spares)
    await load.stop()
    own, others = load.errors_during(outages, at)
    asked = [a for a in load.answers if a.kind in ("chat", "ingest")]
    lost = await load.lost()
    await load.close()
    return {
        "next_good_answer": {name: table(values) for name, values in took.items()},
        "same_request_undisturbed": table(calm),
        "settled_again": table(settle[1:]),
        "requests": len(asked),
        "requests_through_it_all": table([a.seconds for a in asked if not a.error]),
        "slowest_of_them": slowest([a for a in asked if not a.error], outages, at),
        "errors_of_the_shards_own_users": own,
        "errors_of_other_users": others,
        "acknowledged_updates": sum(map(len, load.acknowledged.values())),
        "lost_updates": len(lost),
    }


def slowest(
    answers: list[Answer], outages: list[tuple[str, float, float]], users: dict[str, list[str]]
) -> list[str]:
    """The five that waited longest, and how long after the last fault before they were answered each was asked."""
    lines = []
    for answer in sorted(answers, key=lambda answer: -answer.seconds)[:5]:
        before = [(began, shard) for shard, began, _ in outages if began < answer.ended]
        began, shard = max(before, default=(answer.began, "none"))
        whose = "its own shard" if answer.user in users.get(shard, ()) else "the other shard"
        lines.append(
            f"{answer.kind} of {answer.user}: {answer.seconds:.1f} s, asked {answer.began - began:+.1f} s after "
            f"the fault of {whose}"
        )
    return lines


async def kill_process(shard: dict[str, Any]) -> tuple[float, Callable[[], None]]:
    os.kill(shard["pid"], signal.SIGKILL)
    return time.monotonic(), lambda: None


def on_one_machine(kills: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="titanmem-failover-") as folder:
        server = Server(Path(folder), shards=SHARDS, PYTHONPATH=str(ROOT))
        try:
            ready_s = server.start()
            plan = [("shard's process killed", kill_process)] * kills
            return {"ready_s": round(ready_s, 1), **asyncio.run(drill(server.url, plan, seed, spares=1))}
        except BaseException:
            print(server.said(), file=sys.stderr)
            raise
        finally:
            server.close()


def on_several_nodes(losses: int, freezes: int, seed: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="titanmem-failover-") as folder,
        redis_server(Path(folder)) as redis,
    ):
        config = laptop(
            port=free_port(), shards=SHARDS, durability="sync", snapshot_interval_s=0, ray_address="to be known",
            store=redis.url("memories"), journal_dir=f"{folder}/journal", snapshots=f"file://{folder}/snapshots",
            keeper="tests.cluster.drill_keeper:open_keeper",
        )  # fmt: skip
        with nodes(config, Path(folder), NODES) as cluster, Signals() as signals:
            config = Config(**{**config.to_dict(), "ray_address": cluster.address})
            server = ClusterServer(config, lambda _: None, signals)
            ray.shutdown()  # `nodes` has connected; the server does so itself
            try:
                server.start()
                plan = [("node killed", loss_of(cluster))] * losses + [
                    ("node frozen", freeze_of(cluster))
                ] * freezes
                return asyncio.run(drill(address(config), plan, seed, spares=NODES))
            finally:
                server.stop()


def loss_of(cluster: Nodes) -> Fault:
    async def lose(shard: dict[str, Any]) -> tuple[float, Callable[[], object]]:
        number = cluster.of(shard["node"])
        cluster.kill(number)
        return time.monotonic(), lambda: cluster.renew(number)

    return lose


def freeze_of(cluster: Nodes) -> Fault:
    async def freeze(shard: dict[str, Any]) -> tuple[float, Callable[[], None]]:
        number = cluster.of(shard["node"])
        pids = cluster.freeze_whole(number)
        began = time.monotonic()

        def undo() -> None:
            cluster.thaw(number, raylet=True, pids=pids)
            time.sleep(1.0)
            cluster.renew(number)

        return began, undo

    return freeze


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--losses", type=int, default=5)
    parser.add_argument("--freezes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    if options.kills:
        found["one machine"] = on_one_machine(options.kills, options.seed)
    if options.losses or options.freezes:
        found["several nodes"] = on_several_nodes(options.losses, options.freezes, options.seed)
    report(found, options.json)
    bad = [part for part in found.values() if part["errors_of_other_users"] or part["lost_updates"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
