"""Conditions of a query: each one counts, in search and in evaluation, or is refused in words."""

import copy
import io

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import composers
from cir_jax.composers import conditions
from cir_jax.composers.compodiff import CompoDiff
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import captions, evaluate, protocols
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.queries import CaptionBenchmark
from cir_jax.input import masks
from cir_jax.retrieval import features
from cir_jax.retrieval.composing import Composing
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from tests import tiny as factory
from tests.evaluation import worlds

SIZES = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": -1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def made(tiny):
    """(composer, params, frozen) on the tiny backbone, whose images are 16 x 16."""
    backbone, backbone_params = tiny
    composer = CompoDiff(backbone, **SIZES, steps=2, samples_per_query=1, source_mixing=0.0)
    params = factory.drawn(composer.init)
    return composer, params, composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos of 20 x 20, and a mask of the left half."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(factory.png(rng))
    mask = np.zeros((20, 20), np.uint8)
    mask[:, :10] = 255
    other = folder.parent / "mask.png"
    Image.fromarray(mask).save(other)
    return folder, other


@pytest.fixture(scope="module")
def shared(made, photos, mesh, tmp_path_factory):
    searcher = Searcher(*made, mesh=mesh, cache_dir=tmp_path_factory.mktemp("cache"))
    searcher.index(photos[0])
    return searcher


def asking(searcher, photos, **given):
    query = {"image": photos[0] / "2.png", "text": "a red star"} | given
    return {path: score for path, score in searcher.search(**query)}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_interpolation_asked_for_is_one_that_is_set(tiny, photos, mesh, alpha):
    """One program for all of them."""
    text, image = "a red star", photos[0] / "2.png"
    made = [composers.build("slerp", tiny[0], alpha=value) for value in (0.8, alpha)]
    asked, told = (Composing(slerp, {}, {"backbone": tiny[1]}, mesh) for slerp in made)
    found = asked.compose(image, text, Conditions(alpha=alpha)).features
    np.testing.assert_allclose(found, told.compose(image, text).features, atol=1e-6)


EACH = {
    "guidance": (0.5, 3.0),
    "negative_text": "a blue circle",
    "steps": 3,
    "samples_per_query": 2,
    "seed": 1,
    "source_mixing": 0.5,
    "noised_reference": 0.5,
}


def test_each_condition_of_a_search_counts_and_is_repeated(shared, photos):
    plain = asking(shared, photos)
    assert plain == asking(shared, photos)
    for name, value in {**EACH, "mask": photos[1]}.items():
        changed = asking(shared, photos, **{name: value})
        assert changed != plain and changed == asking(shared, photos, **{name: value}), name
    composer = shared.composer
    assert (
        set(EACH) | {"mask"}
        == set(composer.conditions)
        == {field for field in Conditions.__dataclass_fields__} - {"alpha"}  # Slerp's
    )
    # what the method is set to is what it does when it is told so
    told = {"guidance": composer.guidance, "negative_text": "", "steps": 2, "seed": 0}
    told |= {"samples_per_query": 1, "source_mixing": 0.0, "noised_reference": 0.0}
    for path, score in asking(shared, photos, **told).items():
        assert score == pytest.approx(plain[path], abs=1e-5)


def test_alone_on_a_cpu_a_query_reads_parameters_made_for_it(made, photos, mesh, monkeypatch):
    own, asked = type(made[0]).for_one_query, []
    monkeypatch.setattr(
        type(made[0]), "for_one_query", lambda self, params: asked.append(1) or own(self, params)
    )
    query, found = (photos[0] / "2.png", "a red star"), []
    for where in (make_mesh({"data": -1}, jax.devices()[:2]), mesh):
        composing = Composing(*made, where)
        found += [composing.compose(*query).features for _ in range(2)]
        assert len(asked) == (where.size == 1)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-6)


