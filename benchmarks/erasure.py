"""Kill an erasure at every step, ask again, and search every file for what the user left.

    python benchmarks/erasure.py [--seed 0] [--every 1] [--fault NAME] [--json FILE]

A user is told things, stored, backed up and forgotten, beside a neighbour and another tenant's user of the same name.
The process is ended by SIGKILL before each step of the erasure that changes a disk (tests/actors/erasure_drill.py). The
next start meets the user, or is asked again. Then no file of store and journal holds token ids, θ_M, reservoir or the
name, but for the tombstone; the others' memories are bit-equal; and a restore into an empty store leaves the user out.
`--fault` plants one of tests/actors/erasure_drill.py: that must be caught.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.report import report  # noqa: E402
from tests.actors.erasure_drill import FAULTS, Drill  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--fault", choices=sorted(FAULTS), default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="titanmem-erasure-") as folder:
        drill = Drill(folder=Path(folder), seed=options.seed, every=options.every, fault=options.fault)
        found = drill.run(say=lambda line: print(line, file=sys.stderr, flush=True))
    report(found, options.json)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
