"""Files that grow: where nothing can be appended to, on this machine, uploaded now and then."""

import contextlib
import logging
import tempfile
from pathlib import Path

from cir_jax.storage import faults, lease
from cir_jax.storage.buckets import download, is_remote, upload


class Growing:
    """Where the growing files of `directory` are written. local: the directory itself, or, where
    that lies in a bucket, a temporary one, which begins with its `names`.

    Raises OSError when these cannot be read.
    """

    def __init__(self, directory: Path, names: tuple[str, ...] = ()):
        self._directory, self._uploaded = directory, {}
        self._scratch = contextlib.ExitStack()
        self.local = directory
        if is_remote(directory):
            scratch = tempfile.TemporaryDirectory(prefix="cir_jax_logs_")
            self.local = Path(self._scratch.enter_context(scratch))
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    download(directory / name, self.local / name)

    def upload(self) -> None:
        """What has changed, to the bucket; with a warning where that fails: later, then.

        Raises CheckpointError when the lease over the directory was lost.
        """
        if self.local == self._directory:
            return
        lease.check(self._directory / "any")
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, stat = file.relative_to(self.local).as_posix(), file.stat()
            now = (stat.st_size, stat.st_mtime_ns)
            if self._uploaded.get(name) == now:
                continue
            try:
                upload(file, self._directory / name)
            except OSError as error:
                reason = faults.cause(error)
                logging.warning("%s: cannot be written (%s).", self._directory / name, reason)
                continue
            self._uploaded[name] = now

    def close(self) -> None:
        """Uploads for the last time."""
        with self._scratch:
            self.upload()
