"""TFDS builder of the table `captions`: images with their texts."""

from typing import Any

import tensorflow_datasets as tfds

from data import corpus, formats
from data.corpus import CorpusBuilder
from data.pairs import readers
from data.source import Options, Survey, tables


class Pairs(CorpusBuilder):
    """Image-text pairs: CC3M, LLaVA's alignment data, LAION and the like."""

    BUILDER_CONFIGS = tables("captions")
    HELP = (
        "A table (.tsv, .csv) with the columns filepath and title, a list (.json, .jsonl) as "
        "LLaVA's or with image and caption, or a folder of tar shards as img2dataset writes them, "
        "or of .parquet files with the images in them."
    )
    HUB = True

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        texts = tfds.features.Sequence(tfds.features.Text())
        return {"image": tfds.features.Text(), "captions": texts}

    @classmethod
    def survey(cls, source: formats.Source, options: Options) -> Survey:
        return corpus.survey(readers.find(source, options.columns), "captions", "pairs", options)
