"""What a measurement says of where it was made, and the memory of this process."""

import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def signed(command: str, load: Sequence[float], *packages: str) -> dict[str, Any]:
    """The end of a report. load: `os.getloadavg()` before the start."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "load_before": [round(x, 1) for x in load],
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores others keep busy, while this process sleeps for so long. `os.getloadavg` is of
    the last minute, and counts who waits for a disk, too."""

    def busy() -> float:
        cores = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        user, nice, system, _, _, *rest = map(int, cores[:8])  # but idle, and waiting for a disk
        return sum((user, nice, system, *rest)) / os.sysconf("SC_CLK_TCK")

    before, start = busy(), time.perf_counter()
    time.sleep(seconds)
    return (busy() - before) / (time.perf_counter() - start)


def held_mib(field: str) -> float:
    """Memory of this process: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: not Linux?")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
