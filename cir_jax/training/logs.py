"""Metrics of a run: JSON lines and TensorBoard (without TensorFlow), whole after a resume.

In a bucket they are as they were at the last checkpoint (`storage.growing`). A disk that is full
does not stop training: lines wait in memory until there is room, while the checkpoints decide
whether the run can go on.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from cir_jax.storage import faults
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import place
from cir_jax.storage.growing import Growing

FLUSH_SECONDS = 60.0


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard files in one directory.

    start: the step the run (re)starts from; later lines of a killed run are dropped, so the log of
    a resumed run equals that of an unbroken one. Lines that are no records are moved to
    `metrics.jsonl.unreadable`, with a warning. Raises DataError when the log cannot be read or
    begun.
    """

    def __init__(self, directory: Path, start: int):
        name = "metrics.jsonl"
        try:
            self._files = Growing(directory, (name, f"{name}.unreadable"))
        except OSError as error:
            raise _unreadable(directory / name, error) from error
        self._path = self._files.local / name
        content = _content(self._path)
        records, others = _split(content)
        kept = b"".join(line + b"\n" for line, row in records if row["step"] <= start)
        cut = content.rpartition(b"\n")[2]  # by a kill in the middle of a write
        if others := [line for line in others if line != cut]:
            _move_aside(self._path, others, len(records))
        if kept != content or not content:
            write_atomically(self._path, lambda file: file.write(kept))
        self._size, self._waiting, self._warned = len(kept), b"", False
        self._board = _Board(self._files.local / "tensorboard", purge_step=start + 1)
        self.upload()

    def write(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """metrics are reproducible numbers; speed is what depends on the machine."""
        self._waiting += json.dumps({"step": step, **metrics, "speed": speed}).encode() + b"\n"
        self._append()
        self._board.write(step, metrics | speed)

    def upload(self) -> None:
        """To the bucket, if that is where the log lies: before each checkpoint, so that a log has
        all that its checkpoints have."""
        self._board.flush()
        self._files.upload()

    def close(self) -> None:
        if self._waiting:
            self._append()
        if self._waiting:
            count = self._waiting.count(b"\n")
            logging.error("%s: there was no room for the last %d line(s).", self._path, count)
        self._board.close()
        self._files.close()

    def _append(self) -> None:
        """Writes what waits, whole lines or nothing."""
        try:
            with self._path.open("r+b") as file:
                file.truncate(self._size)  # what an attempt that failed may have left
                file.seek(self._size)
                file.write(self._waiting)
        except OSError as error:
            with contextlib.suppress(OSError):
                with self._path.open("r+b") as file:
                    file.truncate(self._size)
            if not self._warned:
                reason = faults.cause(error)
                logging.warning("%s: cannot be written (%s): lines wait.", self._path, reason)
            self._warned = True
            return
        self._size, self._waiting, self._warned = self._size + len(self._waiting), b"", False


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX would import PyTorch for an annotation, and every start wait for it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules["torch"]


class _Board:
    """TensorBoard's file, written in this thread: tensorboardX's own one would die of a full disk.

    The queue before it would then stop the training. Ends, with a warning, where it cannot be
    written on: all its numbers are in `metrics.jsonl`.
    """

    def __init__(self, directory: Path, purge_step: int):
        self._directory, self._writer, self._flushed = directory, None, 0.0
        with self._ends_on_errors():
            directory.mkdir(parents=True, exist_ok=True)
            with _without_torch():
                from tensorboardX import summary
                from tensorboardX.event_file_writer import EventsWriter
                from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._event, self._scalar = Event, summary.scalar
            self._writer = EventsWriter(str(directory / "events"))
            started = SessionLog(status=SessionLog.START)
            self._add(Event(step=purge_step, file_version="brain.Event:2"))
            self._add(Event(step=purge_step, session_log=started))

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._writer:
            return
        with self._ends_on_errors():
            for name, value in values.items():
                self._add(self._event(step=step, summary=self._scalar(name, value)))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        with self._ends_on_errors():
            if self._writer:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with self._ends_on_errors():
            if self._writer:
                self._writer.close()

    def _add(self, event: Any) -> None:
        if self._writer:
            event.wall_time = time.time()
            self._writer.write_event(event)

    @contextlib.contextmanager
    def _ends_on_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            reason = faults.cause(error)
            logging.warning("%s: not written on (%s).", self._directory, reason)
            if self._writer:
                with contextlib.suppress(OSError):  # it tries to write once more
                    self._writer.close()
            self._writer = None


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; lines that are no records are passed over."""
    return [row for _, row in _split(_content(place(path)))[0]]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}). Nothing was changed.")


def _split(content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """Records with their lines, and the lines that are none."""
    records, others = [], []
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # cut, damaged or not UTF-8
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            records.append((line, row))
        elif line.strip():
            others.append(line)
    return records, others


def _move_aside(path: Path, lines: list[bytes], good: int) -> None:
    aside = path.with_name(f"{path.name}.unreadable")
    before = _content(aside)
    content = before + b"".join(line + b"\n" for line in lines if line not in before.split(b"\n"))
    write_atomically(aside, lambda file: file.write(content))
    logging.warning(
        "%s: %d damaged line(s) are no records and were moved to %s; %d others are kept.",
        path, len(lines), aside.name, good,
    )  # fmt: skip
