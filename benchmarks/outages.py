"""Kill the Redis that a server stores its memories in, again and again, while users talk and read.

    python benchmarks/outages.py [--outages 10] [--away 10] [--users 8] [--seed 0] [--durability local] [--json FILE]

The whole server (`titanmem serve`, the model that ships) runs on a real redis-server, which is killed with -9 at a
random moment, stays away for a random time of at most `--away` seconds and half of that at least, and is started again
on its files. Counted are the answers and the errors that users see, how long they wait with the store there and without
it, how long it takes until the server says that all is well, and what `/readyz` and the log say. In the end every token
that was acknowledged must have been seen once, by this server and by another one on the same Redis without the first
one's journals. Under `sync` errors are part of the promise; else there may be none.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from tests.servers import redis_server  # noqa: E402
from tests.system.load import Load, all_stored, memory, readiness, until  # noqa: E402
from tests.system.server import Server  # noqa: E402

CALM_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outages", type=int, default=10)
    parser.add_argument("--away", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--durability", choices=("local", "replicated", "sync"), default="local")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="titanmem-outages-") as folder:
        found = run(Path(folder), options)
    report(found, options.json)
    if found["faults"]:
        print(f"seed {options.seed}: {'; '.join(found['faults'])}", file=sys.stderr)
    return 1 if found["faults"] else 0


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures, and in `faults` what was promised and not kept."""
    rng, users = random.Random(options.seed), [f"u{number}" for number in range(options.users)]
    env: dict[str, Any] = {
        "TITANMEM_IDLE_FLUSH_S": "1",
        "TITANMEM_PERSIST_TOKENS": "256",
        "TITANMEM_DURABILITY": options.durability,
    }
    env |= {"TITANMEM_SYNC_TIMEOUT_S": "5", "TITANMEM_CONSOLIDATE_AFTER_S": "0"}
    for name in ("redis", "one", "two"):
        (folder / name).mkdir()
    away: list[tuple[float, float]] = []
    recovered_s: list[float] = []
    log: list[str] = []
    silent = 0
    with redis_server(folder / "redis") as redis:
        one = Server(folder / "one", store=redis.url("memories"), **env)
        two = Server(folder / "two", store=redis.url("memories"), **env)
        try:
            one.start()
            with Load(one.url, users) as load:
                for number in range(options.outages):
                    time.sleep(CALM_S + rng.uniform(0, CALM_S))
                    redis.kill()
                    began = time.monotonic()
                    time.sleep(options.away * rng.uniform(0.5, 1.0))
                    silent += "reason" not in readiness(one)
                    redis.start()
                    away.append((began, time.monotonic()))
                    until(lambda: "reason" not in readiness(one))
                    recovered_s.append(time.monotonic() - away[-1][1])
                    print(f"outage {number + 1}: {len(load.waits)} answers", file=sys.stderr, flush=True)
            until(lambda: all_stored(one, users))
            seen = {user: memory(one, user)["tokens_seen"] for user in users}
            log = one.logged()
            one.kill()
            two.start()
            hopped = {user: memory(two, user)["tokens_seen"] for user in users}
        finally:
            one.close()
            two.close()
    lost = sum(max(0, load.tokens[user] - min(seen[user], hopped[user])) for user in users)
    doubled = 0 if options.durability == "sync" else sum(max(0, seen[u] - load.tokens[u]) for u in users)
    lines = [line for line in log if "redis" in line]
    during = [s for at, s in load.waits if any(start <= at < end for start, end in away)]
    calm = [s for at, s in load.waits if not any(start - 1 <= at + s and at < end + 1 for start, end in away)]
    faults = [
        f"{what}: {count}"
        for what, count in (
            ("lost tokens", lost),
            ("doubled tokens", doubled),
            ("errors seen by users", 0 if options.durability == "sync" else len(load.problems)),
            ("outages that /readyz was silent about", silent),
            ("lines of the log more than two an outage", max(0, len(lines) - 2 * options.outages)),
            ("tokens that another host did not know", sum(seen[user] - hopped[user] for user in users)),
        )
        if count
    ]
    return {
        "outages": options.outages, "away_s": round(sum(end - start for start, end in away), 1),
        "answers": len(load.waits), "answers_while_away": len(during), "errors": len(load.problems),
        "acknowledged_tokens": sum(load.tokens.values()), "lost_tokens": lost, "doubled_tokens": doubled,
        "wait_s": quantiles(calm), "wait_while_away_s": quantiles(during), "all_well_after_s": quantiles(recovered_s),
        "log_lines": len(lines), "problems": load.problems[:5], "faults": faults,
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the largest, in seconds; empty for nothing."""
    if len(values) < 2:
        return {"p50": round(values[0], 3)} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
