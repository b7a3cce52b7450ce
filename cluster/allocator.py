"""How memory is got from the kernel while a model trains on a CPU.

A training step allocates and frees some gigabytes of tensors. glibc's malloc gives the large ones back to the kernel
at once and gets each again as pages of 4 KiB that fault one by one, which took a third of a step (docs/log.md). Told to
keep what it has, in one arena and in huge pages, it does not. Only the environment that a process starts with can say
so.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
KEPT = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "arena_max": 1,
        "mmap_max": 0,
        "trim_threshold": 16 << 30,
        "top_pad": 1 << 30,
    }.items()
)


def keep_memory() -> None:
    """Start this program again with `KEPT`, unless it runs with settings of its own already; elsewhere than on Linux,
    and with another C library, that changes nothing."""
    if sys.platform != "linux" or VARIABLE in os.environ or not sys.executable:
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: KEPT})
