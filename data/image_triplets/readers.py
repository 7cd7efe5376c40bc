"""Where image triplets come from: Parquet or tar files, or the training split of a benchmark."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from data import corpus, formats, hub, tars
from data.benchmark import AbsentError, BenchmarkBuilder, Question
from data.cirr.cirr_dataset_builder import Cirr
from data.corpus import Corpus, Entry, Unusable
from data.fashioniq.fashioniq_dataset_builder import Fashioniq

IMAGES = ("reference", "target")
CAPTIONS = ("reference_caption", "target_caption")
FIELDS = {  # ours; those of InstructPix2Pix's pairs, of their samples, of MagicBrush
    "reference": ("reference", "original_image", "input_image", "source_img"),
    "target": ("target", "edited_image", "target_img"),
    "text": ("text", "edit_prompt", "instruction"),
    "reference_caption": ("reference_caption", "original_prompt"),
    "target_caption": ("target_caption", "edited_prompt"),
}
TAR_FIELDS = {
    **{name: tuple(f"{name}.{s}" for s in ("jpg", "jpeg", "png", "webp")) for name in IMAGES},
    "text": ("txt", "json.text"),
    **{name: (f"json.{name}",) for name in CAPTIONS},
}
_STRIPPED = ".?, "  # from both ends of FashionIQ's captions, as CLIP4Cir does


def find(source: formats.Source, columns: Mapping[str, str]) -> Corpus:
    """The reader that fits the source. Raises DataError when none does."""
    if isinstance(source, hub.Dataset):
        suffixes = {file.suffix for file in source.of_types((".parquet", ".tar"))}
    else:
        there = source.iterdir() if source.is_dir() else [source]
        suffixes = {path.suffix for path in there}
    if ".parquet" in suffixes:
        return Parquet(source, columns)
    if ".tar" in suffixes:
        return Shards(source, columns)
    if columns:
        raise DataError(f"--columns: there are no .parquet or .tar files in {source}.")
    for benchmark in (Fashioniq, Cirr):
        try:
            return Train(source, benchmark)
        except AbsentError:
            pass
    raise DataError(
        f"--source={source}: holds no image triplets.\nExpected .parquet or .tar files, or the "
        f"training split of one of these:\n{Fashioniq.HELP.strip()}\n{Cirr.HELP.strip()}"
    )


class Parquet:
    """Rows with two images, as bytes or as Hugging Face's {"bytes", "path"}, and a text."""

    unit, images = "bytes", IMAGES

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, (".parquet",)))
        self.total = formats.total_bytes(self.files)
        names = corpus.names(FIELDS, columns, "image triplets")
        self.optional = {field: names.pop(field) for field in CAPTIONS if field not in columns}
        self.names = names
        for file in self.files:
            corpus.pick(formats.parquet_columns(file), names, str(file))

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        names = {f: n for f, n in self.names.items() if contents or f not in IMAGES}
        for item in formats.rows(self.files, names, self.optional, start):
            try:
                texts = _texts(formats.row(item))
            except Unusable as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                load = functools.partial(_from_row, item.value, texts)
                yield Entry(item.where, item.done, load, empty=not texts["text"].strip())


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {field: corpus.text(row.get(field), field) for field in ("text", *CAPTIONS)}


def _from_row(row: Mapping[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    images = {}
    for field in IMAGES:
        images[field] = corpus.image_bytes(row[field], field)
    return {**images, **texts, "texts": [texts["text"]]}


class Shards:
    """Tar shards in WebDataset's layout: KEY.reference.jpg, KEY.target.jpg, KEY.txt or KEY.json."""

    unit, images = "bytes", IMAGES

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, (".tar",)))
        self.total = formats.total_bytes(self.files)
        names = corpus.names(TAR_FIELDS, columns, "image triplets")
        self.optional = {field: names.pop(field) for field in CAPTIONS if field not in columns}
        self.names = names

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        return itertools.islice(self._entries(), start, None)

    def _entries(self) -> Iterator[Entry]:
        for item in tars.samples(self.files):
            try:
                sample = tars.Sample(formats.row(item))
                found = corpus.pick(sample.columns, self.names, "the sample")
                found |= corpus.some(sample.columns, self.optional)
                images = {field: sample.member(found.pop(field)) for field in IMAGES}
                texts = dict.fromkeys(CAPTIONS, "")
                texts |= {field: sample.text(column) for field, column in found.items()}
            except DataError as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                load = functools.partial(_from_tar, images, texts)
                yield Entry(item.where, item.done, load, empty=not texts["text"].strip())


def _from_tar(images: Mapping[str, tars.Member], texts: dict[str, str]) -> dict[str, Any]:
    read = {field: member.read() for field, member in images.items()}
    return {**read, **texts, "texts": [texts["text"]]}


class Train:
    """The training split of a benchmark: its queries with their targets.

    `text` is the one text of the query; of FashionIQ's two "{first} and {second}", stripped.
    `texts` are all of them as they are.
    """

    unit, images = "triplets", IMAGES

    def __init__(self, source: Path, benchmark: type[BenchmarkBuilder]):
        """Raises AbsentError when the source is no such benchmark, DataError when it is damaged."""
        raw = benchmark.read(source, "train")
        if raw.missing:
            raise DataError(f"{raw.missing[0]}: no such file, although others of the split are.")
        self.source, self.files = source, ()
        self.paths = {picture.key: picture.path for picture in raw.pictures}
        self.questions = raw.questions
        self.total = len(self.questions)

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        for number, question in enumerate(self.questions[start:], start + 1):
            names = (question.reference, question.targets[0])
            paths, stamp, problem = [], [names, question.texts], ""
            for name in names:
                if name not in self.paths:
                    raise DataError(f"{question.where}: image {name} is in no list of the split.")
                paths.append(self.paths[name])
                wrong, status = corpus.stat_image(paths[-1])
                problem, stamp = problem or wrong, [*stamp, status]
            load = functools.partial(_from_files, paths, question)
            empty = not any(text.strip(_STRIPPED) for text in question.texts)
            yield Entry(question.where, number, load, problem, empty, tuple(stamp))


def _from_files(paths: list[Path], question: Question) -> dict[str, Any]:
    texts = list(question.texts)
    stripped = [text.strip(_STRIPPED) for text in texts]
    joined = texts[0] if len(texts) == 1 else " and ".join(text for text in stripped if text)
    images = {field: corpus.read_image(path) for field, path in zip(IMAGES, paths, strict=True)}
    return {**images, "text": joined, **dict.fromkeys(CAPTIONS, ""), "texts": texts}
