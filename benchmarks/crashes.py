"""Kill a shard's process again and again, and compare what its users' memories are with an undisturbed process's.

    python benchmarks/crashes.py [--kills 500] [--updates 50000] [--seed 0] [--json FILE] [--fault NAME]

Each life of the process opens the same journals and store, serves a dozen users, and is ended by SIGKILL at one of the
points of tests/actors/crash_points.py, each at least once. Whatever was not acknowledged is submitted again, and some
of what was. In the end no update may be lost or written twice, and each memory must be bit-equal to a fold of the same
updates by a process that nobody disturbed. `--fault` plants one of tests/actors/crash_faults.py: that must be caught.
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
from tests.actors.crash_faults import FAULTS  # noqa: E402
from tests.actors.crash_run import Faulty, Run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--updates", type=int, default=50000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fault", choices=sorted(FAULTS), default="")
    options = parser.parse_args()
    asked = {"kills": options.kills, "updates": options.updates, "seed": options.seed, "fault": options.fault}
    with tempfile.TemporaryDirectory(prefix="titanmem-crashes-") as folder:
        run = Run(folder=Path(folder), **asked)
        try:
            found = run.live_through(say=lambda line: print(line, file=sys.stderr, flush=True))
            faults = [name for name in found if "unequal" in name or name in ("lost", "doubled")]
            faults = [f"{name}: {found[name]}" for name in faults if found[name]]
        except Faulty as error:
            found, faults = run.report(), [str(error)]
    document = {
        "asked": asked,
        **found,
        "faults": faults,
    }
    report(document, options.json)
    if faults:
        print(f"seed {options.seed}: {'; '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
