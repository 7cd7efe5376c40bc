"""Metrics of a run: JSON lines and TensorBoard (without TensorFlow), whole after a resume."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard files in one directory.

    start: the step the run (re)starts from; later lines of a killed run are dropped, so the log of
    a resumed run equals that of an unbroken one.
    """

    def __init__(self, directory: Path, start: int):
        from tensorboardX import SummaryWriter  # slow to import: it takes PyTorch along

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """metrics are reproducible numbers; speed is what depends on the machine."""
        self._file.write(json.dumps({"step": step, **metrics, "speed": speed}) + "\n")
        self._file.flush()
        for name, value in (metrics | speed).items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    good = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue  # cut by a kill in the middle of a write
        good.append(line)
    return good


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`."""
    return [json.loads(line) for line in _lines(Path(path))]