def test_a_search_by_one_of_the_two_is_the_methods_own(shared, made, photos):
    composer, params, frozen = made
    backbone = composer.backbone
    pixels = backbone.image_transform(Image.open(photos[0] / "2.png"))[None]
    zeros = np.zeros((1, backbone.dim), np.float32)
    ids = {text: backbone.tokenizer([text], 16) for text in ("a red star", "")}
    compose = jax.jit(composer.compose)
    for given, query in (
        ({"image": None}, {"reference_features": zeros, "has_reference": np.zeros(1, bool)}),
        ({"text": None}, {"reference_images": pixels}),
    ):
        text = "a red star" if "image" in given else ""
        query = {"token_ids": ids[text], "query_index": np.zeros(1, np.int32)} | query
        mine = np.asarray(compose(params, frozen, query, jax.random.key(np.uint32(0))))[0]
        found = asking(shared, photos, **given)
        expected = shared._gallery @ mine
        np.testing.assert_allclose([found[p] for p in shared.paths], expected, atol=2e-5)


def test_a_masked_reference_is_without_its_region(made, photos):
    composer, _, _ = made
    image = Image.open(photos[0] / "2.png")
    transform = composer.backbone.image_transform
    pixels, mask = conditions.masked(composer, image, photos[1])
    assert mask.shape == (64, 64) and mask[:, :31].all() and not mask[:, 33:].any()
    plain = transform(image)
    np.testing.assert_array_equal(pixels[:, 8:], plain[:, 8:])
    assert (pixels[:, :8] != plain[:, :8]).mean() > 0.9
    grey = CompoDiff(composer.backbone, **SIZES, mask_fill="grey")
    pixels, _ = conditions.masked(grey, image, photos[1])
    assert pixels.dtype == np.float32 and not pixels[:, :8].any() and pixels[:, 8:].any()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps": 0}, ConfigError, "steps=0: expected 1 to timesteps=1000"),
        ({"samples_per_query": 0}, ConfigError, "samples_per_query=0: expected 1 or more"),
        ({"guidance": (1.0, float("nan"))}, ConfigError, "nan): expected two finite weights"),
        ({"guidance": (1.0, float("inf"))}, ConfigError, "inf): expected two finite weights"),
        ({"guidance": (1.0,)}, ConfigError, "expected two finite weights"),
        ({"source_mixing": 1.5}, ConfigError, "source_mixing=1.5: expected a fraction"),
        ({"alpha": -0.5}, ConfigError, "alpha=-0.5: expected a fraction"),
        ({"alpha": 0.5}, ConfigError, "CompoDiff takes no alpha. Methods that do: slerp, tat."),
        ({"noised_reference": -0.1}, ConfigError, "noised_reference=-0.1: expected a fraction"),
        ({"noised_reference": 1.0}, ConfigError, "leaves 0 of 1000 times, fewer than steps=2"),
        ({"seed": -1}, ConfigError, "seed=-1: expected 0 to 4294967295"),
        ({"mask": Image.new("RGB", (20, 20))}, DataError, "a mask of mode 'RGB'; expected 1 or L"),
        ({"mask": Image.new("1", (64, 64), 1)}, DataError, "a mask of 64 x 64 pixels; the refere"),
        ({"image": None, "mask": Image.new("1", (20, 20), 1)}, DataError, "mask is about the ref"),
        ({"image": None, "noised_reference": 0.5}, DataError, "noised_reference is about the ref"),
        ({"mask": "nowhere.png"}, DataError, "nowhere.png: cannot be read"),
    ],
)
def test_conditions_that_cannot_be_meant(shared, photos, given, error, message):
    with pytest.raises(error) as raised:
        asking(shared, photos, **given)
    assert message in str(raised.value)


def test_a_method_that_lacks_a_condition_names_those_that_have_it(shared, photos, tiny, mesh):
    slerp = composers.build("slerp", tiny[0])
    searcher = copy.copy(shared)
    searcher.composing = Composing(slerp, {}, shared.frozen, mesh)
    for name, value in {**EACH, "mask": photos[1]}.items():
        with pytest.raises(ConfigError) as raised:
            asking(searcher, photos, **{name: value})
        assert f"Slerp takes no {name}. Methods that do: compodiff." in str(raised.value)
    asked = Asked(Conditions(negative_text="a star"))
    with pytest.raises(ConfigError, match="Slerp takes no negative_text. Methods that do"):
        benchmark = worlds.benchmark(protocols.CIRCO)
        evaluate.evaluate(slerp, {}, {}, benchmark, mesh=mesh, asked=asked)
    with pytest.raises(ConfigError, match="use='text': Slerp has no answer of its own"):
        Asked(use="text").of(slerp, 0)
    with pytest.raises(ConfigError, match="Did you mean 'image'"):
        Asked(use="imge")


