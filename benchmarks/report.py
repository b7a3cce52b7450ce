"""What a benchmark found, with its command, date and machine: printed, and kept in a file for `benchmarks/results/`."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.memory_bench import hardware


def report(found: Mapping[str, Any], file: Path | None) -> None:
    """Prints one JSON document, and writes it to `file` when there is one. The load is the one of the last minute."""
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{hardware()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        **found,
    }
    text = json.dumps(document, indent=1)
    if file is not None:
        file.write_text(text + "\n", "utf-8")
    print(text)
