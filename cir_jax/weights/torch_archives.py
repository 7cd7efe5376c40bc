"""The two containers of `torch.save`: zip archives, and the files of PyTorch before 1.6.

Both hold pickles and, apart from them, the bytes of tensor storages. Whatever sizes they declare is
compared with the file's before anything is read or allocated. Zip archives have checksums; in old
files (and in safetensors) damage that keeps the sizes cannot be noticed.
"""

import functools
import io
import mmap
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.input import pickles

PICKLE = 8 * 2**20
"""Bytes of pickles that are read: the names of a model of 1000 tensors take 150,000."""

SAVE_WEIGHTS = "Save the weights alone: `torch.save(model.state_dict(), FILE)`."

Read = Callable[[np.dtype], np.ndarray]
"""The elements of a storage as a flat array of a type, in this machine's byte order."""


class DamagedError(ValueError):
    """What is wrong with a file, and what to do; its name is added where it is known."""

    def __init__(self, what: str, remedy: str = "Download or copy it again."):
        super().__init__(f"{what} {remedy}")


class Zip:
    """A zip archive of `torch.save` or `torch.jit.save`."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise DamagedError("the end of the archive is missing.")
        self._zip = zipfile.ZipFile(path)
        self._members = {member.filename: member for member in self._zip.infolist()}
        if len(self._members) < len(self._zip.infolist()):
            raise DamagedError("two members have one name.", "Save the weights again.")
        roots = [n for n in self._members if n.count("/") == 1 and n.endswith("/data.pkl")]
        if not roots:
            raise DamagedError("a zip archive, but not one of PyTorch (no data.pkl).")
        if len(roots) > 1:
            raise DamagedError(
                f"several models in one archive: {', '.join(roots[:3])}.", "Save them one by one."
            )
        self._root = roots[0].removesuffix("/data.pkl")
        data = [m for name, m in self._members.items() if name.startswith(f"{self._root}/data/")]
        for member in data:
            _check_stored(member)
        # members may lie on top of each other
        if (declared := sum(m.file_size for m in data)) > (size := os.path.getsize(path)):
            raise DamagedError(f"its tensors declare {declared} bytes, but the file has {size}.")
        # several tensors may share a storage; of query, key and value in one tensor, each is read
        # by itself, and three others in between
        self._bytes = functools.lru_cache(maxsize=4)(self._read)
        order = f"{self._root}/byteorder"
        self._big_endian = order in self._members and self._small(order, 16) == b"big"

    def tree(self, reader: Callable[[io.BytesIO], pickles.Reader]) -> Any:
        """What was saved, as `reader` makes it of the pickle."""
        return reader(io.BytesIO(self._small(f"{self._root}/data.pkl", PICKLE))).load()

    def storage(self, key: str, size: int, itemsize: int) -> Read:
        """Of the storage `key`, which is said to have `size` bytes."""
        name = f"{self._root}/data/{key}"
        if name not in self._members:
            raise DamagedError(f"its member {name} is missing.")
        stored = self._members[name].file_size
        if not 0 <= stored - size < 16:  # a storage may end with a part of an element
            raise DamagedError(f"{name} is declared as {size} bytes, but has {stored}.")
        return lambda dtype: _array(self._bytes(name), dtype, size, 0, self._big_endian)

    def _small(self, name: str, limit: int) -> bytes:
        if (size := self._members[name].file_size) > limit:
            raise DamagedError(f"{name} has {size} bytes, more than {limit}.", SAVE_WEIGHTS)
        return self._read(name)

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)  # compares the checksum
        except MemoryError:
            raise
        except Exception as error:  # as many kinds as there are fields to damage
            why = str(error) or "it ends too early"
            if self._members[name].CRC == 0:
                why += "; where it was saved after torch.serialization.set_crc32_options(False), "
                why += "save it again without that"
            raise DamagedError(f"{name} cannot be read ({why}).") from error


class Legacy:
    """A file of PyTorch before 1.6: four pickles, the last one a list of keys, then storages."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._sizes: dict[str, tuple[int, int]] = {}  # key -> bytes, bytes of an element
        self._starts: dict[str, int] = {}
        self._big_endian = False

    def tree(self, reader: Callable[[io.BytesIO], pickles.Reader]) -> Any:
        """What was saved, as `reader` makes it of the pickle."""
        head = io.BytesIO(self._map[:PICKLE])
        plain = pickles.Reader(head)
        _, version, system = plain.load(), plain.load(), plain.load()
        if version != 1001 or not isinstance(system, dict):
            raise DamagedError(f"unknown version {version!r} of old PyTorch files.")
        self._big_endian = system.get("little_endian") is False
        tree = reader(head).load()
        at = self._locate(plain.load(), head.tell())
        if at != len(self._map):
            raise DamagedError(f"{len(self._map)} bytes; its tensors end at {at}.")
        return tree

    def storage(self, key: str, size: int, itemsize: int) -> Read:
        """Of the storage `key`, which is said to have `size` bytes in elements of `itemsize`."""
        if self._sizes.setdefault(key, (size, itemsize)) != (size, itemsize):
            raise DamagedError(f"storage {key} has two sizes.")
        return lambda dtype: _array(self._map, dtype, size, self._starts[key], self._big_endian)

    def _locate(self, keys: Any, at: int) -> int:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedError("no list of tensor storages.")
        if lost := set(self._sizes) - set(keys):
            raise DamagedError(f"storage {min(lost)} is missing.")
        for key in keys:
            size, itemsize = self._sizes.get(key, (0, 1))
            order = "big" if self._big_endian else "little"
            stored = int.from_bytes(self._map[at : at + 8], order, signed=True) * itemsize
            self._starts[key] = at + 8
            at += 8 + size
            if key not in self._sizes or stored != size or at > len(self._map):
                raise DamagedError(
                    f"storage {key} is declared as {size} bytes, but says {stored}, and ends at "
                    f"{at} of {len(self._map)}."
                )
        return at


def _check_stored(member: zipfile.ZipInfo) -> None:
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED:
        raise DamagedError(
            f"{name} is compressed, which PyTorch never does.",
            "If it is from a source that you trust, unpack it, and zip it again with `zip -0`.",
        )
    if member.compress_size != member.file_size:
        raise DamagedError(f"{name} has {member.compress_size} bytes of {member.file_size}.")


def _array(data: Any, dtype: np.dtype, size: int, at: int, big_endian: bool) -> np.ndarray:
    flat = np.frombuffer(data, dtype, size // dtype.itemsize, at)
    return flat.byteswap() if big_endian == (sys.byteorder == "little") else flat
