"""TFDS builder of the table `texts`: captions without images."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from data import corpus, formats
from data.corpus import CorpusBuilder, Entry, Unusable
from data.source import Options, Survey, tables

FIELDS = {"text": ("text", "caption", "title")}
SUFFIXES = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet")


class Captions:
    """The lines or rows of the files, those of a folder in the order of their names."""

    unit, images = "bytes", ()

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, SUFFIXES))
        self.total = formats.total_bytes(self.files)
        self.names = corpus.names(FIELDS, columns, "texts")

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        for item in formats.rows(self.files, self.names, start=start):
            try:
                text = corpus.text(formats.row(item)["text"], "text")
            except Unusable as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                load = functools.partial(dict, captions=[text])
                yield Entry(item.where, item.done, load, empty=not text.strip())


class Texts(CorpusBuilder):
    """Captions or prompts, one per record, as they are: methods clean them as their papers do."""

    BUILDER_CONFIGS = tables("texts")
    HELP = "A file, or a folder of files, of type " + ", ".join(SUFFIXES) + "."
    HUB = True

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        return {"captions": tfds.features.Sequence(tfds.features.Text())}

    @classmethod
    def survey(cls, source: formats.Source, options: Options) -> Survey:
        return corpus.survey(Captions(source, options.columns), "texts", "texts", options)
