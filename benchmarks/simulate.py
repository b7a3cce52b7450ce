"""Lives of a simulated cluster over the real ownership, journal and store code (tests/simulator); see there.

    python benchmarks/simulate.py --seeds 10000 [--first 0] [--jobs 2] [--variant NAME] [--json FILE]

Prints every seed in which something that must hold did not, with what it was; exit 1 if there is one. To play one seed
alone: `--first SEED --seeds 1`. With `--variant` the product is broken in that way, and a breach is what is wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import report
from tests.simulator.life import Outcome, live
from tests.simulator.variants import VARIANTS

# Thousands of lives warn of their faulty stores; what counts is what they breach.
logging.getLogger().addHandler(logging.NullHandler())


def play(task: tuple[int, str | None]) -> Outcome | str:
    """One seed's outcome, or what went wrong in the simulator itself."""
    seed, variant = task
    with VARIANTS[variant]() if variant else contextlib.nullcontext():
        try:
            return live(seed)
        except Exception as error:
            return f"seed {seed}: {type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--variant", choices=sorted(VARIANTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, failed, acknowledged, unconfirmed = time.monotonic(), list[str](), 0, 0
    tasks = [(seed, options.variant) for seed in range(options.first, options.first + options.seeds)]
    with contextlib.ExitStack() as stack:
        played = map(play, tasks)
        if options.jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs))
            played = pool.imap_unordered(play, tasks, chunksize=8)
        for outcome in played:
            if isinstance(outcome, str):
                failed.append(outcome)
            else:
                acknowledged += outcome.acknowledged
                unconfirmed += outcome.unconfirmed
                if not outcome.breaches:
                    continue
                failed.append(f"seed {outcome.seed}: " + "\n    ".join(outcome.breaches))
            print(failed[-1], file=sys.stderr, flush=True)
    found = {
        "variant": options.variant,
        "seeds": options.seeds,
        "seconds": round(time.monotonic() - started, 1),
        "answers": acknowledged,
        "answers_while_the_store_was_away": unconfirmed,
        "failed": failed,
    }
    report(found, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
