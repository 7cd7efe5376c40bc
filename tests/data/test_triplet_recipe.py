"""Templates, keywords, alternatives and edits of RTD's and CompoDiff's triplets."""

import collections
import json
import random

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.input.keywords import DictionaryTagger
from data.text_triplets import editing, templates, vocabulary
from data.text_triplets.editing import Rules, replaced, with_articles
from data.text_triplets.vocabulary import Keyword

TAG = DictionaryTagger(
    {**dict.fromkeys("star heart ring model orange".split(), "NOUN")}
    | {**dict.fromkeys("automobile red blue".split(), "ADJ"), "$5": "NOUN", "_": "NOUN"}
)


def test_templates_are_those_of_the_papers():
    rtd, compodiff = templates.RTD, templates.COMPODIFF
    assert len(set(rtd)) == len(rtd) == 48 and len(set(compodiff)) == len(compodiff) == 46
    kinds = collections.Counter(map(templates.kind, rtd))
    assert kinds == {"exchange": 30, "target only": 9, "deletion": 9}
    assert set(rtd) - set(compodiff) == {
        "choose {target} instead of {source}", "has no {source}", "show no {source}",
        "no {source}", "remove {source}", "delete {source}", "not a {source}",
        "with no {source}", "without {source}",
    }  # fmt: skip
    assert set(compodiff) - set(rtd) == {
        "{target}", "choose {target} instead", "{target} is the new option",
        "use {target} from now on", "remodel {source} into {target}",
        "revamp {source} into {target}", "{target} is the updated version",
    }  # fmt: skip
    assert [t for t in compodiff if templates.kind(t) == "deletion"] == ["{source} is removed"]
    for template in {*rtd, *compodiff}:
        assert template.format(source="S", target="T").replace("S", "").isprintable()


@pytest.mark.parametrize(
    ("caption", "word", "other", "result"),
    [  # the first three are the examples of RTD's figure A.1
        ("what do you do with automobile model for $60 k", "automobile", "",
         "what do you do with model for $60 k"),
        ("a collage of oil pastel and acrylic paintings", "oil", "water",
         "a collage of water pastel and acrylic paintings"),
        ("another wall at my home", "wall", "bedroom", "another bedroom at my home"),
        ("a star by a star", "star", "orange", "an orange by an orange"),
        ("An orange star, red", "orange", "", "A star, red"),
        ("an orange", "orange", "", "a"),
        ("red, red and redder stars of Red", "red", "blue", "blue, blue and redder stars of blue"),
        ("a red-haired star", "red", "blue", "a red-haired star"),
        ("the star's ring", "star", "heart", "the heart's ring"),
        ("stars  by a  star", "star", "ring", "stars  by a  ring"),
        ("c++ by a star", "c", "d", "d++ by a star"),
        ("star", "star", "", ""),
    ],
)  # fmt: skip
def test_exchange_and_deletion_of_whole_words(caption, word, other, result):
    assert replaced(caption, word, other) == result


def test_articles():
    text = "a apple an star a hour a unicorn an umbrella an European a one A orange banana a"
    fit = "an apple a star an hour a unicorn an umbrella a European a one An orange banana a"
    assert with_articles(text) == fit


def test_keywords_of_a_caption():
    found = vocabulary.keywords("red Red star by an automobile model _ $5", TAG, {"NOUN", "ADJ"})
    assert found == [
        Keyword("ADJ", "red", False),  # no word of the caption is a keyword for TAG but as it is
        Keyword("NOUN", "star", False),
        Keyword("ADJ", "automobile", True),
        Keyword("NOUN", "model", False),
    ]
    assert vocabulary.keywords("red star and star", TAG, {"NOUN"}) == [("NOUN", "star", False)]
    # a modifier here, none there
    found = vocabulary.keywords("red star is red", TAG, {"NOUN", "ADJ"})
    assert found[0] == ("ADJ", "red", False)


def test_frequent_keywords():
    counts = {("NOUN", "star"): 5, ("ADJ", "red"): 4, ("NOUN", "ring"): 3}
    assert vocabulary.frequent(counts, 4) == [("ADJ", "red"), ("NOUN", "star")]
    with pytest.raises(DataError, match="'star', is in 5.*--min_count.*--parts"):
        vocabulary.frequent(counts, 6)
    with pytest.raises(DataError, match="there is none"):
        vocabulary.frequent({}, 1)


@pytest.fixture(scope="module")
def some():
    rng = np.random.default_rng(0)
    keys = sorted((part, f"{part}{i}") for part in ("ADJ", "NOUN") for i in range(40))
    return keys, rng.standard_normal((80, 5)).astype(np.float32) * 3