def test_an_evaluation_asks_the_same_of_every_query(made, mesh):
    """Against what `compose` is given by hand, query by query."""
    composer, params, frozen = made
    composer = composer.varied(steps=1)
    benchmark = worlds.benchmark(protocols.CIRCO)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    given = Conditions(negative_text="a star", mask=mask, seed=3, source_mixing=0.2)
    asked = Asked(given)
    seen = []
    query_features = features.query_features

    def spying(*args, **kwargs):
        seen.append(query_features(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "query_features", spying)
        result = evaluate.evaluate(
            *(composer, params, frozen, benchmark), mesh=mesh, batch_size=8, asked=asked
        )
    assert result.metrics and asked.said["negative_text"] == "a star"
    assert result.setting["asked"] == asked.identity
    tokenizer, transform = composer.backbone.tokenizer, composer.backbone.image_transform
    query = benchmark.queries[3]
    image = Image.open(io.BytesIO(benchmark.gallery[query.reference]["image"]))
    filled = masks.fill(transform(image), mask, transform, "noise")
    by_hand = {
        "reference_images": filled[None],
        "mask": masks.condition(mask)[None],
        "token_ids": tokenizer([query.texts[0]], 16),
        "negative_token_ids": tokenizer(["a star"], 16),
        "source_mixing": np.float32([0.2]),
        "query_index": np.int32([3]),
    }
    key = jax.random.key(np.uint32(3))
    expected = jax.jit(composer.compose)(params, frozen, by_hand, key)
    np.testing.assert_allclose(seen[0][3], expected[0], atol=2e-5)


def test_captions_find_images_by_a_sampled_embedding(made, mesh):
    """Table 5: no image is in the query, and the conditions that are about one are refused."""
    composer, params, frozen = made
    composer = composer.varied(steps=1)
    gallery = worlds.gallery(6)
    texts = tuple((f"a {record['caption']} star", "a photo of a star") for record in gallery)
    benchmark = CaptionBenchmark("tiles", "val", protocols.CAPTIONS, gallery, texts)
    found = captions.evaluate(composer, params, frozen, benchmark, mesh=mesh)
    assert {"t2i R@1/detailed", "i2t R@1/partial"} <= set(found.metrics)
    images = features.image_features(composer.backbone, frozen["backbone"], gallery, mesh=mesh)
    by_hand = {  # of caption 0 of image 2, which is caption 4 of all
        "token_ids": composer.backbone.tokenizer([texts[2][0]], 16),
        "query_index": np.int32([4]),
    }
    query = jax.jit(composer.compose)(params, frozen, by_hand, jax.random.key(np.uint32(0)))
    order = np.argsort(-(features.unit(images) @ np.asarray(query)[0]), kind="stable")
    np.testing.assert_array_equal(found.top[2][:6], order)
    started = composer.varied(noised_reference=0.5)  # by an image, of which there is none
    same = captions.evaluate(started, params, frozen, benchmark, mesh=mesh)
    np.testing.assert_array_equal(same.top, found.top)
    asked = Asked(Conditions(negative_text="a star"))
    other = captions.evaluate(composer, params, frozen, benchmark, mesh=mesh, asked=asked)
    assert other.setting_id != found.setting_id
    assert Asked(use="text").of(started, 0)[0].noised_reference == 0
    with pytest.raises(DataError, match="mask is about the reference image: give one"):
        asked = Asked(Conditions(mask=np.ones((16, 16), bool)))
        captions.evaluate(composer, params, frozen, benchmark, mesh=mesh, asked=asked)
