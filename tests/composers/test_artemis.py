"""ARTEMIS: its score in blocks, its loss, several texts, tuned encoders. Values of the original are
in tests/golden, its files in tests/weights/test_artemis.py."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import artemis
from cir_jax.composers.artemis import Artemis
from cir_jax.composers.base import normalise
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation import captions, evaluate, protocols
from cir_jax.input import images, vocabulary
from cir_jax.input.records import AugmentedTriplets
from cir_jax.models import artemis as models
from cir_jax.models.artemis import ArtemisConfig, ResNetConfig, WordConfig
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval import features, ranking
from tests.composers import inversion
from tests.evaluation import worlds
from tests.tiny import drawn

DIM = 6


@pytest.fixture(scope="module")
def made(tiny):
    backbone, backbone_params = tiny
    composer = Artemis(backbone, embed_dim=DIM)
    params = jax.jit(composer.init)(jax.random.key(0))
    # weights at their start are nearly uniform: sharper ones show what is weighted
    for name in ("explicit", "implicit"):
        params[name]["out"]["kernel"] = 20 * params[name]["out"]["kernel"]
    return composer, params, composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def batch(tiny):
    texts = ["a red star", "blue and two circle", "no green", "it is that"]
    return {
        "reference_features": inversion.features(tiny[0]),
        "target_features": inversion.features(tiny[0], seed=1),
        "token_ids": tiny[0].tokenizer(texts * (inversion.ROWS // 4)),
    }


@pytest.fixture(scope="module")
def queries(made, batch):
    composer, params, frozen = made
    query = {name: batch[name] for name in ("reference_features", "token_ids")}
    return np.asarray(jax.jit(composer.compose)(params, frozen, query, jax.random.key(0)))


def by_pairs(composer, params, frozen, batch, gallery):
    """The score as the paper writes it, one query and one image at a time, in float64."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def layer(name, x):
        p = params[name[0]] if len(name) == 1 else params[name[0]][name[1]]
        return x @ np.float64(p["kernel"]) + np.float64(p["bias"])

    text = jax.jit(composer.backbone.encode_text)(frozen["backbone"], batch["token_ids"])
    m = unit(layer(["text_projection"], np.float64(text)))
    r = unit(layer(["image_projection"], np.float64(batch["reference_features"])))
    t = unit(layer(["image_projection"], np.float64(gallery)))
    attended = {}
    for name in ("explicit", "implicit"):
        logits = layer([name, "out"], np.maximum(layer([name, "hidden"], m), 0))
        attended[name] = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    transformed = unit(layer(["transform"], m))
    found = np.zeros((len(m), len(t)))
    for q in range(len(m)):
        for n in range(len(t)):
            em = transformed[q] @ unit(attended["explicit"][q] * t[n])
            a = attended["implicit"][q]
            found[q, n] = em + unit(a * r[q]) @ unit(a * t[n])
    return found