def test_alternatives_are_those_within_the_band(some, monkeypatch, tmp_path):
    keys, features = some
    whole = vocabulary.build(keys, features, (0.2, 0.7), seed=0, limit=99)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    count = 0
    for i, key in enumerate(keys):
        near = {
            other[1]
            for j, other in enumerate(keys)
            if 0.2 <= unit[i] @ unit[j] <= 0.7 and i != j and key[0] == other[0]
        }
        assert set(whole.alternatives(key)) == near
        count += bool(near)
    assert whole.replaceable == count and key in whole and ("NOUN", "ADJ0") not in whole
    assert whole.alternatives(("X", "?")) == ()
    pairs = (unit @ unit.T)[np.triu_indices(80, 1)]
    np.testing.assert_allclose(vocabulary.spread(features), np.quantile(pairs, (0.1, 0.5, 0.9)))
    assert vocabulary.spread(features[:1]) == (0, 0, 0)
    assert len(np.unique(np.round(vocabulary.spread(features, 10), 6))) == 3
    monkeypatch.setattr(vocabulary, "_CELLS", 3 * 80)  # three rows at a time
    parts = vocabulary.build(keys, features, (0.2, 0.7), seed=0, limit=99)
    np.testing.assert_array_equal(whole.indices, parts.indices)
    np.testing.assert_array_equal(whole.starts, parts.starts)
    few = vocabulary.build(keys, features, (0.2, 0.7), seed=0, limit=3)
    assert all(len(few.alternatives(k)) == min(3, len(whole.alternatives(k))) for k in keys)
    assert all(set(few.alternatives(k)) <= set(whole.alternatives(k)) for k in keys)
    other = vocabulary.build(keys, features, (0.2, 0.7), seed=1, limit=3)
    assert (few.indices != other.indices).any()
    few.write(tmp_path / "v.npz")
    read = vocabulary.Vocabulary.read(tmp_path / "v.npz")
    assert all(read.alternatives(k) == few.alternatives(k) for k in keys)
    (tmp_path / "v.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match="v.npz: damaged.*begin again"):
        vocabulary.Vocabulary.read(tmp_path / "v.npz")


def words(*names: str) -> vocabulary.Vocabulary:
    """Nouns that may all be exchanged for each other."""
    keys = sorted(("NOUN", name) for name in names)
    return vocabulary.build(keys, np.ones((len(keys), 2)), (0.9, 1), seed=0)


def drawn(caption, known, rules, n=400):
    found = vocabulary.keywords(caption, TAG, {"NOUN", "ADJ"})
    return [t for i in range(n) for t in editing.triplets(caption, found, known, rules,
                                                         random.Random(i))]  # fmt: skip


def test_triplets_of_a_caption():
    known, caption = words("star", "heart", "ring"), "a star by a ring"
    made = drawn(caption, known, Rules({"": templates.RTD}))
    assert all(t.reference == caption for t in made) and len(made) == 400
    # heart is the one alternative that is not there already
    deleted = {"a by a ring", "a star by a"}
    assert {t.target for t in made} == {"a heart by a ring", "a star by a heart"} | deleted
    for t in made:
        assert (t.target in deleted) == (t.kind == "deletion")
    kinds = collections.Counter(t.kind for t in made)
    assert abs(kinds["deletion"] / 400 - 9 / 48) < 0.06
    assert len({t.text for t in made}) > 60
    assert drawn(caption, known, Rules({"": templates.RTD})) == made


def test_deletions_of_modifiers_alone():
    keys = [("ADJ", "red"), ("NOUN", "star")]
    known = vocabulary.build(keys, np.ones((2, 2)), (0.9, 1), seed=0)  # nothing to exchange
    rules = Rules({"": templates.RTD})
    assert {t.target for t in drawn("a red star", known, rules)} == {"a star", "a red"}
    rules = Rules({"": templates.RTD}, deletions="modifiers")
    assert {t.target for t in drawn("a red star", known, rules)} == {"a star"}
    assert drawn("a star is red", known, rules) == []
    assert drawn("star", known, Rules({"": templates.RTD})) == []  # nothing would be left
    assert drawn("an ox", known, rules) == []
    only = Rules({"ADJ": ["no {source}"], "": ["without {source}"]})
    texts = {(t.target, t.text) for t in drawn("a red star", known, only)}
    assert texts == {("a star", "no red"), ("a red", "without star")}


def test_several_triplets_of_a_caption_are_different():
    known = words("star", "heart", "ring")
    rules = Rules({"": ["turn {source} into {target}"]}, per_caption=8)
    found = vocabulary.keywords("a star", TAG, {"NOUN"})
    made = editing.triplets("a star", found, known, rules, random.Random(0))
    assert {t.text for t in made} == {"turn star into heart", "turn star into ring"}
    assert len(made) == 2 and json.dumps([t.kind for t in made]) == '["exchange", "exchange"]'
