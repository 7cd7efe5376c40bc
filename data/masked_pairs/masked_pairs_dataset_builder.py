"""TFDS builder of the table `masked`: images with a text and the region that it is about."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from cir_jax.input import images, keywords, masks
from data import corpus, formats
from data.corpus import CorpusBuilder
from data.masked_pairs import clipseg
from data.pairs import readers
from data.source import Options, Split, Survey, stamp, tables

SEGMENTER = "CIDAS/clipseg-rd64-refined"
TOGETHER = 8
"""Images segmented at once."""


class MaskedPairs(CorpusBuilder):
    """Image-text pairs with masks of what the nouns of the text name, by CLIPSeg."""

    BUILDER_CONFIGS = tables("masked")
    HELP = (
        "What --dataset=pairs takes: a table (.tsv, .csv), a list (.json, .jsonl), or a folder of "
        "tar shards as img2dataset writes them. Masks by --segmenter, nouns by --keywords."
    )
    HUB = True

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        texts = tfds.features.Sequence(tfds.features.Text())
        return {"image": tfds.features.Text(), "mask": tfds.features.Text(), "captions": texts}

    @classmethod
    def survey(cls, source: formats.Source, options: Options) -> Survey:
        found = corpus.survey(readers.find(source, options.columns), "masked", "pairs", options)
        ((name, split),) = found.splits["masked"].items()
        segmenter, words = options.segmenter or SEGMENTER, options.keywords
        made = Split(
            functools.partial(_records, split.records, segmenter, words),
            stamp(split.stamp, str(segmenter), words, _settings()),
            split.count,
        )
        return dataclasses.replace(found, splits={"masked": {name: made}})


def _settings() -> list[float]:
    return [clipseg.THRESHOLD, clipseg.LEAST, clipseg.LARGEST, clipseg.MOST_WORDS]


def _records(
    pairs: Callable[[int], Iterable[dict[str, Any]]], segmenter: str, words: str, start: int
) -> Iterator[dict[str, Any]]:
    """The pairs from number `start` on, with masks; the first caption with nouns is the one."""
    tag, model = keywords.tagger(words), clipseg.ClipSeg.load(segmenter)
    rows = iter(pairs(start))
    while some := list(itertools.islice(rows, TOGETHER)):
        told = [_caption(record["captions"], tag) for record in some]
        pictures = [images.decode(row["image"], f"pair {row['id']}") for row in some]
        found = model.masks(pictures, [nouns for _, nouns in told])
        for record, (caption, _), mask in zip(some, told, found, strict=True):
            yield record | {"captions": [caption], "mask": masks.pack(mask)}


def _caption(captions: list[str], tag: keywords.Tagger) -> tuple[str, list[str]]:
    """A caption with its nouns, each once; without any, the first one as its own only word."""
    for caption in captions:
        nouns = [word for word, part in tag(caption) if part in ("NOUN", "PROPN")]
        if nouns:
            return caption, list(dict.fromkeys(nouns))
    return captions[0], [captions[0]]
