"""The cores of this host."""

import os


def cores() -> int:
    """Those that this process may use, which need not be all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
