"""Text triplets of the embedded world: the same on every machine, true, in the world's words."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from data.shapes import captioned, language, words
from data.shapes import text_triplets as world
from data.text_triplets import embedders

KIND = {word: part for part, these in world.PARTS.items() for word in these}
TABLES = (words.COLOUR_WORDS, words.SIZE_WORDS, words.BACKGROUND_WORDS, words.SHAPE_WORDS)
MEANING = {word: forms[0] for table in TABLES for forms in table for word in forms}
MEANING |= {words.plural(w): words.plural(MEANING[w]) for w in world.PARTS["SHAPE"]}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(world.records("train", 400))


def test_what_is_exchanged_is_of_one_kind_and_another_thing(records):
    assert [r["id"] for r in records] == list(range(400))
    exchanged = collections.Counter()
    for record in records:
        before, after = (record[f"{w}_caption"].split() for w in ("reference", "target"))
        if len(before) != len(after):  # a modifier is gone, with its article made to fit
            gone = collections.Counter(before) - collections.Counter(after)
            gone = {word for word in gone if word not in ("a", "an")}
            assert len(gone) == 1 and gone <= set(KIND) and gone <= set(record["text"].split())
            exchanged["gone"] += 1
            continue
        changed = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
        changed -= {("a", "an"), ("an", "a")}
        ((old, new),) = changed
        assert KIND[old] == KIND[new] and MEANING[old] != MEANING[new]
        assert new in record["text"].split() and old not in after
        exchanged[KIND[old]] += 1
    assert set(exchanged) == {*world.PARTS, "gone"}
    assert 0.1 < exchanged["gone"] / len(records) < 0.3


def test_they_are_said_in_the_worlds_words(records):
    known = set(words.vocabulary())
    captions = {c for _, several in captioned.scenes("captions", "train", 400) for c in several}
    for record in records:
        assert record["reference_caption"] in captions
        for field in ("reference_caption", "target_caption", "text"):
            assert set(record[field].split()) <= known
            assert len(record[field].split()) <= language.MAX_WORDS
            assert record[field] == language._finish(record[field])
            assert " an " not in re.sub(r"\ban (?=[aeio])", "", f" {record[field]}")
    assert len({r["text"] for r in records}) > 200


def test_they_are_the_same_on_every_machine(records):
    # Change it only together with VERSION in shapes_dataset_builder.py.
    text = json.dumps(records[:100])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1a773ba9579e9e25"
    encode = embedders.text_tower(world.CLIP).encode
    for part in ("COLOUR", "SIZE", "BACKGROUND", "SHAPE", "SHAPES"):
        features = encode(sorted(world.PARTS[part]))
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        cosines = (features @ features.T)[np.triu_indices(len(features), 1)]
        for edge in world.BAND:  # no rounding moves one over an edge
            assert np.abs(cosines - edge).min() > 0.02
