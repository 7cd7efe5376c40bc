"""Datasets of the Hugging Face hub as sources: `--source=hf:ORG/NAME[@REVISION][:CONFIG]`.

The package `datasets` says which files make up a split, by the configurations of the dataset's card
or by their names. Their bytes are streamed as it streams them, through the hub's file system, and
read by what reads files of a disk: that names the line of each record that cannot be used, where
`datasets` ends with the file or goes on in silence (benchmarks/README.md). Nothing is kept on disk.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from cir_jax.errors import DataError, unknown
from cir_jax.storage import faults

SCHEME = "hf:"
BLOCK = 2**23  # bytes of a request where a file is read from its start to its end
_FORM = re.compile(r"hf:(?P<name>[^@:]*)(?:@(?P<revision>[^:]+))?(?::(?P<config>.+))?")


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a dataset of the hub, with what readers use of a Path.

    label: dataset and path, for messages. address: for the hub's file system, with the commit.
    number: git's of its contents.
    """

    label: str
    address: str
    size: int
    number: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.address).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.address).suffix

    @property
    def stamp(self) -> list[Any]:
        """What its contents are known by: a commit that leaves them alone changes nothing."""
        return [self.name, self.size, self.number]

    def __str__(self) -> str:
        return self.label

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.size)

    def open(self, mode: str = "r", **text: Any) -> Any:
        """Open for reading, some MB ahead. text: as of `Path.open`. Reading raises DataError when
        the hub breaks off."""
        raw = _Stream(self, block_size=BLOCK, cache_type="readahead")
        file = io.BufferedReader(raw, 2**20)
        return file if "b" in mode else io.TextIOWrapper(file, **text)

    def ranges(self) -> io.RawIOBase:
        """Open for reading here and there: what is asked for is fetched, and no more."""
        return _Stream(self, cache_type="none")


class _Stream(io.RawIOBase):
    def __init__(self, file: File, **how: Any):
        from huggingface_hub import HfFileSystem

        self._named = file
        with self._told():
            self._file = HfFileSystem().open(file.address, "rb", **how)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_of_network(error):
                raise
            raise DataError(
                f"{self._named}: the hub broke off ({faults.cause(error)}). Do the same again: "
                "finished shards are kept."
            ) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        # past its end the file system answers with what is at it
        most = max(self._named.size - self._file.tell(), 0)
        with self._told():
            data = self._file.read(min(len(buffer), most)) if most else b""
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a dataset of the hub, at one commit. files: as `datasets` orders them."""

    name: str
    revision: str
    config: str
    split: str
    files: tuple[File, ...]

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.revision}" + (f":{self.config}" if self.config else "")

    def of_types(self, suffixes: Sequence[str]) -> list[File]:
        """The files with these suffixes. Raises DataError when there is none."""
        if found := [file for file in self.files if file.suffix.lower() in suffixes]:
            return found
        there = ", ".join(sorted({file.suffix or file.name for file in self.files}))
        raise DataError(
            f"--source={self}: split {self.split!r} is made of files of type {there}; read are "
            f"{', '.join(suffixes)}. The hub converts most datasets to Parquet: "
            f"--source={SCHEME}{self.name}@refs/convert/parquet"
        )


def is_named(source: Any) -> bool:
    """Whether a source is given as one of the hub."""
    return str(source).startswith(SCHEME)


def opened(source: str, split: str = "") -> Dataset:
    """The split of the dataset that `source` names; "" = `train`, or the only one there is.

    Raises DataError: no such name, revision, configuration or split; a package is not installed,
    the hub cannot be reached.
    """
    found = _FORM.fullmatch(source)
    if not found or found["name"].count("/") != 1 or not all(found["name"].split("/")):
        raise DataError(
            f"--source={source}: expected hf:ORG/NAME, hf:ORG/NAME@REVISION, hf:ORG/NAME:CONFIG or "
            "hf:ORG/NAME@REVISION:CONFIG."
        )
    name, config = found["name"], found["config"] or ""
    sha, splits = _resolved(source, name, found["revision"], config)
    if not split:
        split = "train" if "train" in splits else next(iter(splits))
        if split != "train" and len(splits) > 1:
            raise DataError(
                f"--source={source} has no split train; choose --split= of {', '.join(splits)}."
            )
    if split not in splits:
        raise DataError(f"--source={source}: {unknown('split', split, splits)}")
    return Dataset(name, sha, config, split, tuple(_files(source, name, sha, splits[split])))


def _resolved(
    source: str, name: str, revision: str | None, config: str
) -> tuple[str, dict[str, Any]]:
    """The commit, and the addresses of each split's files."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"--source={source}: datasets of the hub need the package datasets: "
            "pip install 'cir_jax[hub]'."
        ) from error
    from datasets.data_files import EmptyDatasetError
    from huggingface_hub import HfApi, constants, errors

    login = "with HF_TOKEN set, or after `hf auth login`"
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        sha = HfApi().dataset_info(name, revision=revision).sha
        builder = datasets.load_dataset_builder(name, config or None, revision=sha)
    except errors.GatedRepoError as error:
        raise DataError(
            f"--source={source}: its owner wants to know who gets it. Ask at "
            f"{constants.ENDPOINT}/datasets/{name}, then do this again {login}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"--source={source}: there is no revision {revision!r}.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise DataError(
            f"--source={source}: no such dataset on {constants.ENDPOINT}. Correct the name; a "
            f"private one is seen only {login}."
        ) from error
    except (datasets.exceptions.DatasetsError, EmptyDatasetError) as error:
        raise DataError(
            f"--source={source}: no files that `datasets` knows ({faults.cause(error)})."
        ) from error
    except (ValueError, RuntimeError) as error:  # which configurations there are; scripts
        said = " ".join(str(error).partition("Example of usage")[0].split())
        raise DataError(
            f"--source={source}: {said}. Name a configuration as hf:{name}:CONFIG; of a dataset "
            f"made by a script, hf:{name}@refs/convert/parquet."
        ) from error
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise DataError(
            f"--source={source}: the hub was not reached ({faults.cause(error)}). Where there is a "
            f"network: `hf download {name} --repo-type dataset --local-dir DIR`; then give the "
            "folder of the files with --source=."
        ) from error
    return sha, dict(builder.config.data_files or {})


def _files(source: str, name: str, sha: str, addresses: Sequence[str]) -> Iterator[File]:
    from huggingface_hub import HfFileSystem

    root, system = f"hf://datasets/{name}@{sha}/", HfFileSystem()
    for address in addresses:
        if not address.startswith(root):
            raise DataError(f"--source={source}: {address} is no file of this dataset.")
        status = system.info(address)
        number = status["lfs"]["sha256"] if status.get("lfs") else status["blob_id"]
        label = f"{SCHEME}{name}/{address.removeprefix(root)}"
        yield File(label, address, status["size"], number)


def _is_of_network(error: Exception) -> bool:
    from cir_jax.weights import hub  # the hub's client has several clients of HTTP

    return isinstance(error, OSError) or hub.is_of_network(error)