def test_matrix_products_give_the_papers_score(made, batch, queries):
    composer, params, frozen = made
    gallery = inversion.features(composer.backbone, 23, seed=2)
    expected = by_pairs(composer, params, frozen, batch, gallery)

    @jax.jit
    def scores(queries, gallery):
        """Of the gallery, and of one of which each feature is seven times as long."""
        embedded = composer.embed_features(params, frozen, gallery)
        return [composer.score(params, queries, factor * embedded) for factor in (1, 7)]

    for ours in scores(queries, gallery):  # neither norm counts
        np.testing.assert_allclose(ours, expected, atol=2e-6)
    # in blocks, from one feature for all methods, as evaluation and search do it
    embedded = features.embedded(composer, params, frozen, np.asarray(gallery), mesh=worlds.mesh(1))
    ranked = ranking.rank(
        queries, embedded, k=5, gallery_block=8, query_block=3, **ranking.scoring(composer, params)
    )
    np.testing.assert_array_equal(ranked.top, np.argsort(-expected, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(ranked.scores, -np.sort(-expected, axis=1)[:, :5], atol=2e-6)


def test_the_largest_array_has_no_dimension_of_pairs(made, queries):
    gallery = jax.ShapeDtypeStruct((4096, DIM), jnp.float32)
    compiled = jax.jit(artemis.scores).lower(jnp.asarray(queries), gallery).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < len(queries) * 4096 * 4 * 4  # a few arrays [queries, n]; dim would be 6


def test_weights_on_one_dimension_and_zeros_are_no_nan():
    direction = np.float32([[0.6, 0.8, 0.0]])

    def scores(weights, gallery, factor=1.0):
        query = jnp.concatenate(artemis.term(direction, weights), axis=-1)
        return artemis.scores(factor * query, normalise(gallery))

    @jax.jit
    def run(gallery):
        sharp = jax.nn.softmax(jnp.asarray([[200.0, 0.0, -200.0]]))
        weights = jnp.asarray([[0.5, 0.3, 0.2]])
        grad = jax.grad(lambda w: scores(w, gallery[:2]).sum())(weights)
        return scores(sharp, gallery), scores(sharp, gallery, 0.0), grad

    found, of_zeros, grad = run(np.float32([[1e-3, 1, 1], [-2, 5, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found, [[0.6, -0.6, 0.0]], atol=1e-6)
    assert not np.any(of_zeros)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-3


def test_the_loss_does_not_depend_on_devices_or_parts(made, batch):
    inversion.assert_independent_of_devices_and_parts(*made, batch)


def test_queries_are_the_same_one_by_one(made, batch, queries):
    composer, params, frozen = made
    one = {name: batch[name][3:4] for name in ("reference_features", "token_ids")}
    alone = jax.jit(composer.compose)(params, frozen, one, jax.random.key(5))
    np.testing.assert_allclose(alone, queries[3:4], rtol=1e-4, atol=1e-6)


def test_two_texts_score_as_the_mean_of_both(made, queries):
    composer, params, frozen = made
    pairs = queries[:8].reshape(4, 2, -1).copy()
    pairs[3, 1] = 0  # a query of one text

    @jax.jit
    def run(gallery):
        gallery = composer.embed_features(params, frozen, gallery)
        asked = queries, composer.joined(pairs)
        return [composer.score(params, each, gallery) for each in asked]

    scores, joined = map(np.array, run(inversion.features(composer.backbone, 9, seed=3)))
    expected = scores[:8].reshape(4, 2, -1).mean(axis=1)
    expected[3] = scores[6]
    np.testing.assert_allclose(joined, expected, atol=1e-6)


def test_evaluation_ranks_by_the_score_and_averages_both_orders(made):
    """The gallery is embedded of shared features, in blocks; a query has two texts."""
    composer, params, frozen = made
    benchmark, mesh = worlds.benchmark(protocols.FASHIONIQ), worlds.mesh(1)
    result = evaluate.evaluate(composer, params, frozen, benchmark, mesh=mesh)
    query = benchmark.queries[1]
    first, second = (text.strip(".?, ") for text in query.texts)
    raw = features.image_features(
        composer.backbone, frozen["backbone"], benchmark.gallery, mesh=mesh
    )
    given = {
        "reference_features": np.repeat(raw[query.reference][None], 2, axis=0),
        "token_ids": composer.backbone.tokenizer(
            [f"{first} and {second}", f"{second} and {first}"]
        ),
    }

    @jax.jit
    def scores(given, raw):
        composed = composer.compose(params, frozen, given, jax.random.key(0))
        return composer.score(params, composed, composer.embed_features(params, frozen, raw))

    both = np.asarray(scores(given, raw))
    inside = [query.category in kinds for kinds in benchmark.categories]
    expected = np.sort(both.mean(axis=0)[inside])[::-1][:3]
    np.testing.assert_allclose(result.scores[1][:3], expected, atol=1e-5)


def test_images_do_not_look_for_captions_by_this_score(made):
    benchmark = types.SimpleNamespace(name="shapes/captions")
    with pytest.raises(ConfigError, match="searched in both directions.*Artemis has one"):
        captions.evaluate(*made, benchmark, mesh=worlds.mesh(1))


def test_galleries_are_embedded_in_blocks_and_checked(made):
    composer, params, frozen = made
    raw = np.array(inversion.features(composer.backbone, 7))
    raw[5] = np.nan  # an image that was not readable
    embed = functools.partial(features.embedded, composer, mesh=worlds.mesh(1))
    whole = embed(params, frozen, raw)
    np.testing.assert_allclose(embed(params, frozen, raw, batch_size=3), whole, atol=1e-6)
    assert np.isnan(whole[5]).all() and np.isfinite(np.delete(whole, 5, axis=0)).all()
    damaged = jax.tree.map(np.array, params)
    damaged["image_projection"]["bias"][0] = np.nan
    with pytest.raises(WeightsError, match="gallery features of Artemis"):
        embed(damaged, frozen, raw)


def test_triplets_are_cropped_mirrored_and_told_in_either_order(tiny):
    transform = AugmentedTriplets(tiny[0].tokenizer, "images", size=3, word="and")
    image = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    element = {"reference": image, "target": image + 75, "texts": (b"is red", b"a star"),
               "text": b"unused"}  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = [transform.random_map(element, rng) for _ in range(200)]
    texts = collections.Counter(example["token_ids"].tobytes() for example in drawn)
    orders = ("is red and a star", "a star and is red")
    length = tiny[0].context_length
    assert set(texts) == {tiny[0].tokenizer([text], length)[0].tobytes() for text in orders}
    assert min(texts.values()) > 70
    crops = {
        side.tobytes()
        for y in range(3)
        for x in range(3)
        for side in (image[y : y + 3, x : x + 3], image[y : y + 3, x : x + 3][:, ::-1])
    }
    assert {example["reference_images"].tobytes() for example in drawn} == crops
    pairs = {(e["reference_images"].tobytes(), e["target_images"].tobytes()) for e in drawn}
    assert len(pairs) > 100  # each image is cropped by itself


def test_parts_of_the_score(tiny, made, batch, queries):
    composer, params, frozen = made
    query = {name: batch[name] for name in ("reference_features", "token_ids")}
    versions = [Artemis(tiny[0], DIM, version) for version in ("EM-only", "IS-only")]

    @jax.jit
    def scores(query, gallery):
        gallery = composer.embed_features(params, frozen, gallery)
        parts = [
            part.score(params, part.compose(params, frozen, query, jax.random.key(0)), gallery)
            for part in versions
        ]
        return parts, composer.score(params, queries, gallery)

    parts, both = scores(query, batch["target_features"])
    np.testing.assert_allclose(parts[0] + parts[1], both, atol=1e-5)
    assert np.abs(parts[0]).max() > 0.1 and np.abs(parts[1]).max() > 0.1


def test_trained_encoders_begin_as_the_backbone(tiny, made, batch):
    backbone, _ = tiny
    composer = Artemis(backbone, DIM, train_backbone=True)
    _, networks, frozen = made
    params = jax.jit(composer.start)(jax.random.key(0), frozen) | {"networks": networks}
    rng = np.random.default_rng(0)
    size = backbone.config.vision.image_size
    pictures = {
        f"{name}_images": rng.integers(0, 255, (4, size, size, 3), np.uint8)
        for name in ("reference", "target")
    }
    given = {**pictures, "token_ids": batch["token_ids"][:4]}

    @jax.jit
    def run(params, moved):
        losses = [
            one.loss(own, frozen, given, jax.random.key(0))[0]
            for one, own in ((composer, params), (made[0], networks))
        ]
        found = composer.embed_gallery(
            {"networks": networks, "backbone": moved}, frozen, pictures["target_images"]
        )
        raw = backbone.encode_image(moved, pictures["target_images"])
        return losses, (found, made[0].embed_features(networks, frozen, raw))

    losses, galleries = run(params, jax.tree.map(lambda x: x + 0.05, params["backbone"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # the gallery is of the trained tower, and its features are not the backbone's
    assert not features.uses_backbone_gallery(composer)
    assert features.uses_backbone_gallery(made[0])
    np.testing.assert_allclose(*galleries, atol=1e-5)


@pytest.mark.slow
def test_its_own_encoders_are_trained_on_many_devices_and_in_parts():
    words = vocabulary.tokenizer(vocabulary.build(["is red not blue"]), "words")
    sizes = WordConfig(words.vocab_size, 12, "bigru", 8)
    config = ArtemisConfig(sizes, ResNetConfig((1, 1, 1, 1), True, 4, image_size=32), 16)
    backbone = Backbone(models.Artemis(config), words, images.artemis(32, 32), "own")
    composer = Artemis(backbone, embed_dim=0, train_backbone=True)
    params = drawn(composer.init)
    frozen = composer.freeze(drawn(backbone.init))
    rng = np.random.default_rng(0)
    batch = {
        f"{name}_images": rng.integers(0, 255, (inversion.ROWS, 32, 32, 3), np.uint8)
        for name in ("reference", "target")
    }
    texts = ["is red", "not blue <and> is red not", "red", "blue"]
    batch["token_ids"] = words(texts * (inversion.ROWS // 4))
    inversion.assert_independent_of_devices_and_parts(composer, params, frozen, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": -1}, "embed_dim=-1: expected 1 or more, or 0"),
        ({"temperature": 100.0}, "temperature=100.0: expected 0 to 10.0, the logarithm"),
        ({"version": "EM only"}, "version 'EM only'. Did you mean 'EM-only'"),
    ],
)
def test_settings_that_cannot_work(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        Artemis(tiny[0], **settings)


def test_another_backbone_has_no_official_file(made, tmp_path):
    from cir_jax.composers import official

    with pytest.raises(ConfigError, match="Artemis on a clip backbone has no official"):
        official.load(made[0], tmp_path / "model_best.pth", made[2])
