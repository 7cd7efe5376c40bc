"""Several processes that share the work of one command, on a disk that all of them see."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cir_jax.errors import ConfigError, DataError
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.locks import locked


@dataclasses.dataclass(frozen=True)
class Shard:
    """Number `index` of `count` processes."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str) -> "Shard":
        """Of "2/8": the third of eight. Raises ConfigError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(f"--shard={text}: expected I/N with I from 0 to N - 1, such as 0/8.")
        return cls(int(index), int(count))

    def file(self, output: Path) -> Path:
        """OUTPUT itself where there is but one."""
        if self.count == 1:
            return output
        return output.with_name(f"{output.stem}-{self.index:05d}-of-{self.count:05d}.jsonl")


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Raises DataError while another process does the same work."""
    with locked(lock, wait=False) as free:
        if not free:
            raise DataError(
                f"{lock}: another process makes these triplets. Wait for it, or choose another "
                "--output or --shard."
            )
        yield


def same_run(folder: Path, settings: dict[str, Any], others: str, flag: str) -> None:
    """Notes the settings in `folder/settings.json`, or compares them with those noted there.

    Raises DataError naming the settings that differ: what is in the folder is of `others`.
    """
    file = folder / "settings.json"
    if not file.is_file():
        text = json.dumps(settings, indent=1) + "\n"
        write_atomically(file, lambda f: f.write(text.encode()))
    try:
        found = json.loads(file.read_text())
        differ = [k for k in {**found, **settings} if found.get(k) != settings.get(k)]
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: damaged ({error}). Delete {folder} to begin again.") from error
    if differ:
        changed = "; ".join(f"{k} {found.get(k)}, now {settings.get(k)}" for k in sorted(differ))
        raise DataError(
            f"{folder}: of {others} ({changed}). Delete it to begin again, or choose another "
            f"{flag}."
        )
