"""Freeze shards, raylets and both, again and again under load, and compare what is left with what was acknowledged.

    python benchmarks/freezes.py [--rounds 5] [--users 24] [--durability sync] [--seed 0] [--json FILE] [--fault NAME]

A Ray cluster of a head and three nodes, two shards with a tiny model, journals in a folder of each node. A round
freezes the process of a shard, the raylet of its node, and both, each until a successor serves and a second more, and
each once more for half a second only. With `--fault no_epoch_check` shards do not look at their ownership record any
more: that must be caught.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from actors.options import DURABILITIES  # noqa: E402
from benchmarks.report import report  # noqa: E402
from tests.cluster.freezes import LATE_S, Drill, drill_config  # noqa: E402
from tests.cluster.nodes import nodes  # noqa: E402
from tests.tiny_model import tiny_folder  # noqa: E402

NODES, SHARDS = 3, 2
BRIEF_S = 0.5
KINDS = ("worker", "raylet", "both")


async def drill(drill: Drill, rounds: int, folder: Path) -> dict[str, Any]:
    await drill.start()
    for number in range(rounds):
        for what in KINDS:
            for hold_s in (None, BRIEF_S):
                found = await drill.freeze(what, hold_s=hold_s)
                print(f"round {number + 1}: {found}", file=sys.stderr, flush=True)
    return await drill.report(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--durability", choices=[d for d in DURABILITIES if d != "local"], default="sync")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=["no_epoch_check"], default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="titanmem-freezes-") as name:
        folder = Path(name)
        config = drill_config(
            folder, tiny_folder(folder / "model"), shards=SHARDS, durability=options.durability
        )
        with nodes(config, folder, NODES, fault=options.fault) as cluster:
            life = Drill(config=config, nodes=cluster, users=options.users, seed=options.seed)
            found = asyncio.run(drill(life, options.rounds, folder))
    # With `replicated` a lost node costs what was acknowledged shortly before, and nothing else.
    young_s = config.replicate_interval_s + LATE_S if options.durability == "replicated" else 0.0
    old = [entry for entry in found["lost"] if entry[2] > young_s]
    faults = {"old_epoch": found["old_epoch"], "lost": old, "unequal": found["unequal"]}
    faults["doubled"] = found["doubled"]
    document = {
        **found,
        "faults": {name: value for name, value in faults.items() if value},
    }
    report(document, options.json)
    return 1 if document["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
