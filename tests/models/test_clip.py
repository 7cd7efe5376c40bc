"""CLIP: text at any length, pseudo-words, ResNet tower, sizes, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import DataError, WeightsError
from cir_jax.models.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    end_positions,
    overwrite_tokens,
)
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights.convert import flatten

TEXTS = ["a red star", "make it blue", "two", "a photo of $ that is green and has no circle"]


def sizes(width: int, heads: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * width,
    }


@pytest.fixture(scope="module")
def resnet():
    """A small random ResNet CLIP of 64 x 64 images: (model, params)."""
    config = ClipConfig(
        text=TextConfig(**sizes(16, 2, 1), vocab_size=20, eos_token_id=2),
        vision=ResNetConfig(layers=(1, 2, 1, 1), width=4, num_attention_heads=8, image_size=64),
        projection_dim=12,
    )
    model, rng = Clip(config), np.random.default_rng(0)
    images, ids = jnp.zeros((1, 64, 64, 3)), jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"]
    return model, jax.tree.map_with_path(lambda path, x: drawn(rng, path[-1].key, x.shape), shapes)


def drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.normal(size=shape)
    if name == "kernel":
        x /= np.prod(shape[:-1]) ** 0.5
    return np.float32(1 + np.abs(x) if name in ("var", "scale") else x)


# --- text


def test_text_at_a_bucketed_length_equals_full_length(tiny):
    """Values and gradients: the tower is causal, so nothing behind the end token counts."""
    backbone, params = tiny
    short = backbone.tokenizer(TEXTS[:3])
    full = backbone.tokenizer(TEXTS[:3], backbone.context_length)
    assert short.shape == (3, 8) and full.shape == (3, 16)

    @jax.jit
    def run(ids, embeddings):
        def total(embeddings):
            features = backbone.encode_text(params, ids, embeddings)
            return jnp.sum(jnp.sin(features)), features

        return jax.grad(total, has_aux=True)(embeddings)

    grad, features = run(short, backbone.embed_tokens(params, short))
    full_grad, full_features = run(full, backbone.embed_tokens(params, full))
    for one, other in ((features, full_features), (grad, full_grad[:, :8])):
        # relative to the largest value: programs of two lengths need not round alike
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    assert not np.asarray(full_grad[:, 8:]).any()


def test_what_follows_the_end_token_does_not_count(tiny):
    backbone, params = tiny
    ids = backbone.tokenizer(TEXTS[:2])
    other = np.where(np.arange(8) > np.argmax(ids == 0, axis=1)[:, None], 7, ids)
    assert (other != ids).any()
    encode = jax.jit(backbone.encode_text)
    np.testing.assert_array_equal(encode(params, ids), encode(params, other))


def test_the_pooled_position():
    ids = jnp.array([[5, 7, 9, 9], [9, 1, 2, 3]])
    assert end_positions(ids, 9).tolist() == [2, 0]  # the first end token
    assert end_positions(jnp.array([[5, 9, 2, 0]]), 2).tolist() == [1]  # eos 2: the largest id


def test_pseudo_words_first_every_and_several():
    overwrite, rng = jax.jit(overwrite_tokens), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 4)).astype(np.float32))
    one = jnp.asarray(rng.normal(size=(2, 4)).astype(np.float32))
    two = jnp.asarray(rng.normal(size=(2, 2, 4)).astype(np.float32))
    first = np.asarray(overwrite(x, jnp.array([1, 3]), one))
    expected = np.array(x)
    expected[0, 1], expected[1, 3] = one
    np.testing.assert_array_equal(first, expected)
    several = np.asarray(overwrite(x, jnp.array([1, 3]), two))
    expected[0, 1:3], expected[1, 3:5] = two
    np.testing.assert_array_equal(several, expected)
    marked = np.zeros((2, 6), bool)
    marked[0, [1, 4]] = True
    every = np.asarray(overwrite(x, marked, one))
    expected = np.array(x)
    expected[0, 1] = expected[0, 4] = one[0]
    np.testing.assert_array_equal(every, expected)


def test_a_pseudo_word_that_is_the_token_changes_nothing(tiny):
    backbone, params = tiny
    ids = backbone.tokenizer(TEXTS[3:])
    at = jnp.argmax(ids == backbone.tokenizer.id_of("$"), axis=1)
    encode = jax.jit(backbone.encode_text)
    embeddings = backbone.embed_tokens(params, ids)
    same = overwrite_tokens(embeddings, at, embeddings[:, at[0]])
    features = encode(params, ids, embeddings)
    np.testing.assert_allclose(features, encode(params, ids), atol=1e-6)
    np.testing.assert_array_equal(encode(params, ids, same), features)
    other = overwrite_tokens(embeddings, at, jnp.ones((1, backbone.token_dim)))
    assert np.abs(encode(params, ids, other) - features).max() > 1e-3


def test_the_pooled_position_alone_is_what_it_is_among_all(tiny):
    """The last block computes one position: features and gradients of all parameters."""
    backbone, params = tiny
    ids = backbone.tokenizer(TEXTS)
    size = backbone.config.vision.image_size
    images = jax.random.normal(jax.random.key(0), (4, size, size, 3))
    end = end_positions(ids, backbone.config.text.eos_token_id)

    def whole(model, images, ids):
        pooled = model.vision.pool(model.visual_tokens(images))
        hidden = model.text_hidden_states(model.embed_tokens(ids))[np.arange(4), end]
        return model.visual_projection(pooled), model.text_projection(hidden)

    def run(method):
        def loss(params):
            features = backbone.model.apply({"params": params}, images, ids, method=method)
            return sum(jnp.sum(jnp.sin(x)) for x in features), features

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for ours, expected in zip(run(None), run(whole), strict=True):
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


# --- images


def test_a_resnet_has_the_interface_of_a_vit_and_frozen_batch_norms(resnet):
    model, params = resnet
    images = jax.random.normal(jax.random.key(1), (3, 64, 64, 3))

    @jax.jit
    def run(params):
        def loss(params):
            bound = model.bind({"params": params})
            features = bound.encode_image(images)
            return jnp.sum(jnp.sin(features)), (features, bound.visual_tokens(images))

        return jax.grad(loss, has_aux=True)(params)

    grads, (features, tokens) = run(params)
    assert tokens.shape == (3, 4, 128) and features.shape == (3, 12)
    assert np.isfinite(features).all()
    for path, leaf in flatten(grads["vision"]).items():
        frozen = path[-1] in ("mean", "var")
        assert np.asarray(leaf).any() != frozen, path


def test_bfloat16_is_near(tiny):
    backbone, params = tiny
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    half = Clip(backbone.config, jnp.bfloat16)
    pixels = backbone._pixels(images)
    for method, x in (("encode_image", pixels), ("encode_text", backbone.tokenizer(TEXTS))):
        exact, rough = (
            jax.jit(functools.partial(model.apply, method=method))({"params": params}, x)
            for model in (backbone.model, half)
        )
        assert rough.dtype == jnp.bfloat16
        np.testing.assert_allclose(rough, exact, atol=0.04 * np.abs(exact).max())


# --- rematerialisation


TINY_TEXT = TextConfig(**sizes(16, 2, 2), vocab_size=20, eos_token_id=2)
TINY_VIT = VisionConfig(**sizes(16, 2, 4), patch_size=8, image_size=64)
TINY_RESNET = ResNetConfig((3, 1, 1, 1), width=4, num_attention_heads=8, image_size=64)


# the stem of a ResNet is not computed again, and holds much of a small one's memory
@pytest.mark.parametrize(
    ("vision", "share"), [(TINY_VIT, 0.75), (TINY_RESNET, 0.97)], ids=["vit", "resnet"]
)
def test_remat_is_the_same_in_less_memory(vision, share):
    config, rng = ClipConfig(TINY_TEXT, vision, 12), np.random.default_rng(0)
    models = (Clip(config), Clip(config, remat=True))
    images = rng.normal(size=(16, 64, 64, 3)).astype(np.float32)
    ids = rng.integers(3, 20, (16, 16))
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"] for model in models
    ]
    assert shapes[0] == shapes[1]
    params = jax.tree.map_with_path(lambda at, x: drawn(rng, at[-1].key, x.shape), shapes[0])

    def compiled(model):
        def loss(params):
            image, text = model.apply({"params": params}, images, ids)
            return jnp.sum(jnp.sin(image) * jnp.cos(text))

        # on CPU, XLA's default order computes everything again at the very beginning
        options = {
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            "xla_backend_optimization_level": 0,
        }
        return jax.jit(jax.value_and_grad(loss)).lower(params).compile(options)

    plain, remat = map(compiled, models)
    (value, grads), (again, grads_again) = plain(params), remat(params)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for (path, leaf), other in zip(
        flatten(grads).items(), flatten(grads_again).values(), strict=True
    ):
        assert np.abs(leaf - other).max() <= 1e-5 * largest, path
    before, after = (step.memory_analysis().temp_size_in_bytes for step in (plain, remat))
    assert after < share * before, (before, after)


# --- published sizes, from shapes alone

PUBLISHED = {
    "ViT-B/32": (sizes(512, 8, 12), (sizes(768, 12, 12), 32), 512, 151_277_313),
    "ViT-B/16": (sizes(512, 8, 12), (sizes(768, 12, 12), 16), 512, 149_620_737),
    "ViT-L/14": (sizes(768, 12, 12), (sizes(1024, 16, 24), 14), 768, 427_616_513),
    "ViT-H/14": (sizes(1024, 16, 24), (sizes(1280, 16, 32), 14), 1024, 986_109_441),
    "ViT-bigG/14": (
        sizes(1280, 20, 32),
        (sizes(1664, 16, 48) | {"intermediate_size": 8192}, 14),
        1280,
        2_539_567_105,
    ),
    "RN50": (sizes(512, 8, 12), ResNetConfig(), 1024, 102_007_137),
    "RN50x4": (
        sizes(640, 10, 12),
        ResNetConfig((4, 6, 10, 6), 80, 40, 288),
        640,
        178_300_601,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    text, vision, dim, count = PUBLISHED[name]
    if isinstance(vision, tuple):
        vision = VisionConfig(**vision[0], patch_size=vision[1])
    model = Clip(ClipConfig(TextConfig(**text), vision, dim))
    size = vision.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"])
    # running statistics of batch norms are not counted as parameters by PyTorch
    counted = (leaf.size for path, leaf in shapes.items() if path[-1] not in ("mean", "var"))
    assert sum(counted) == count


# --- bad input


def test_bad_input_is_named(tiny):
    backbone, params = tiny
    ids = backbone.tokenizer(TEXTS)
    wrong = ids.copy()
    wrong[2, 5] = 999
    with pytest.raises(DataError, match="row 2, position 5: token id 999 is not one of the model"):
        backbone.encode_text(params, wrong)
    with pytest.raises(DataError, match="row 0, position 0: token id -1"):
        backbone.embed_tokens(params, np.full((1, 4), -1))
    with pytest.raises(DataError, match="batch of no texts"):
        backbone.encode_text(params, ids[:0])
    for array, said in (
        (np.full((1, 16, 16, 3), 255.0), "float images of 255 to 255; expected normalised ones, wh"
         "ich are within -1.792 and 2.146 here. Give uint8 images of 0 to 255 as they are, or "),
        (np.full((1, 16, 16, 3), np.nan), "float images of nan to nan; expected normalised"),
        (np.full((1, 16, 16, 3), -99.0, np.float16), "float images of -99 to -99"),
        (np.zeros((1, 16, 16, 3), int), "images of type int64; expected uint8 of 0 to 255, or"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            backbone.encode_image(params, array)
    with pytest.raises(DataError, match="images of type int32"):  # what a trace does know
        jax.eval_shape(backbone.encode_image, params, jnp.zeros((1, 16, 16, 3), jnp.int32))
    with pytest.raises(DataError, match="batch of no images"):
        backbone.encode_image(params, np.zeros((0, 16, 16, 3), np.uint8))
    with pytest.raises(DataError, match=r"\(2, 20, 20, 3\); this model takes \[batch, 16, 16, 3\]"):
        backbone.encode_image(params, np.zeros((2, 20, 20, 3), np.uint8))
    with pytest.raises(DataError, match="text of 17 tokens; this text tower takes at most 16"):
        backbone.encode_text(params, np.ones((1, 17), np.int32))


def test_an_id_out_of_range_is_loud_under_jit(tiny):
    backbone, params = tiny
    features = jax.jit(backbone.encode_text)(params, np.full((1, 4), 999))
    assert np.isnan(features).all()


def test_configs_that_cannot_work_are_refused():
    with pytest.raises(WeightsError, match="unknown activation 'gelu2'. Did you mean 'gelu'"):
        TextConfig(hidden_act="gelu2")
    with pytest.raises(WeightsError, match="hidden_size=100 is not divisible"):
        VisionConfig(hidden_size=100)


def test_configs_survive_a_round_trip_and_old_fields_count():
    config = ClipConfig(TextConfig(eos_token_id=2), VisionConfig(hidden_act="gelu"), 640, 3.0)
    assert ClipConfig.from_dict(config.to_dict()) == config
    old = {"text_config": None, "text_config_dict": {"hidden_size": 64}, "projection_dim": 8}
    assert ClipConfig.from_dict(old).text.hidden_size == 64
