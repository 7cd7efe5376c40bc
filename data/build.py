"""Builds the tables of a dataset as ArrayRecord files, and checks what is there.

A table lies in `<data_dir>/<dataset>/<table>/<version>` and appears there in one rename, so that it
is either whole or absent. Whoever builds holds a lock on the table; the kernel drops it when the
process dies, and the next builder then removes what the dead one left.
"""

import contextlib
import errno
import fcntl
import importlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from cir_jax.errors import DataError, unknown
from data import progress

DATASETS = {  # name: module and class of its TFDS builder, whose configs are the tables
    "shapes": ("data.shapes.shapes_dataset_builder", "Shapes"),
    "shapes_tiny": ("data.shapes.shapes_dataset_builder", "ShapesTiny"),
}
IMAGE_FIELDS = ("image", "reference", "target")  # where their value is bytes: an encoded image
_MAX_LISTED = 10


def default_data_dir() -> Path:
    """Returns `$CIR_JAX_DATA`, or `~/.cache/cir_jax/data`."""
    return Path(os.environ.get("CIR_JAX_DATA") or "~/.cache/cir_jax/data").expanduser()


def _builder_class(dataset: str) -> type[tfds.core.GeneratorBasedBuilder]:
    if dataset not in DATASETS:
        raise DataError(unknown("dataset", dataset, DATASETS))
    module, name = DATASETS[dataset]
    return getattr(importlib.import_module(module), name)


def tables_of(dataset: str, wanted: Sequence[str] | None = None) -> list[str]:
    """Returns the wanted tables of the dataset, or all of them."""
    known = [config.name for config in _builder_class(dataset).BUILDER_CONFIGS]
    for table in wanted or ():
        if table not in known:
            raise DataError(unknown(f"table of {dataset}", table, known))
    return list(wanted or known)


def table_dir(dataset: str, table: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Returns where the current version of the table is, or would be."""
    tables_of(dataset, [table])
    if "://" in str(data_dir):
        raise DataError(f"data_dir {data_dir} is not a local folder: build locally, then copy it.")
    root = Path(data_dir).expanduser() if data_dir else default_data_dir()
    return root.resolve() / dataset / table / str(_builder_class(dataset).VERSION)


def is_built(directory: Path) -> bool:
    """Whether the folder holds a table; TFDS writes these two files last."""
    return all((directory / f).is_file() for f in ("dataset_info.json", "features.json"))


def prepare(
    dataset: str,
    tables: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, Path]:
    """Builds those tables that are not there yet; returns the folders of all wanted ones."""
    folders = {t: table_dir(dataset, t, data_dir) for t in tables_of(dataset, tables)}
    for table, folder in folders.items():
        if is_built(folder):
            continue
        try:
            with _locked(folder.parent):
                if not is_built(folder):  # another process may have built it meanwhile
                    _build(dataset, table, folder)
        except Exception as error:  # TFDS and ArrayRecord wrap the system's errors
            if (reason := _disk_problem(error)) is None:
                raise
            raise DataError(
                f"cannot write table {table!r} of {dataset} to {folder.parent}: {reason}. "
                "Free some space, or name another folder with --data_dir or $CIR_JAX_DATA."
            ) from error
    return folders


def _build(dataset: str, table: str, folder: Path) -> None:
    if folder.exists():
        raise DataError(f"{folder} exists but is no complete table: delete it and try again.")
    scratch = folder.parent / ".building"
    shutil.rmtree(scratch, ignore_errors=True)  # of a builder that died
    print(f"building {dataset}/{table} in {folder}", file=sys.stderr, flush=True)
    try:
        with _quiet_tfds():
            builder = _builder_class(dataset)(
                config=table, data_dir=scratch, file_format="array_record"
            )
            builder.download_and_prepare()
        os.rename(builder.data_dir, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Hides what TFDS says about its scratch folder, and its bars, which do not know the totals."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock on the folder, waiting for it if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("another process is building %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _disk_problem(error: BaseException | None) -> str | None:
    """Returns what is wrong with the disk, if that is what the error or one of its causes says."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
             errno.EEXIST, errno.EIO)  # fmt: skip
    while error is not None:
        for code in codes:
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def check(
    dataset: str,
    tables: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, dict[str, int]]:
    """Reads every record and decodes every image; returns the counts per table and split.

    Raises a DataError that names the tables that are missing and the records that are corrupt.
    """
    counts: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for table in tables_of(dataset, tables):
        folder = table_dir(dataset, table, data_dir)
        if not is_built(folder):
            problems.append(f"table {table!r} is missing in {folder.parent}")
            continue
        with _quiet_tfds():
            builder = tfds.builder_from_directory(str(folder))
        counts[table] = {name: info.num_examples for name, info in builder.info.splits.items()}
        for split, count in counts[table].items():
            problems += _check_split(builder, f"{table}/{split}", split, count)
    if problems:
        listed = "\n  ".join(problems[:_MAX_LISTED])
        more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise DataError(
            f"{dataset} has {len(problems)} problem(s):\n  {listed}{more}\n"
            f"Delete the folder of a corrupt table and run launch/prepare.py --dataset={dataset}."
        )
    return counts


def _check_split(
    builder: tfds.core.DatasetBuilder, label: str, split: str, count: int
) -> Iterator[str]:
    """Yields what is wrong with each corrupt record of the split."""
    try:
        source = builder.as_data_source(split)
    except Exception as error:  # whatever the reader makes of a missing or damaged file
        yield f"{label}: cannot be opened: {error}"
        return
    for i in progress(range(count), count, label):
        try:
            record = source[i]
            if record["id"] != i:
                yield f"{label} record {i}: has the id {record['id']}"
            for field in IMAGE_FIELDS:
                if isinstance(record.get(field), bytes):
                    Image.open(io.BytesIO(record[field])).load()
        except Exception as error:  # as above; PIL raises a dozen types for bad files
            yield f"{label} record {i}: {error}"
