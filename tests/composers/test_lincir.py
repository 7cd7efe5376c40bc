"""LinCIR: which words are masked, and its loss. Values of the original are in tests/golden."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import official
from cir_jax.composers.base import normalise
from cir_jax.composers.lincir import LinCir
from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input import keywords
from data.shapes.speech import parts_of_speech
from data.shapes.words import vocabulary
from tests import tiny as factory
from tests.composers import inversion

TAGS = {"NOUN": ["photo", "star", "cat"], "ADJ": ["red"], "DET": ["a"], "X": ["of", "that"]}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    file = tmp_path_factory.mktemp("tags") / "tags.json"
    file.write_text(json.dumps(TAGS))
    return keywords.tagger(str(file))


@pytest.fixture(scope="module")
def made(tiny):
    backbone, backbone_params = tiny
    composer = LinCir(backbone)
    return composer, jax.jit(composer.init)(jax.random.key(0)), composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def batch(tiny):
    captions = [record["captions"][0].decode() for record in factory.caption_table(16).records]
    masked = [f"{caption} $ and $" for caption in captions]
    length = tiny[0].context_length
    ids, masked_ids = (tiny[0].tokenizer(texts, length) for texts in (captions, masked))
    return {"token_ids": ids, "masked_token_ids": masked_ids}


def test_the_loss_does_not_depend_on_devices_or_parts(made, batch):
    inversion.assert_independent_of_devices_and_parts(*made, batch)


def test_the_loss_is_that_of_the_full_length(made, tiny, batch):
    composer, params, frozen = made
    short = {name: ids[:, :13] for name, ids in batch.items()}
    assert all((ids[:, 12] == tiny[0].tokenizer.eos_id).all() for ids in short.values())
    inversion.assert_same(
        inversion.loss_and_gradient(composer, params, frozen, short),
        inversion.loss_and_gradient(composer, params, frozen, batch),
    )


def test_noise_is_of_each_row_and_scaled(tiny):
    composer, half = LinCir(tiny[0]), LinCir(tiny[0], noise=0.5)
    keys = jax.random.split(jax.random.key(0), 64)
    draw = jax.jit(jax.vmap(lambda key: (composer.draw(key)[0], half.draw(key)[0])))
    noise, of_half = draw(keys)
    np.testing.assert_allclose(of_half, noise / 2, rtol=1e-6)
    norms = np.linalg.norm(noise, axis=1)
    # u * |n|, |n| about sqrt(24)
    assert norms.min() < 1 < 3.5 < norms.max() < 7


def test_normalised_input_is_for_queries_too(made, tiny):
    composer, params, frozen = made
    query = {"reference_features": inversion.features(tiny[0])}
    unit = {"reference_features": normalise(query["reference_features"])}
    other = LinCir(tiny[0], l2_normalize=True)
    asked = (other, query), (composer, unit), (composer, query)
    invert = jax.jit(lambda params: [c.invert(params, frozen, q, None) for c, q in asked])
    ours, same, plain = invert(params)
    np.testing.assert_allclose(ours, same, rtol=1e-5, atol=1e-6)
    assert np.abs(plain - ours).max() > 0.01


def test_every_placeholder_is_replaced(made, tiny):
    composer, params, frozen = made
    ids = tiny[0].tokenizer(["a $ and a $"])
    words = np.ones((1, 32), np.float32)

    @jax.jit
    def both(backbone):
        embedded = composer.backbone.embed_tokens(backbone, ids)
        embedded = jnp.where((ids == composer.placeholder_id)[..., None], 1.0, embedded)
        expected = composer.backbone.encode_text(backbone, ids, embedded)
        return composer.text_features(backbone, ids, words), expected

    np.testing.assert_allclose(*both(frozen["backbone"]), rtol=1e-5, atol=1e-6)


def test_keywords_are_runs(dictionary):
    assert keywords.keywords("a photo of a red star that is red", dictionary) == [
        "a photo", "a red star", "red",
    ]  # fmt: skip
    assert keywords.keywords("is not", dictionary) == []


class Draw:
    """A generator that always draws the same."""

    def __init__(self, number):
        self.number = number

    def integers(self, count):
        return self.number % count


@pytest.mark.parametrize(
    ("caption", "words", "expected"),
    [
        ("a photo of a red star", ["a photo", "a red star"], "$ of $"),
        ("red star on red", ["red star", "red"], "$ on $"),
        ("a cat is a star", ["a"], "$ c $ t is $ st $ r"),  # inside words too
        ("blue is far", [], "blue $ far"),  # the second word is drawn
        ("a star, is red", ["a star ,"], "a $ is red"),  # no substring: another word, then no more
        # double spaces hold an empty word: the release replaces it between all letters
        ("a  b", ["a b"], "$ a $ $ $ b $"),
        ("red   is a star", ["red", "a star", "is"], "$ is $"),
        ("", [], "$"),
    ],
)
def test_masking(caption, words, expected):
    masked = keywords.mask(caption, [w for w in words if w != "is"], Draw(1))
    assert " ".join(masked.split()) == expected


def test_captions_are_cleaned_and_cut(tiny):
    tokenizer = tiny[0].tokenizer
    assert keywords.clean(" <PERSON> Is $5 RED$ ", tokenizer) == "person is 5 red"
    long = "red star " * 20
    assert keywords.clean(long, tokenizer).split() == ("red star " * 7).split()


def test_examples(tiny, dictionary):
    tokenizer = tiny[0].tokenizer
    transform = keywords.MaskedCaptions(tokenizer, dictionary)
    texts = [b"that is A RED star$", b"is", b"", b"it has " * 7 + b"that is two and no a"]
    rng = np.random.default_rng(0)
    rows = [transform.random_map({"captions": [text]}, rng) for text in texts]
    expected = [
        ("that is a red star", "that is $"),
        ("is", "$"),
        ("", "$"),
        ("it has it has it has it has it has it has it has", "a photo of $"),
    ]
    for row, (caption, masked) in zip(rows[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(row["token_ids"], tokenizer([caption], 16)[0])
        np.testing.assert_array_equal(row["masked_token_ids"], tokenizer([masked], 16)[0])
    for row in rows:
        assert row["token_ids"].shape == row["masked_token_ids"].shape == (16,)
        assert tokenizer.id_of("$") in row["masked_token_ids"]


def test_the_dictionary_of_the_embedded_world():
    tags = parts_of_speech()
    words = [word for group in tags.values() for word in group]
    assert sorted(words) == sorted(vocabulary())
    stored = keywords.tagger("data/shapes/parts_of_speech.json")
    assert stored.tags == {word: tag for tag, group in tags.items() for word in group}
    assert keywords.keywords("make it red and add a big star", stored) == ["red", "a big star"]


@pytest.mark.peer
def test_spacy_finds_the_keywords(tmp_path):
    """With a pipeline of rules in place of the trained one, which has to be downloaded."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    for tag, words in parts_of_speech().items():
        rules.add([[{"LOWER": word}] for word in words], {"POS": tag})
    pipeline.to_disk(tmp_path / "rules")
    tag = keywords.SpacyTagger(str(tmp_path / "rules"))
    text = "a red star on a green background, two small squares"
    expected = ["a red star", "a green background", "small squares"]
    assert keywords.keywords(text, tag) == expected
    sent = pickle.dumps(tag)  # to worker processes, which load it again
    assert len(sent) < 1000
    keywords._spacy.cache_clear()
    assert keywords.keywords(text, pickle.loads(sent)) == expected


