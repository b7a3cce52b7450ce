"""How this program's processes get memory from the kernel.

A model's steps allocate and free much memory in large pieces. glibc's malloc gives these back to the kernel at once and
gets each again as pages of 4 KiB that fault one by one: a third of a training step went there (docs/log.md). Told to
keep what it has, and to ask for huge pages, it does not. Only the environment that a process starts with can say so.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "GLIBC_TUNABLES"


def _tunables(**values: int) -> str:
    return ":".join(f"glibc.malloc.{name}={value}" for name, value in values.items())


KEPT = _tunables(hugetlb=1, arena_max=1, mmap_max=0, trim_threshold=16 << 30, top_pad=1 << 30)
"""Nothing goes back before the end of a run."""


def keep_memory() -> None:
    """Start this program again with `KEPT`, unless it runs with settings of its own already; elsewhere than on Linux,
    and with another C library, that changes nothing."""
    if sys.platform != "linux" or VARIABLE in os.environ or not sys.executable:
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: KEPT})
