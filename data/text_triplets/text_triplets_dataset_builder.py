"""TFDS builder of the table `text_triplets`: two captions and the text between them."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from data import corpus, formats
from data.corpus import CorpusBuilder, Entry, Unusable
from data.source import Options, Survey, tables

FIELDS = {  # RTD's code calls them so; then its paper, and InstructPix2Pix
    "reference_caption": ("reference_caption", "source_caption", "input"),
    "target_caption": ("target_caption", "output"),
    "text": ("conditioning_caption", "relative_caption", "edit", "text"),
}
SUFFIXES = (".json", ".jsonl", ".parquet", ".tsv", ".csv")


class Triplets:
    """The rows of the files, those of a folder in the order of their names."""

    unit, images = "bytes", ()

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, SUFFIXES))
        self.total = formats.total_bytes(self.files)
        self.names = corpus.names(FIELDS, columns, "text triplets")

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        for item in formats.rows(self.files, self.names, start=start):
            try:
                row = formats.row(item)
                record = {field: corpus.text(row[field], field) for field in FIELDS}
            except Unusable as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                empty = not all(text.strip() for text in record.values())
                yield Entry(item.where, item.done, functools.partial(dict, record), empty=empty)


class TextTriplets(CorpusBuilder):
    """Text triplets: those of LLMs, of templates, of RTD and CompoDiff."""

    BUILDER_CONFIGS = tables("text_triplets")
    HELP = "A file, or a folder of files, of type " + ", ".join(SUFFIXES) + "."
    HUB = True

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        return {field: tfds.features.Text() for field in FIELDS}

    @classmethod
    def survey(cls, source: formats.Source, options: Options) -> Survey:
        corpus_ = Triplets(source, options.columns)
        return corpus.survey(corpus_, "text_triplets", "text triplets", options)
