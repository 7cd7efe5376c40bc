"""A bucket in memory, in the place of gcsfs: objects appear whole, there is no append, and a rename
is a copy of one object after the other."""

import contextlib
import itertools
from pathlib import Path

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from cir_jax.storage import buckets


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]
    fails = None
    """Called with the name of each object before it is written; may raise."""
    generations = {}
    _numbers = itertools.count(1)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gcs://", "/").replace("gs://", "/"))

    def _open(self, path, mode="rb", **options):
        if mode not in ("rb", "wb", "xb"):
            raise NotImplementedError(f"mode {mode}: objects do not grow")
        return super()._open(path, mode, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        path = self._strip_protocol(path)
        if Bucket.fails:
            Bucket.fails(path)
        if mode == "create" and path in self.store:
            raise FileExistsError(path)
        self.generations[path] = str(next(self._numbers))
        super().pipe_file(path, value, **options)

    def put_file(self, lpath, rpath, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def info(self, path, **options):
        found = super().info(path, **options)
        return found | {"generation": self.generations.get(found["name"])}

    def find(self, path, withdirs=False, detail=False, **options):
        path = self._strip_protocol(path)
        names = sorted(name for name in self.store if name.startswith(f"{path}/"))
        return {name: self.info(name) for name in names} if detail else names


@contextlib.contextmanager
def in_memory(monkeypatch):
    """`gs://` is an empty `Bucket`; also for what epath opens."""
    monkeypatch.setattr(buckets, "CLIENTS", {"gs": "fsspec"})
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(Bucket, "fails", None)
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    try:
        yield
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
