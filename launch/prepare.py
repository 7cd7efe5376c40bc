"""Builds a dataset: `python launch/prepare.py --dataset=shapes [--tables=gallery,circo]`.

Real datasets are made of files that you have: `--dataset=circo --source=DIR`; data/circo/README.md
says what has to lie there. Killed builds are continued by the same command.

With --features=BACKBONE and --name, writes a prepared dataset again with features in the place of
its images: a fraction of the bytes for methods that train on features (data/features.py).

With --check and --source, says what is missing in DIR and whether the counts are the official ones,
and builds nothing. With --check alone, reads every record of the built tables and decodes every
image. --report=FILE.json writes all that was found: every missing id, damaged file, lost query.
Exit status: 0 = good and complete, 1 = checked and not complete, 2 = error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

from launch import ending, pixel_limit  # noqa: E402

_DATASET = flags.DEFINE_string("dataset", "shapes", "Name of the dataset.")
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Folder of the files it is made of; of pairs, masked_pairs, texts, text_triplets and "
    "image_triplets, hf:ORG/NAME[@REVISION][:CONFIG], too: a dataset of the Hugging Face hub, "
    "streamed (extra `hub`).",
)
_SPLIT = flags.DEFINE_string(
    "split", "", "Split of hf:ORG/NAME to read; default train, or the only one it has."
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Entries of a corpus to read, from the first on; default all."
)
_TABLES = flags.DEFINE_list("tables", None, "Tables to build, separated by commas; default all.")
_SPLITS = flags.DEFINE_list("splits", None, "Splits to build; default all whose files are there.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where datasets lie; default $CIR_JAX_DATA, else ~/.cache/cir_jax/data."
)
_NAME = flags.DEFINE_string(
    "name", None, "What to call it there, if you have several of its kind; default the dataset."
)
_CHECK = flags.DEFINE_bool("check", False, "Check the files or tables instead of building.")
_ALLOW_PARTIAL = flags.DEFINE_bool(
    "allow_partial", False, "Build from incomplete files; results will be marked as partial."
)
_IMAGES = flags.DEFINE_enum(
    "images",
    "copy",
    ["copy", "link"],
    "copy: into the tables; link: the tables name your files, which must then stay where they are.",
)
_REPORT = flags.DEFINE_string("report", None, "File for all that was found in --source, as JSON.")
_DECODE = flags.DEFINE_bool(
    "decode", True, "Decode each image to find damaged ones; --nodecode only looks for the files."
)
_COLUMNS = flags.DEFINE_list(
    "columns",
    None,
    "FIELD=COLUMN,... or MAPPING.json: what the columns of your files are called; for pairs, "
    "masked_pairs, texts, text_triplets and image_triplets, see the README of each.",
)
_FEATURES = flags.DEFINE_string(
    "features",
    "",
    "Backbone: the dataset, which is prepared already, is written again with its image features in "
    "the place of the images, as --name.",
)
_PREPROCESSING = flags.DEFINE_string(
    "preprocessing", "", "With --features: config.preprocessing of the experiments that read them."
)
_SEGMENTER = flags.DEFINE_string(
    "segmenter",
    "",
    "CLIPSeg that makes the masks of masked_pairs: a directory or hub id; default "
    "CIDAS/clipseg-rd64-refined (extra `clipseg`).",
)
_KEYWORDS = flags.DEFINE_string(
    "keywords",
    "spacy",
    "What finds the nouns of masked_pairs: spacy, or a JSON file of parts of speech.",
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from cir_jax.errors import CirError, DataError

    try:
        pixel_limit.apply()
        if _REPORT.value and _SOURCE.value is None:
            raise DataError("--report says what is in --source=DIR: give both.")
        if _FEATURES.value:
            _build_features()
        elif not _CHECK.value:
            _build()
        elif _SOURCE.value is None:
            _check_tables()
        else:
            _check_source()
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _build() -> None:
    from data import build, corpus

    ending.phase("building", "finished shards are kept")
    folders = build.prepare(
        _DATASET.value,
        _TABLES.value,
        _DATA_DIR.value,
        source=_SOURCE.value,
        name=_NAME.value,
        splits=_SPLITS.value,
        allow_partial=_ALLOW_PARTIAL.value,
        decode=_DECODE.value,
        columns=corpus.parse_columns(_COLUMNS.value or ()),
        link=_IMAGES.value == "link",
        report=Path(_REPORT.value).expanduser() if _REPORT.value else None,
        segmenter=_SEGMENTER.value,
        keywords=_KEYWORDS.value,
        split=_SPLIT.value,
        limit=_LIMIT.value,
    )
    for table, folder in folders.items():
        print(f"{table}: {folder}")


def _build_features() -> None:
    from data import features

    if _CHECK.value or _SOURCE.value is not None:
        from cir_jax.errors import ConfigError

        raise ConfigError("--features are made of prepared tables: leave out --source and --check.")
    ending.phase("computing features", "finished shards are kept")
    folders = features.prepare(
        _DATASET.value,
        _FEATURES.value,
        _NAME.value,
        _TABLES.value,
        _DATA_DIR.value,
        preprocessing=_PREPROCESSING.value,
    )
    for table, folder in folders.items():
        print(f"{table}: {folder}")


def _check_tables() -> None:
    from data import build

    counts = build.check(_DATASET.value, _TABLES.value, _DATA_DIR.value, _NAME.value)
    for table, splits in counts.items():
        if not splits:
            print(f"{table}: not there (it may be left out)")
            continue
        folder = build.table_dir(_DATASET.value, table, _DATA_DIR.value, _NAME.value)
        partial = ", ".join(build.incomplete_splits(folder))
        verdict = f"good, but made of incomplete files of {partial}" if partial else "good"
        print(f"{table}: {', '.join(f'{s} {n}' for s, n in splits.items())}: {verdict}")


def _check_source() -> None:
    from data import build, corpus

    splits = tuple(_SPLITS.value) if _SPLITS.value else None
    how = "survey" if _DECODE.value else "never"
    columns = corpus.parse_columns(_COLUMNS.value or ())
    options = build.Options(splits, how, columns=columns, split=_SPLIT.value, limit=_LIMIT.value)
    found = build.survey(_DATASET.value, _SOURCE.value, options)
    print(build.describe(found))
    if _REPORT.value:
        path = Path(_REPORT.value).expanduser()
        build.write_report(path, _DATASET.value, found)
        print(f"report: {path}")
    complete = all(report.complete for report in found.reports.values())
    but = ", but for what is left out" if found.skipped else ""
    print(f"complete{but}" if complete else "not complete: --allow_partial builds what there is")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    ending.run(lambda: app.run(main))
