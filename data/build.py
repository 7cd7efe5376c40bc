"""Builds the tables of a dataset as ArrayRecord files, and checks what is there.

A table lies in `<data_dir>/<dataset>/<table>/<version>` and appears there in one rename, so that it
is either whole or absent. Whoever builds holds a lock on the table; the kernel drops it when the
process dies, and the next builder keeps the shards that the dead one finished, in `.building`, as
long as the files they were made of are the same.

The embedded world (`shapes`) is made from nothing. All other datasets are made of the user's files
(`source`); `data.source` says how their builders are written. Beside the files of TFDS their tables
hold `source.json`:

    {"stamp": ...,                        # digest of all that the table was made of
     "source": "/data/CIRCO",             # where it lay
     "splits": {"val": {"complete": true, # false: partial data, results must be marked "partial"
                        "counts": {"queries": 220, "gallery": 123403},    # what there is
                        "official": {"queries": 220, "gallery": 123403},  # what there should be
                        "lost": {"queries": 0, "gallery": 0},             # for want of files
                        "problems": []}}}                                 # the first 1,000

`splits` are those of the queries; the gallery of CIRCO, whose one split serves both, has the same.
A table without `source.json` is complete.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds
from absl import logging

from cir_jax.errors import DataError, unknown
from cir_jax.input import images, links
from cir_jax.sharding.cores import cores
from cir_jax.storage import buckets, faults
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import default_data_dir
from data import apart, given, progress, shards
from data.claims import building, is_built
from data.source import MAX_LISTED, Options, SourceBuilder, Split, Survey, parallel

DATASETS = {  # name: module and class of its TFDS builder, whose configs are the tables
    "shapes": ("data.shapes.shapes_dataset_builder", "Shapes"),
    "shapes_long": ("data.shapes.shapes_dataset_builder", "ShapesLong"),
    "shapes_tiny": ("data.shapes.shapes_dataset_builder", "ShapesTiny"),
    "fashioniq": ("data.fashioniq.fashioniq_dataset_builder", "Fashioniq"),
    "cirr": ("data.cirr.cirr_dataset_builder", "Cirr"),
    "circo": ("data.circo.circo_dataset_builder", "Circo"),
    "annotated": ("data.annotated.annotated_dataset_builder", "Annotated"),
    "genecis": ("data.genecis.genecis_dataset_builder", "Genecis"),
    "coco_object": ("data.coco_object.coco_object_dataset_builder", "CocoObject"),
    "coco_captions": ("data.coco_captions.coco_captions_dataset_builder", "CocoCaptions"),
    "cirr_mbeir": ("data.mbeir.mbeir_dataset_builder", "CirrMbeir"),
    "fashioniq_mbeir": ("data.mbeir.mbeir_dataset_builder", "FashioniqMbeir"),
    "circus": ("data.circus.circus_dataset_builder", "Circus"),
    "icir": ("data.icir.icir_dataset_builder", "Icir"),
    "images": ("data.images.images_dataset_builder", "Images"),
    "pairs": ("data.pairs.pairs_dataset_builder", "Pairs"),
    "masked_pairs": ("data.masked_pairs.masked_pairs_dataset_builder", "MaskedPairs"),
    "texts": ("data.texts.texts_dataset_builder", "Texts"),
    "text_triplets": ("data.text_triplets.text_triplets_dataset_builder", "TextTriplets"),
    "image_triplets": ("data.image_triplets.image_triplets_dataset_builder", "ImageTriplets"),
}
MARK = "source.json"
IMAGE_FIELDS = ("image", "reference", "target")  # where their value is bytes: an encoded image


def _builder_class(dataset: str) -> type[tfds.core.GeneratorBasedBuilder]:
    if dataset not in DATASETS:
        raise DataError(unknown("dataset", dataset, DATASETS))
    module, name = DATASETS[dataset]
    return getattr(importlib.import_module(module), name)


def from_nothing(dataset: str) -> bool:
    """Whether this project makes the dataset itself; False for other names, too."""
    return dataset in DATASETS and not issubclass(_builder_class(dataset), SourceBuilder)


def _optional(dataset: str) -> tuple[str, ...]:
    return getattr(_builder_class(dataset), "OPTIONAL", ())


def tables_of(dataset: str, wanted: Sequence[str] | None = None) -> list[str]:
    """Returns the wanted tables of the dataset, or all of them."""
    known = [config.name for config in _builder_class(dataset).BUILDER_CONFIGS]
    for table in wanted or ():
        if table not in known:
            raise DataError(unknown(f"table of {dataset}", table, known))
    return list(wanted or known)


def table_dir(
    dataset: str,
    table: str,
    data_dir: str | os.PathLike | None = None,
    name: str | None = None,
) -> Path:
    """Returns where the current version of the table is, or would be.

    name: what the dataset is called on disk, if there are several of its kind.
    """
    tables_of(dataset, [table])
    if name and name != dataset and (name in DATASETS or not re.fullmatch(r"\w[\w.-]*", name)):
        raise DataError(
            f"--name={name}: choose a name of letters, digits, '_', '-' and '.', other than those "
            f"of the datasets themselves ({', '.join(DATASETS)})."
        )
    root = buckets.place(data_dir) if data_dir else default_data_dir()
    root = root if buckets.is_remote(root) else root.resolve()
    return root / (name or dataset) / table / str(_builder_class(dataset).VERSION)


def survey(
    dataset: str, source: str | os.PathLike | None, options: Options | None = None
) -> Survey:
    """Looks at the files of a dataset in the folder `source`, and writes nothing: the doctor.

    Raises DataError when there is no such folder, nothing of the dataset in it, or when anything
    but images is missing or wrong.
    """
    cls, options = _builder_class(dataset), options or Options()
    if not issubclass(cls, SourceBuilder):
        raise DataError(f"{dataset} is made from nothing: leave out --source.")
    if source is None:
        raise DataError(
            f"{dataset} is made of files that you have to get; then run `python launch/prepare.py "
            f"--dataset={dataset} --source=DIR`.\n{cls.HELP.strip()}\n"
            f"More in data/{DATASETS[dataset][0].split('.')[1]}/README.md."
        )
    names = cls.split_names()
    for split in options.splits or ():
        if names and split not in names:
            raise DataError(unknown(f"split of {dataset}", split, names))
    root = given.source(source, dataset, cls, options, functools.partial(_can, "HUB"))
    try:
        found = cls.survey(root, options)
    except OSError as error:  # of a list or table; images are looked after one by one
        reason = error.strerror or error
        raise DataError(f"{error.filename or root}: cannot be read ({reason}).") from error
    for split in options.splits or ():
        if split in found.skipped:
            raise DataError(
                f"split {split!r} of {dataset}: {found.skipped[split]}\n{cls.HELP.strip()}"
            )
    nothing = not any(found.splits.values())
    if nothing and not any(report.damaged for report in found.reports.values()):
        why = "\n".join(f"  {split}: {reason}" for split, reason in found.skipped.items())
        raise DataError(f"{root} holds nothing of {dataset} to build.\n{why}\n{cls.HELP.strip()}")
    return dataclasses.replace(found, source=str(root))


def prepare_needed(
    *needs: Mapping[str, Iterable[str]], data_dir: str | os.PathLike | None = None
) -> None:
    """Builds those of the needed tables (dataset -> tables) that this project makes itself.

    Where there is more than one core, those that a dataset calls APART are built beside the others.
    """
    for dataset in dict.fromkeys(name for need in needs for name in need if name in DATASETS):
        tables = sorted({table for need in needs for table in need.get(dataset, ())})
        missing = [t for t in tables if not is_built(table_dir(dataset, t, data_dir))]
        beside = [t for t in missing if t in getattr(_builder_class(dataset), "APART", ())]
        if beside and beside != missing and cores() > 1:
            root = table_dir(dataset, beside[0], data_dir).parents[2]
            with apart.building(dataset, beside, root):
                prepare(dataset, [t for t in missing if t not in beside], data_dir)
        prepare(dataset, tables, data_dir)


def prepare(
    dataset: str,
    tables: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    *,
    source: str | os.PathLike | None = None,
    name: str | None = None,
    splits: Sequence[str] | None = None,
    allow_partial: bool = False,
    decode: bool = True,
    columns: Mapping[str, str] | None = None,
    link: bool = False,
    report: Path | None = None,
    segmenter: str = "",
    keywords: str = "spacy",
    split: str = "",
    limit: int | None = None,
) -> dict[str, Path]:
    """Builds those tables that are not there yet; returns the folders of all wanted ones.

    source: folder of the user's files, or hf:ORG/NAME (`data.hub`); needed unless all wanted
        tables are there.
    name: as `table_dir`.
    splits: of the benchmark, to build; default all whose files are there.
    allow_partial: build from incomplete files too; the tables are marked.
    decode: make sure that each image can be decoded.
    columns: {field: its name in the files}, for corpora whose columns vary.
    link: the tables name the image files instead of holding them.
    report: file for all that was found (`write_report`), also where that is refused.
    segmenter, keywords, split, limit: as `data.source.Options`.
    Raises DataError when files are missing or wrong, when a table is there but made of other files,
    and when the disk is full.
    """
    folders = {t: table_dir(dataset, t, data_dir, name) for t in tables_of(dataset, tables)}
    optional = () if tables else _optional(dataset)
    there = {t: folder for t, folder in folders.items() if is_built(folder)}
    if source is None and not folders.keys() - there.keys() - set(optional):
        return there
    cls, found = _builder_class(dataset), None
    if issubclass(cls, SourceBuilder) or source is not None:
        how = ("survey" if allow_partial else "build") if decode else "never"
        _refuse_links(dataset, link)
        kind: Literal["copy", "link"] = "link" if link else "copy"
        chosen = tuple(splits) if splits else None
        options = Options(chosen, how, kind, columns or {}, segmenter, keywords, split, limit)
        found = survey(dataset, source, options)
        if report is not None and source is not None:
            write_report(report, dataset, found)
        _refuse_partial(dataset, found, allow_partial)
        if not any(found.splits.values()):
            raise DataError(f"{source} has no image of {dataset}.\n{describe(found)}")
        print(describe(found), file=sys.stderr, flush=True)
        for table in tables_of(dataset):  # all of them: queries count in their gallery
            _refuse_other(table_dir(dataset, table, data_dir, name), found.splits.get(table, {}))
        if absent := [table for table in tables or () if not found.splits.get(table)]:
            raise DataError(f"{source} lacks what table {absent[0]!r} of {dataset} is made of.")
        folders = {table: folder for table, folder in folders.items() if found.splits.get(table)}
    for table, folder in folders.items():
        if is_built(folder):
            continue
        try:
            splits = found.splits.get(table, {}) if found else {}
            with building(folder, functools.partial(_refuse_other, splits=splits)) as here:
                if here is not None:
                    _build(dataset, table, here, found)
        except Exception as error:  # TFDS and ArrayRecord wrap the system's errors
            if isinstance(error, DataError) or (reason := faults.reason(error)) is None:
                raise
            raise DataError(
                f"cannot write table {table!r} of {dataset} to {folder.parent}: {reason}. "
                "Free some space, or name another folder with --data_dir or $CIR_JAX_DATA."
            ) from error
    return folders


def _refuse_links(dataset: str, link: bool) -> None:
    can = _can("LINKS") if link else ()
    if link and dataset not in can:
        raise DataError(
            f"--images=link: {dataset} copies its images; those of {', '.join(can)} can be linked."
        )


def _can(what: str) -> list[str]:
    """Datasets whose builders say so."""
    return [name for name in DATASETS if getattr(_builder_class(name), what, False)]


def _refuse_partial(dataset: str, found: Survey, allow_partial: bool) -> None:
    if allow_partial or all(report.complete for report in found.reports.values()):
        return
    raise DataError(
        f"{dataset} is not complete.\n{describe(found)}\nGet the missing files, choose other "
        "--splits, or add --allow_partial: results will then be marked as partial."
    )


def _refuse_other(folder: Path, splits: Mapping[str, Split]) -> None:
    """Raises DataError if the table is there and made of other files."""
    if not is_built(folder) or not splits:
        return
    try:
        stamp = json.loads((folder / MARK).read_text())["stamp"]
    except (OSError, ValueError, KeyError):
        stamp = None
    if stamp != _stamp(splits):
        raise DataError(
            f"{folder} is there already, made of other files than there are now (changed, added, "
            "completed, other --splits or --allow_partial). Delete all tables in "
            f"{folder.parent.parent} to build them anew, or leave out --source to keep them."
        )


def incomplete_splits(folder: Path) -> list[str]:
    """Splits that the table in the folder was built from incomplete files of."""
    try:
        splits = json.loads((folder / MARK).read_text())["splits"]
    except FileNotFoundError:
        return []  # made from nothing
    return [name for name, split in splits.items() if not split["complete"]]


def _stamp(splits: Mapping[str, Split]) -> dict[str, str]:
    return {name: split.stamp for name, split in splits.items()}


def describe(found: Survey) -> str:
    """The reports of a survey as text, split by split."""
    lines, shown = [], set()
    for split, report in found.reports.items():
        lines.append(f"{split}:\n{textwrap.indent(report.text(shown), '  ')}")
        shown |= set(report.problems)  # splits may share images: each problem once
    lines += [f"{split}: left out: {why}" for split, why in found.skipped.items()]
    return "\n".join(lines)


def write_report(path: Path, dataset: str, found: Survey) -> None:
    """Writes all that a survey found as JSON: every missing id, damaged file and lost query."""
    content = {
        "dataset": dataset,
        "source": found.source,
        "splits": {split: report.whole() for split, report in found.reports.items()},
        "left out": dict(found.skipped),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _build(dataset: str, table: str, folder: Path, found: Survey | None) -> None:
    if folder.exists():
        raise DataError(f"{folder} exists but is no complete table: delete it and try again.")
    scratch = folder.parent / ".building"
    print(f"building {dataset}/{table} in {folder}", file=sys.stderr, flush=True)
    try:
        builder, splits = _open(dataset, table, scratch, found)
        match shards.unfinished(builder, splits, scratch):
            case "changed":
                print("  its files have changed since an unfinished build: starting over",
                      file=sys.stderr, flush=True)  # fmt: skip
            case "continued":
                print(f"  keeping {shards.finished_shards(scratch)} finished shard(s)",
                      file=sys.stderr, flush=True)  # fmt: skip

        def mark() -> dict[str, Any] | None:
            if found is None:
                return None
            return {
                "stamp": _stamp(splits),
                "source": found.source,
                "splits": {name: report.mark() for name, report in found.reports.items()},
            }

        write_table(builder, splits, scratch, folder, mark)
    finally:
        if not shards.finished_shards(scratch):
            shutil.rmtree(scratch, ignore_errors=True)


def write_table(
    builder: tfds.core.GeneratorBasedBuilder,
    splits: Mapping[str, Split],
    scratch: Path,
    folder: Path,
    mark: Callable[[], Mapping[str, Any] | None],
) -> None:
    """Writes what is not yet in `scratch` of the table, which then becomes `folder`.

    mark: what its MARK says, asked when all records are written; None = it has none.
    """
    with quiet_tfds():
        shards.write(builder, splits, scratch)
    if (content := mark()) is not None:
        (scratch / MARK).write_text(json.dumps(content, indent=2) + "\n")
    os.rename(scratch, folder)
    (folder / shards.JOURNAL).unlink()


def _open(
    dataset: str, table: str, scratch: Path, found: Survey | None
) -> tuple[tfds.core.GeneratorBasedBuilder, dict[str, Split]]:
    """The builder of a table, and what it writes."""
    cls = _builder_class(dataset)
    if found is None:
        with quiet_tfds():
            builder = cls(config=table, data_dir=scratch)
        stamp = f"{dataset} {cls.VERSION}"

        def made(name: str, start: int) -> Iterator[dict[str, Any]]:
            # a function of its number, but only in order: the first ones are made again
            examples = builder._split_generators(None)[name]
            return islice((record for _, record in examples), start, None)

        names = builder._split_generators(None)
        splits = {n: Split(lambda start, n=n: made(n, start), stamp) for n in names}
        return builder, splits
    with quiet_tfds():
        builder = cls(config=table, data_dir=scratch, splits=found.splits[table])

    def shown(name: str, split: Split, start: int) -> Iterator[dict[str, Any]]:
        left = None if split.count is None else split.count - start
        label = f"{dataset}/{table}/{name}"
        return progress(islice(split.records(start), left), split.count, label, start)

    return builder, {
        name: Split(lambda start, n=name, s=split: shown(n, s, start), split.stamp, split.count)
        for name, split in found.splits[table].items()
    }


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
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


def check(
    dataset: str,
    tables: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    name: str | None = None,
) -> dict[str, dict[str, int]]:
    """Reads every record and decodes every image; returns the counts per table and split.

    A table that may be left out, and was, has no splits.
    Raises a DataError that names the tables that are missing and the records that are corrupt.
    """
    counts: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    cls = _builder_class(dataset)
    own_ids = getattr(cls, "OWN_IDS", ())
    source = " --source=DIR" if issubclass(cls, SourceBuilder) else ""
    for table in tables_of(dataset, tables):
        folder = table_dir(dataset, table, data_dir, name)
        if not is_built(folder):
            if not tables and table in _optional(dataset):
                counts[table] = {}
                continue
            problems.append(f"table {table!r} is missing in {folder.parent}")
            continue
        with quiet_tfds():
            builder = tfds.builder_from_directory(str(folder))
        counts[table] = {name: info.num_examples for name, info in builder.info.splits.items()}
        for split, count in counts[table].items():
            label = f"{table}/{split}"
            problems += _check_split(builder, label, split, count, table in own_ids)
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError(
            f"{dataset} has {len(problems)} problem(s):\n  {listed}{more}\n"
            f"Delete the folder of a corrupt table, if any, and run launch/prepare.py "
            f"--dataset={dataset}{source}."
        )
    return counts


def _check_split(
    builder: tfds.core.DatasetBuilder, label: str, split: str, count: int, own_ids: bool
) -> Iterator[str]:
    """Yields what is wrong with each corrupt record of the split."""
    try:
        source = builder.as_data_source(split)
    except Exception as error:  # whatever the reader makes of a missing or damaged file
        yield f"{label}: cannot be opened: {error}"
        return

    def look(i: int) -> tuple[int | None, str]:
        """The id of record i, and what is wrong with it."""
        number = None
        try:
            record = source[i]
            number = int(record["id"])
            for field in IMAGE_FIELDS:
                image = links.followed(record.get(field), f"{label} record {i}")
                if isinstance(image, bytes):
                    images.decode(image, field)
        except Exception as error:  # as above; PIL raises a dozen types for bad files
            return number, str(error)
        return number, ""

    seen: set[int] = set()
    for i, (number, problem) in enumerate(progress(parallel(look, range(count)), count, label)):
        if number is not None:
            if number in seen or (number != i and not own_ids):
                yield f"{label} record {i}: has the id {number}"
            seen.add(number)
        if problem:
            yield f"{label} record {i}: {problem}"
