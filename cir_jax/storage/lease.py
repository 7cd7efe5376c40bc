"""A lock for a bucket, where the kernel keeps none: a lease that its holder renews.

`<directory>/.lease/` holds one small object per holder, numbered; the highest number holds the
lease. An object store makes an object for one of those who ask at once, so there is one holder of a
number; a lower number than the highest has lost. Who comes later watches the object instead of
comparing clocks: if it changes, the holder lives; if it does not for `SILENCE` seconds, or if it is
of a process of this machine that is no more, the next number may be taken.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cir_jax.errors import CheckpointError
from cir_jax.storage.buckets import client, os_errors

FOLDER = ".lease"
BEAT = 5.0
"""Seconds between renewals."""
SILENCE = 60.0
"""Seconds without one, after which the holder counts as dead."""

_held: dict[str, "_Lease"] = {}


class Taken(Exception):
    """Somebody else holds it; str() says who."""


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Holds the lease of a directory in a bucket. Raises Taken; OSError, whatever the client."""
    lease = _Lease(directory)
    with os_errors(directory):
        taken = lease.take()
    if taken:
        raise Taken(taken)
    thread = threading.Thread(target=lease.renew_until_left, daemon=True)
    thread.start()
    _held[os.fspath(directory)] = lease
    try:
        yield
    finally:
        del _held[os.fspath(directory)]
        lease.leaving.set()
        thread.join()
        lease.give_back()


def check(path: Path) -> None:
    """Before writing to `path`: CheckpointError if a lease over it was held here, and is lost."""
    for directory, lease in _held.items():
        if os.fspath(path).startswith(f"{directory}/"):
            lease.check()


class _Lease:
    def __init__(self, directory: Path):
        self._directory = directory
        self._files, self._folder = client(directory / FOLDER)
        self._number, self._beat = 0, 0
        self._entry: dict[str, Any] = {"owner": uuid.uuid4().hex} | _this_process()
        self._renewed, self._lost_to = 0.0, ""
        self.leaving = threading.Event()

    def take(self) -> str:
        """Waits until the holder is known to live, then says who it is, or to be dead; then ""."""
        while True:
            highest = max(self._numbers(), default=0)
            entry = self._read(highest)
            if entry is not None and not entry.get("left") and not self._silent(highest, entry):
                return _who(entry)
            self._number = highest + 1
            if not self._create():
                continue  # somebody was faster
            if max(self._numbers()) == self._number:
                break
        for number in self._numbers():
            if number < self._number:
                self._remove(number)
        return ""

    def renew_until_left(self) -> None:
        while not self.leaving.wait(BEAT):
            try:
                self._beat += 1
                if (highest := max(self._numbers(), default=0)) > self._number:
                    self._lost_to = _who(self._read(highest) or {})
                    return
                self._write({})
                self._renewed = time.monotonic()
            except Exception as error:  # each client has types of its own; the next beat may do
                logging.warning("%s: the lease was not renewed (%s).", self._directory, error)

    def check(self) -> None:
        if self._lost_to:
            raise CheckpointError(
                f"{self._directory}: another run is at work there now ({self._lost_to}): this one "
                f"was not heard of for {SILENCE:g} s and has lost its lease. Stopped; nothing was "
                "written since."
            )
        if (silent := time.monotonic() - self._renewed) > SILENCE:
            raise CheckpointError(
                f"{self._directory}: the lease could not be renewed for {silent:.0f} s, so another "
                "run may have taken it. Stopped; look after the bucket, then run the same command "
                "again."
            )

    def give_back(self) -> None:
        if self._lost_to:
            return
        try:
            self._write({"left": True})
        except Exception as error:  # the next one waits until it counts as dead
            logging.warning("%s: the lease was not given back (%s).", self._directory, error)

    def _silent(self, number: int, entry: dict[str, Any]) -> bool:
        """Whether the holder is dead: watches until it is renewed, or was not for long enough."""
        if _has_ended(entry):
            return True
        logging.warning("%s: waiting whether %s is alive.", self._directory, _who(entry))
        began = time.monotonic()
        while time.monotonic() - began < SILENCE:
            time.sleep(BEAT / 5)
            now = self._read(number)
            if now is None or now.get("left"):
                return True  # numbers are looked at again before one is taken
            if now != entry:
                return False
        return True

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _numbers(self) -> list[int]:
        self._files.invalidate_cache()
        stems = (
            name.rpartition("/")[2].partition(".")[0] for name in self._files.find(self._folder)
        )
        return [int(stem) for stem in stems if stem.isdigit()]

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            entry = json.loads(self._files.cat_file(self._name(number)))
        except (FileNotFoundError, ValueError):
            return None
        return entry if isinstance(entry, dict) else None

    def _create(self) -> bool:
        """Whether this process made the object of its number."""
        try:
            self._write({}, mode="create")
        except FileExistsError:  # or a client that asked twice, and was heard the first time
            return (self._read(self._number) or {}).get("owner") == self._entry["owner"]
        self._renewed = time.monotonic()
        return True

    def _write(self, more: dict[str, Any], mode: str = "overwrite") -> None:
        content = json.dumps(self._entry | {"beat": self._beat} | more, indent=1).encode()
        self._files.pipe_file(self._name(self._number), content, mode=mode)

    def _remove(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._name(number))


def _who(entry: dict[str, Any]) -> str:
    return f"process {entry.get('pid', '?')} of {entry.get('host', '?')}"


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(),
            "started": _started(os.getpid())}  # fmt: skip


def _machine() -> str:
    """Where a process number means something: this boot, these process numbers; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; "" when it is no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _has_ended(entry: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more: no need to wait."""
    machine = _machine()
    here = machine and entry.get("machine") == machine
    return bool(here and _started(int(entry["pid"])) != entry["started"])
