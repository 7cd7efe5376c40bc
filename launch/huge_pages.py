"""Memory in huge pages, where the C library gives them to those who ask.

On a CPU XLA asks for the arrays of a step anew in each step, and pages of 4 KiB take long to map
and to clear (benchmarks/README.md). glibc reads its settings when a program starts, so it starts
once more.
"""

import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def apply() -> None:
    """Does not return if this process starts again. Call it before anything is read or opened.

    Whoever sets the variable decides: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 leaves all as it is.
    """
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or not _on_request():
        return
    if not sys.executable or sys.argv[0] not in sys.orig_argv or sys.gettrace():
        return  # in a notebook, a fork, a debugger: the process is not ours to start again
    os.environ[VARIABLE] = ":".join(filter(None, [given, f"{TUNABLE}=1"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
    """Whether the kernel has huge pages for those who ask, and the C library knows how to."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return (
            name == "glibc"
            and tuple(map(int, version.split("."))) >= (2, 35)
            and "[madvise]" in KERNEL.read_text()
        )
    except (OSError, ValueError):  # another system, another C library
        return False
