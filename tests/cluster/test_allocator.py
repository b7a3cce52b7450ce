"""A training run starts again with an allocator that keeps memory: once, with all it was told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.allocator import KEPT, VARIABLE

SCRIPT = f"""
import os, sys
print("start", flush=True)
from cluster.allocator import keep_memory
keep_memory()
print(os.environ["{VARIABLE}"], sys.argv[1:])
"""


def lines(tmp_path: Path, *args: str, **environment: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, "utf-8")
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(script), *args],
        env={**clean, "PYTHONPATH": root, **environment},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.splitlines()  # fmt: skip


def test_the_program_starts_again_once_with_what_it_was_told(tmp_path: Path) -> None:
    assert lines(tmp_path, "train", "--data", "a b") == [
        "start",
        "start",
        f"{KEPT} ['train', '--data', 'a b']",
    ]


def test_settings_of_ones_own_stay(tmp_path: Path) -> None:
    own = "glibc.malloc.arena_max=3"
    assert lines(tmp_path, "train", **{VARIABLE: own}) == ["start", f"{own} ['train']"]
