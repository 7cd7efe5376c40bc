"""MagicLens: its loss, its towers, its files. Values of the original are in tests/golden."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from cir_jax import experiment as experiments
from cir_jax.composers import official
from cir_jax.composers.magiclens import INITIAL, MagicLens
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input import images as transforms
from cir_jax.loading import read_experiment
from cir_jax.retrieval import features
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import inputs
from cir_jax.training.step import init_state
from cir_jax.weights import flax_files
from tests import tiny as factory
from tests.composers import inversion

SIZES = {"layers": 1, "heads": 4, "hidden_dim": 20}
TEXTS = ["a red star", "blue and two circle", "no green", "it is that"]


def drawn(composer, seed):
    """Parameters of which none is 0 or 1; attention is sharp enough for the cap to matter."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scale = 1.0 if "attention" in str(path) or "pooling" in str(path) else 0.2
        return np.asarray(scale * rng.standard_normal(x.shape), np.float32)

    shapes = jax.eval_shape(composer.init, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return params | {"logit_scale": -np.log(np.float32(composer.temperature))}


@pytest.fixture(scope="module")
def made(tiny):
    composer = MagicLens(tiny[0], **SIZES)
    return composer, drawn(composer, 0), composer.freeze(tiny[1])


@pytest.fixture(scope="module")
def trained(tiny):
    """All of CLIP is trained: its towers are not the backbone's any more."""
    composer = MagicLens(tiny[0], **SIZES, train_backbone=True)
    params, rng = drawn(composer, 1), np.random.default_rng(2)
    params["backbone"] = jax.tree.map(
        lambda x: np.float32(x + 0.02 * rng.standard_normal(x.shape)), tiny[1]
    )
    return composer, params, composer.freeze(tiny[1])


@functools.cache
def compiled(function):
    """One program per function: most of the time goes into compiling."""
    return jax.jit(function)


@pytest.fixture(scope="module")
def batch(tiny):
    return {
        "reference_features": inversion.features(tiny[0]),
        "target_features": inversion.features(tiny[0], seed=1),
        "token_ids": tiny[0].tokenizer(TEXTS * (inversion.ROWS // 4)),
    }


def pictures(rows=4, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (rows, 16, 16, 3), np.uint8)


def test_the_loss_does_not_depend_on_devices_or_parts(made, batch):
    # what a bias of all keys changes, the softmax takes back, but for the cap
    inversion.assert_independent_of_devices_and_parts(*made, batch, rtol=2e-4)


def test_the_loss_is_the_papers(made, batch):
    """Over the targets and the references of the batch, each by itself with the empty text."""
    composer, params, frozen = made
    params = params | {"logit_scale": jnp.log(1 / jnp.float32(0.05))}
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    rows = jax.jit(composer.encode)(params, frozen, batch, rngs)
    embed, compose = compiled(composer.embed_features), compiled(composer.compose)
    for name in ("target", "reference"):
        expected = embed(params, frozen, batch[f"{name}_features"])
        np.testing.assert_allclose(rows[name], expected, atol=1e-5)
    query = {name: batch[name] for name in ("reference_features", "token_ids")}
    expected = compose(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(rows["query"], expected, atol=1e-5)
    loss, metrics = composer.objective(params, rows)
    query, target, reference = (
        np.asarray(rows[name], np.float64) for name in ("query", "target", "reference")
    )
    positive = np.exp((query * target).sum(axis=1) / 0.05)
    targets, references = (np.exp(query @ x.T / 0.05).sum(axis=1) for x in (target, reference))
    np.testing.assert_allclose(loss, -np.log(positive / (targets + references)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], 0.05, rtol=1e-5)
    without = MagicLens(composer.backbone, **SIZES, query_negatives=False)
    shapes = jax.eval_shape(without.encode, params, frozen, batch, rngs)
    rows = {name: rows[name] for name in shapes}
    assert set(rows) == {"query", "target"}
    loss, _ = without.objective(params, rows)
    np.testing.assert_allclose(loss, -np.log(positive / targets).mean(), rtol=1e-5)
    sharp = params | {"logit_scale": jnp.float32(9.0)}
    np.testing.assert_allclose(composer.objective(sharp, rows)[1]["temperature"], 0.01, rtol=1e-5)


def test_it_begins_as_the_sum_of_image_and_text(made):
    network = made[0].network
    image, text = inversion.features(made[0].backbone), inversion.features(made[0].backbone, seed=1)
    found = {}
    for initial in INITIAL:
        composer = MagicLens(made[0].backbone, **SIZES, initial=initial)
        params = jax.jit(composer.init)(jax.random.key(0))["fusion"]
        found[initial] = np.asarray(jax.jit(network.apply)({"params": params}, image, text))
    expected = np.asarray(image) + np.asarray(text)
    expected = expected - expected.mean(axis=-1, keepdims=True)
    expected /= expected.std(axis=-1, keepdims=True)
    np.testing.assert_allclose(found["sum"], expected, atol=1e-4)
    assert np.abs(found["random"] - expected).max() > 1


def test_queries_and_gallery_are_the_same_one_by_one(made, batch):
    composer, params, frozen = made
    query = {name: batch[name] for name in ("reference_features", "token_ids")}
    compose = compiled(composer.compose)
    together = compose(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, rtol=1e-5)
    alone = compose(params, frozen, {k: x[3:4] for k, x in query.items()}, jax.random.key(0))
    np.testing.assert_allclose(alone, together[3:4], rtol=1e-4, atol=1e-6)
    # an image of the gallery is a query without words
    silent = query | {"token_ids": composer.backbone.tokenizer([""] * inversion.ROWS)}
    gallery = compiled(composer.embed_features)(params, frozen, query["reference_features"])
    silent = compose(params, frozen, silent, jax.random.key(0))
    np.testing.assert_allclose(silent, gallery, atol=1e-5)
    assert np.abs(together - gallery).max() > 0.1


def test_trained_towers_see_what_theirs_would(made, trained, tiny):
    """As the fusion alone does of their features; nothing of the frozen ones shows."""
    composer, params, frozen = trained
    assert composer.tunes_backbone
    assert not made[0].tunes_backbone
    own = {"backbone": params["backbone"]}
    raw = compiled(tiny[0].encode_image)(params["backbone"], pictures())
    ids = tiny[0].tokenizer(TEXTS)
    gallery = compiled(composer.embed_gallery)(params, frozen, pictures())
    expected = compiled(made[0].embed_features)(params, own, raw)
    np.testing.assert_allclose(gallery, expected, atol=1e-5)
    images = {"reference_images": pictures(), "token_ids": ids}
    composed = jax.jit(composer.compose)(params, frozen, images, jax.random.key(0))
    stored = {"reference_features": raw, "token_ids": ids}
    expected = compiled(made[0].compose)(params, own, stored, jax.random.key(0))
    np.testing.assert_allclose(composed, expected, atol=1e-5)


def test_trained_towers_begin_with_the_pretrained_ones_and_learn(trained, tiny):
    composer, params, frozen = trained
    start = functools.partial(init_state, composer, optax.sgd(1.0), seed=0, ema=False)
    state = jax.jit(lambda frozen: start(frozen=frozen).params["backbone"])(frozen)
    jax.tree.map(np.testing.assert_array_equal, state, frozen["backbone"])
    batch = {
        "reference_images": pictures(),
        "target_images": pictures(seed=1),
        "token_ids": tiny[0].tokenizer(TEXTS),
    }
    gradient = jax.jit(jax.grad(lambda p: composer.loss(p, frozen, batch, jax.random.key(0))[0]))
    still = {
        "/".join(key.key for key in path)
        for path, x in jax.tree_util.tree_leaves_with_path(gradient(params))
        if not np.abs(x).max() > 0
    }
    # key biases have no effect in CLIP, nor has its own scale
    assert {name for name in still if not name.endswith("key/bias")} == {"backbone/logit_scale"}


def test_stored_features_are_refused_where_towers_are_trained(tiny):
    config = read_experiment("magiclens:smoke")
    composer = MagicLens(tiny[0], **SIZES, train_backbone=True)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    made = experiments.Experiment(config, mesh, tiny[0], composer, composer.freeze(tiny[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "Table", lambda *_: factory.caption_table(8))
        with pytest.raises(ConfigError, match="MagicLens trains the backbone.*=False"):
            inputs.make_pipeline(made, "fuse")


def test_galleries_are_those_of_the_parameters(made, trained, tmp_path):
    """In evaluation and in search: what was stored for others is not taken."""
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    for composer, params, frozen in (made, trained):
        other = params | {"fusion": jax.tree.map(lambda x: x + 0.1, params["fusion"])}
        found = []
        for each in (params, other, params):
            search = Searcher(composer, each, frozen, mesh=mesh, cache_dir=tmp_path / "cache")
            assert search.index(tmp_path / "images") == 4
            expected = compiled(composer.embed_gallery)(each, frozen, pictures())
            np.testing.assert_allclose(search._gallery, expected, atol=1e-5)
            plain = compiled(composer.backbone.encode_image)(frozen["backbone"], pictures())
            np.testing.assert_allclose(search._plain, features.unit(np.asarray(plain)), atol=1e-5)
            found.append(search._gallery)
        np.testing.assert_array_equal(found[0], found[2])
        assert np.abs(found[0] - found[1]).max() > 0.01


def test_unreadable_images_have_no_gallery_features(made):
    composer, params, frozen = made
    table = factory.caption_table(4)
    table.records[2]["image"] = b"nothing"
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    found = features.gallery_features(
        composer, params, frozen, table, mesh=mesh, batch_size=2, skip_unreadable=True
    )
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [False, False, True, False])
    np.testing.assert_allclose(np.linalg.norm(found[[0, 1, 3]], axis=1), 1, rtol=1e-5)


def with_clips_tokens(backbone):
    """Its texts end with another token than 0, as CLIP's do."""
    tokenizer = factory.backbone()[0].tokenizer
    tokenizer.eos_id = tokenizer.pad_id = 4
    text = dataclasses.replace(backbone.config.text, eos_token_id=4)
    config = dataclasses.replace(backbone.config, text=text)
    return dataclasses.replace(
        backbone, model=backbone.model.clone(config=config), tokenizer=tokenizer
    )


def test_token_0_hides_from_later_ones_unless_it_ends_texts(made, tiny):
    composer, params, frozen = made
    assert not composer.hides_token_0
    hiding = MagicLens(with_clips_tokens(tiny[0]), **SIZES)
    assert hiding.hides_token_0
    ids = np.array([[1, 7, 0, 9, 4], [1, 7, 6, 9, 4]], np.int32)
    encode = jax.jit(hiding.encode_text)
    expected = encode(params, frozen, ids)
    plain = jax.jit(hiding.backbone.encode_text)(frozen["backbone"], ids)
    assert np.abs(plain - expected)[0].max() > 1e-3
    np.testing.assert_allclose(plain[1], expected[1], atol=1e-5)
    table = dict(frozen["backbone"]["text"]["token_embedding"])
    table["embedding"] = table["embedding"] + 5 * np.eye(len(table["embedding"]), 1)
    text = frozen["backbone"]["text"] | {"token_embedding": table}
    changed = {"backbone": frozen["backbone"] | {"text": text}}
    np.testing.assert_allclose(encode(params, changed, ids)[0], expected[0], atol=1e-5)


def test_released_files_come_back_and_every_tensor_counts(trained, tmp_path):
    composer, params, frozen = trained
    file = tmp_path / "magic_lens.pkl"
    official.save(composer, file, params, frozen)
    again = official.load(composer, file, frozen)
    for part in ("fusion", "backbone"):
        jax.tree.map(np.testing.assert_array_equal, again[part], params[part])
    assert again["logit_scale"] == params["logit_scale"]  # not in the file: where training begins
    arrays = flax_files.read(file)
    assert arrays["params/clip/text/transformer/resblocks_1/attn/out/kernel"].shape == (2, 16, 32)
    for broken, message in (
        ({k: x for k, x in arrays.items() if "per_dim_scale" not in k}, "Missing tensors .1.: con"),
        (arrays | {"params/more": np.zeros(1)}, "Tensors nothing takes .1.: more"),
        (arrays | {"params/clip/logit_scale": np.float32("nan")}, "logit_scale holds 1 of 1"),
        (arrays | {"params/clip/visual/proj/kernel": np.zeros((48, 8))}, r"wrong shapes: backbone"),
    ):
        flax_files.write(file, broken)
        with pytest.raises(WeightsError, match=f"magic_lens.pkl.*{message}"):
            official.load(composer, file, frozen)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="magic_lens.pkl: not a pickle of Flax's bytes, or dam"):
        official.load(composer, file, frozen)


def test_other_heads_of_the_same_size_are_told_apart(trained, tmp_path):
    composer, params, frozen = trained
    file = tmp_path / "magic_lens.pkl"
    official.save(composer, file, params, frozen)
    other = MagicLens(composer.backbone, **SIZES | {"heads": 2}, train_backbone=True)
    with pytest.raises(WeightsError, match=r"key/b has shape \(4, 24\), expected 2 heads"):
        official.load(other, file, frozen)


def test_a_file_with_the_backbones_own_towers_needs_no_trained_ones(made, trained, tmp_path):
    composer, params, frozen = made
    params, file = jax.device_get(params), tmp_path / "magic_lens.pkl"
    official.save(composer, file, params, frozen)
    again = official.load(composer, file, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    official.save(*trained[:1], file, *trained[1:])
    with pytest.raises(WeightsError, match=r"its CLIP was trained .*train_backbone=True"):
        official.load(composer, file, frozen)


def test_the_released_code_reads_what_is_written(made, tmp_path):
    """`serialization.from_bytes` into a tree of the released names and shapes."""
    composer, params, frozen = made
    official.save(composer, tmp_path / "x.pkl", jax.device_get(params), frozen)
    with np.load("tests/golden/magiclens_tiny.npz") as file:
        names = {name.removeprefix("param/") for name in file if name.startswith("param/")}
    written = {name.removeprefix("params/") for name in flax_files.read(tmp_path / "x.pkl")}
    # one layer of the image tower there, two here, and the other way round in the fusion
    assert all("visual/transformer/resblocks_1" in name for name in written - names)
    assert all("multimodal_encoder/x_layers_1" in name for name in names - written)
    packed = flax.serialization.msgpack_serialize({"params": {"x": np.zeros(3, np.float32)}})
    assert flax.serialization.msgpack_restore(packed)["params"]["x"].shape == (3,)


def test_squashed_images_are_the_original_ones_in_eight_bits():
    """JAX's resizing with antialiasing, which the released evaluation has, is PIL's bilinear."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 90, 3), np.uint8)
    ours = transforms.PREPROCESSING["squash"](24)(Image.fromarray(pixels))
    resize = jax.jit(lambda x: jax.image.resize(x, (24, 24, 3), "bilinear"))
    theirs = resize(pixels / np.float32(255))
    np.testing.assert_allclose(ours / 255, theirs, atol=1.01 / 255)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "heads=5: expected .* heads that divide the backbone's dim=24"),
        ({"layers": 0}, "layers=0, heads=8: expected 1 or more"),
        ({"hidden_dim": 0}, "hidden_dim=0: expected 1 or more"),
        ({"initial": "som"}, "initial 'som'. Did you mean 'sum'"),
        ({"temperature": 0.001}, "temperature=0.001: expected 0.01 or more"),
    ],
)
def test_settings_that_cannot_work(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        MagicLens(tiny[0], **settings)
