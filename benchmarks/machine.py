"""What a measurement says of where it was made, and the memory of this process."""

import datetime
import importlib.metadata
import os
import platform
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


def held_mib(field: str) -> float:
    """Memory of this process: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: not Linux?")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
