"""Damage at rest, counted: each kind of file is cut at every byte and has bits flipped at random, then is read.

    python benchmarks/damage.py --flips 5000 --seed 1

A wounded file must be refused by an error of `storage.errors`, or read back right in every bit; anything else is a
wrong read, and the exit status is 1. "Shorter" is what a crash leaves as well, and no reader can tell: a journal's WAL
that ends with an earlier group, or whose last group is not whole. The tests run the same campaign with fewer wounds
(tests/storage/test_damage.py).
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import report
from tests.storage.damage_samples import SAMPLES
from tests.storage.wounds import cuts_of, flips_of, suffer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=5000, help="flipped bits a kind of file")
    parser.add_argument("--cuts", type=int, default=20_000, help="most cuts a kind of file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    wounds: dict[str, Callable[[bytes, random.Random], Iterator[tuple[str, bytes]]]] = {
        "flip": lambda data, dice: flips_of(data, options.flips, dice),
        "cut": lambda data, dice: cuts_of(data, options.cuts, dice),
    }
    failed, rows = False, list[dict[str, object]]()
    with tempfile.TemporaryDirectory() as scratch:
        for make in SAMPLES:
            if options.only not in make.__name__:
                continue
            folder = Path(scratch) / make.__name__
            folder.mkdir()
            sample = make(folder)
            for kind, wound in wounds.items():
                started = time.perf_counter()
                tracemalloc.start()
                tally = suffer(sample, wound(sample.data, random.Random(options.seed)), folder)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                errors = ", ".join(f"{name} {count}" for name, count in tally.refused.most_common())
                print(
                    f"{sample.name:<22} {len(sample.data):>8} bytes  {kind:<5} {tally.total:>6}  "
                    f"refused {sum(tally.refused.values()):>6}  right {tally.right:>5}  "
                    f"shorter {tally.shorter:>4}  wrong {len(tally.wrong):>3}  "
                    f"peak {peak / 2**20:.1f} MiB  {time.perf_counter() - started:.0f} s  ({errors})",
                    flush=True,
                )
                for line in tally.wrong[:5]:
                    print(f"    {line}", flush=True)
                failed |= bool(tally.wrong)
                rows.append({
                    "file": sample.name, "bytes": len(sample.data), "wound": kind, "wounded": tally.total,
                    "refused": dict(tally.refused), "right": tally.right, "shorter": tally.shorter,
                    "wrong": len(tally.wrong), "peak_mib": round(peak / 2**20, 1),
                })  # fmt: skip
    if options.json:
        asked = {"flips": options.flips, "cuts": options.cuts, "seed": options.seed}
        report({"asked": asked, "files": rows}, options.json)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
