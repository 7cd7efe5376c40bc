"""Every composer on SigLIP backbones loaded from disk: texts are whole, and read with padding."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cir_jax import composers, weights
from cir_jax.composers import official
from cir_jax.composers.phrase_features import phrase_features
from cir_jax.composers.phrases import Phrases
from cir_jax.errors import ConfigError, DataError
from cir_jax.experiment import Experiment
from cir_jax.input import keywords
from cir_jax.input.phrases import PhraseBook
from cir_jax.sharding import mesh as meshes
from cir_jax.sharding import placement
from cir_jax.training import inputs
from experiments import base
from tests import tiny as factory
from tests.weights import siglip_worlds

# compiled once and run once: compiling is all that takes time
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TEXTS = ["is red", "Make it a blue star, and two cats!", "has * or $5 two cats"]
LENGTH = 16
BOOK = {
    "templates": ["a photo of a {}", "{} and it"],
    "concepts": {"star": ["a star is red", "two star and star"], "cat": ["it has a cat", "cat"]},
}
TAGS = {"NOUN": ["star", "cats", "photo"], "ADJ": ["red", "blue"]}
SETTINGS = {
    "image_only": {},
    "text_only": {},
    "image_text": {},
    "slerp": {"alpha": 0.6},
    "pic2word": {"hidden_dim": 16, "dropout": 0.0},
    "searle_oti": {"top_k": 2, "iterations": 3},
    "searle": {"top_k": 2},
    "lincir": {},
    "palavra": {"hidden_dim": 16, "refine_steps": 2, "templates": ("a photo of {}", "{} is it")},
    "compodiff": {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2, "steps": 1},
}
VERSION = {name: 1 + i % 2 for i, name in enumerate(SETTINGS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    contents = {"phrases": BOOK, "objects": {"star": ["red"], "cat": ["blue"]}, "tags": TAGS}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in contents}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Version -> (backbone, params)."""

    @functools.cache
    def load(version):
        folder = tmp_path_factory.mktemp("siglip")
        weights.save(folder / "siglip", *siglip_worlds.make(folder, version, context_length=LENGTH))
        return weights.load(folder / "siglip")

    return load


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (4, 18, 18, 3), np.uint8)


@pytest.fixture(scope="module")
def build(loaded, files):
    """Name -> (composer, params, frozen)."""

    @functools.cache
    def make(name):
        backbone, params = loaded(VERSION[name])
        given = {key: files[key] for key in WANTS.get(name, ())}
        composer = composers.build(name, backbone, **SETTINGS[name], **given)
        return composer, jit(composer.init)(jax.random.key(0)), composer.freeze(params)

    return make


WANTS = {"searle_oti": ["phrases"], "searle": ["phrases"], "palavra": ["objects"]}


def batch_of(name, composer, images, files):
    """What the method is trained on."""
    backbone, rows = composer.backbone, len(images)
    captions = [*TEXTS, "a photo of a red star"]
    if name == "lincir":
        masked = keywords.MaskedCaptions(backbone.tokenizer, keywords.tagger(files["tags"]))
        rng = np.random.default_rng(0)
        made = [masked.random_map({"captions": [text.encode()]}, rng) for text in captions]
        assert all((row["masked_token_ids"] == composer.placeholder_id).any() for row in made)
        return {key: np.stack([row[key] for row in made]) for key in made[0]}
    if name == "palavra":
        return {
            "reference_images": np.stack([images, images[::-1]], axis=1),
            "label": np.arange(rows, dtype=np.int32) % 2,
            "augmented": np.arange(rows, dtype=np.int32) % 2,
            "token_ids": np.stack([backbone.tokenizer(["a dog", t]) for t in captions]),
            "augmented_token_ids": np.stack([backbone.tokenizer([t, "a cat"]) for t in captions]),
        }
    words = np.random.default_rng(1).normal(size=(rows, backbone.token_dim)).astype(np.float32)
    return {"reference_images": images, "pseudo_words": words}