def test_no_keywords_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    keywords._spacy.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install cir_jax\[keywords\].*dictionary of parts"):
        keywords.tagger("spacy")
    with pytest.raises(DataError, match="none.json: no dictionary of parts of speech"):
        keywords.tagger(str(tmp_path / "none.json"))
    file = tmp_path / "tags.json"
    file.write_text('{"VERB": ["is"]}')
    with pytest.raises(DataError, match="tags.json: holds no keywords"):
        keywords.tagger(str(file))
    file.write_text("[1]")
    with pytest.raises(DataError, match="tags.json: not a dictionary of parts of speech"):
        keywords.tagger(str(file))


def test_official_files_come_back(made, tmp_path):
    torch = pytest.importorskip("torch")
    composer, params, frozen = made
    file = tmp_path / "lincir_large.pt"
    official.save(composer, file, params, frozen)
    stored = torch.load(file, weights_only=True)
    assert set(stored) == {"epoch", "Phi"}
    assert stored["Phi"]["layers.3.weight"].shape == (96, 96)
    again = official.load(composer, file, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    stored["Phi"]["layers.0.weight"] = torch.zeros(96, 20)
    torch.save(stored, file)
    with pytest.raises(
        WeightsError, match=r"lincir_large.pt on the backbone tiny@0 \(24, 32\): wr"
    ):
        official.load(composer, file, frozen)
    torch.save(stored | {"Extra": {"weight": torch.zeros(2)}}, file)
    with pytest.raises(WeightsError, match="holds parts that nothing takes: Extra"):
        official.load(composer, file, frozen)


def test_mistaken_settings(tiny):
    with pytest.raises(ConfigError, match="noise=-1: expected 0 or more"):
        LinCir(tiny[0], noise=-1)
    with pytest.raises(ConfigError, match="dropout=1"):
        LinCir(tiny[0], dropout=1)