@pytest.mark.parametrize("name", SETTINGS)
def test_composes_the_same_batched_and_alone(build, images, name):
    composer, trained, frozen = build(name)
    backbone = composer.backbone
    assert backbone.family == "siglip" and backbone.reads_padding
    compose = jit(composer.compose)

    def run(rows):
        query = {
            "reference_images": images[rows],
            "token_ids": backbone.tokenizer([composer.prompt(TEXTS[row]) for row in rows]),
            "query_index": np.asarray(rows, np.int32),
        }
        assert query["token_ids"].shape == (len(rows), LENGTH)
        if hasattr(composer, "placeholder_id"):  # the texts' own marks are punctuation
            first = (query["token_ids"] == composer.placeholder_id).argmax(axis=1)
            assert (first == first[0]).all() and first[0] > 0
        return np.asarray(compose(trained, frozen, query, jax.random.key(1)))

    together = run([0, 1, 2])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(run([2, 0, 2])[0], together[2], atol=2e-5)
    if name in ("searle_oti", "palavra"):  # they optimise, so the batch might come in
        np.testing.assert_allclose(run([2])[0], together[2], atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    if name == "image_only":
        gallery = jit(composer.embed_gallery)(trained, frozen, images)
        found = np.diag(composer.score(trained, together, gallery))
        np.testing.assert_allclose(found, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["pic2word", "searle", "lincir", "palavra"])
def test_trains(build, images, files, name):
    composer, trained, frozen = build(name)
    batch = batch_of(name, composer, images, files)

    def step(params, frozen, batch):
        """The loss, and parameters a little further down its slope."""
        function = jax.value_and_grad(composer.loss, has_aux=True)
        (loss, _), gradient = function(params, frozen, batch, jax.random.key(1))
        rate = 0.01 / optax.tree.norm(gradient)
        return loss, jax.tree.map(lambda x, g: x - rate * g, params, gradient)

    step = jit(step)
    first, params = step(trained, frozen, batch)
    second, _ = step(params, frozen, batch)
    assert np.isfinite(first) and second < first


def test_a_step_over_a_mesh_that_shards_the_towers(build, images, files):
    composer, trained, frozen = build("pic2word")
    batch = batch_of("pic2word", composer, images, files)
    expected = jit(composer.loss)(trained, frozen, batch, jax.random.key(1))[0]
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = placement.place(mesh, trained), placement.place(mesh, frozen)
    loss, _ = jit(composer.loss)(*placed, placement.global_batch(mesh, batch), jax.random.key(1))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


def test_parameters_are_sharded_like_those_of_other_towers(loaded):
    mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    found = placement.parameter_shardings(mesh, loaded(1)[1])
    pool, text = found["vision"]["pool"], found["text"]
    for tree in (pool["pool_attention"]["query"], pool["fc1"], text["layers_0"]["fc1"]):
        assert tree["kernel"].spec == P("fsdp", "tensor")
    for tree in (pool["pool_attention"]["out"], pool["fc2"]):
        assert tree["kernel"].spec == P("tensor", "fsdp")


def test_a_texts_own_marks_are_not_replaced(build):
    """Nor do they reach a method without pseudo-words."""
    composer = build("pic2word")[0]
    ids = composer.backbone.tokenizer([composer.prompt("two * or $ cats")])
    assert (ids == composer.placeholder_id).sum() == 1
    assert composer.prompt("") == "a photo of *"
    plain = build("image_text")[0]
    own = plain.backbone.tokenizer([plain.prompt("two * or $ cats")])
    assert (own == plain.backbone.tokenizer(["two or cats"])).all()


def test_compodiff_conditions_on_what_the_tower_was_trained_to_give(build):
    composer, _, frozen = build("compodiff")
    backbone = composer.backbone
    ids = backbone.tokenizer(TEXTS)
    expected = jit(backbone.text_hidden_states)(frozen["backbone"], ids)
    np.testing.assert_allclose(jit(composer.hidden_states)(frozen, ids), expected, atol=1e-5)


def test_training_reads_whole_texts(build, monkeypatch):
    """The pipeline cuts no padding off, and captions' own marks are punctuation."""
    composer, _, frozen = build("image_text")
    backbone = composer.backbone
    table = factory.caption_table(4)
    for record in table.records:
        record["captions"] = [b"a * cat $"]
    monkeypatch.setattr(inputs, "Table", lambda *args: table)
    config = base.experiment("test", {"name": "image_text"})
    config.stage.train = base.stage(
        tables={"captions": 1.0}, batch_size=4, duration="1 steps", optimizer={}
    )
    mesh = meshes.make_mesh({"data": -1})
    experiment = Experiment(config, mesh, backbone, composer, frozen)
    (batch,) = inputs.make_pipeline(experiment, "train").batches(0, 1)
    assert batch["token_ids"].shape == (4, LENGTH)
    assert (batch["token_ids"] == backbone.tokenizer(["a cat"])).all()


def test_phrases_stay_whole(loaded):
    """No column is cut off, though none of the texts is longer than six tokens."""
    backbone, params = loaded(2)
    book = PhraseBook(tuple(BOOK["templates"]), {k: tuple(v) for k, v in BOOK["concepts"].items()})
    phrases = Phrases.tokenise(book, backbone, 1, every=True)
    tables = phrases.tables
    assert tables.original.ids.shape == tables.replaced.ids.shape == (4, LENGTH)
    assert phrases.usual == (LENGTH, LENGTH) and phrases.templates.ids.shape == (2, LENGTH)
    assert not tables.replaced.prefix.any() and not tables.original.prefix.any()
    assert all((of.lengths == LENGTH).all() for of in (tables.original, tables.replaced))
    placeholder = backbone.tokenizer.id_of("$")
    assert (tables.replaced.ids == placeholder).sum(axis=1).tolist() == [1, 2, 1, 1]
    features = phrase_features(phrases.ids, backbone, params)
    expected = backbone.encode_text(params, backbone.tokenizer(list(BOOK["concepts"]["cat"])))
    np.testing.assert_allclose(features[2:], expected, atol=1e-5)


def test_pic2word_takes_the_scale_of_the_weights(build, images):
    composer, trained, frozen = build("pic2word")
    scale = float(np.exp(frozen["backbone"]["logit_scale"]))
    features = {"reference_features": np.ones((2, composer.backbone.dim), np.float32)}
    rows = jit(composer.encode)(trained, frozen, features, jax.random.split(jax.random.key(0)))
    np.testing.assert_allclose(np.linalg.norm(rows["image"], axis=1), scale, rtol=1e-5)
    with pytest.raises(ConfigError, match="Pic2Word on a siglip backbone has no official"):
        official.check_known(composer, "config.export_to=f.pt")


def test_a_shorter_text_is_refused(loaded):
    backbone, params = loaded(1)
    ids = backbone.tokenizer(["a red cat"])
    for read in (backbone.encode_text, backbone.text_hidden_states):
        with pytest.raises(DataError, match="texts of 8 tokens: backbone siglip@.* trained on 16"):
            read(params, ids[:, :8])


def test_what_is_for_other_families_is_refused(loaded):
    backbone, params = loaded(1)
    with pytest.raises(ConfigError, match="clip_pretraining trains a CLIP, and backbone siglip@"):
        composers.build("clip_pretraining", backbone)
    with pytest.raises(
        ConfigError, match="siglip@.*: a SIGLIP has no matching encoder. Use a BLIP"
    ):
        backbone.match(params, np.ones((1, LENGTH), np.int32), np.zeros((1, 4, 32)))
