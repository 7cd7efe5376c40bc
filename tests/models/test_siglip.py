import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import DataError, WeightsError
from cir_jax.models.clip import overwrite_tokens
from cir_jax.models.siglip import Siglip, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from cir_jax.weights import convert
from cir_jax.weights import siglip as weights
from tests import parity
from tests.parity_core import nhwc

GOLDEN = parity.ROOT / "tests" / "golden"
# compiled once and run once: compiling is all that takes time
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def fixture():
    return parity.Fixture.read(GOLDEN / "siglip2_hf.npz")


@pytest.fixture(scope="module")
def tiny(fixture):
    """(config, params, images in NHWC, token ids) of a small fixture."""
    config = SiglipConfig.from_dict(fixture.config)
    params = weights.to_params(fixture.params, config)
    return config, params, nhwc(fixture.inputs["pixel_values"]), fixture.inputs["input_ids"]


@pytest.mark.parametrize(
    ("text", "vision", "count"),
    [
        ({}, {}, 203_155_970),  # siglip-base-patch16-224
        # siglip2-giant-opt-patch16-384, whose towers are of different widths
        (
            {
                "vocab_size": 256_000,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "projection_size": 1536,
            },
            {
                "hidden_size": 1536,
                "intermediate_size": 6144,
                "num_hidden_layers": 40,
                "num_attention_heads": 16,
                "image_size": 384,
            },
            1_871_885_426,
        ),
    ],
)
def test_published_sizes(text, vision, count):
    """Parameters of transformers' model of the same config; what it leaves out are its defaults."""
    config = SiglipConfig.from_dict({"text_config": text, "vision_config": vision})
    tree = convert.joint_shapes(Siglip(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


@pytest.mark.peer
def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipConfig().to_dict()
    ours = SiglipConfig().to_dict()
    for tower in ("text_config", "vision_config"):
        assert {name: theirs[tower][name] for name in ours[tower]} == ours[tower]


def test_config_goes_to_hugging_face_and_back(tiny):
    config = tiny[0]
    assert SiglipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    wide = {"hidden_size": 48, "num_attention_heads": 4, "projection_size": None}
    found = SiglipConfig.from_dict({"text_config": wide, "vision_config": {"hidden_size": 48}})
    assert found.projection_dim == 48 and found.to_dict()["text_config"]["projection_size"] == 48


def test_the_last_position_is_read_whatever_is_there(fixture, tiny):
    """Padding is attended to, and texts pooled there: the same words padded otherwise differ."""
    config, params, _, ids = tiny
    encode = jit(functools.partial(Siglip(config).apply, method="encode_text"))
    text, padded = encode({"params": params}, ids), ids[:, -1] == 0
    ended = np.where(np.arange(ids.shape[1]) == ids.shape[1] - 1, 1, ids)
    np.testing.assert_allclose(text, fixture.expected["text_pooled"], atol=5e-5)
    assert padded.any() and not padded.all()
    for other in (encode({"params": params}, ended), encode({"params": params}, ids[:, :-1])):
        assert np.abs(other - text).max(axis=1)[padded].min() > 1e-3


def test_pseudo_words_take_the_place_of_tokens(tiny):
    config, params, _, ids = tiny
    model, variables = Siglip(config), {"params": params}
    encode = jit(functools.partial(model.apply, method="encode_text"))
    embed = jit(functools.partial(model.apply, method="embed_tokens"))
    embeddings = embed(variables, ids)
    positions, own = jnp.ones(len(ids), jnp.int32), embeddings[:, 1]
    others = np.where(np.arange(ids.shape[1]) == 1, 3, ids)
    same = overwrite_tokens(embed(variables, others), positions, own)
    expected = encode(variables, ids, embeddings)
    np.testing.assert_allclose(encode(variables, others, same), expected, atol=1e-5)
    changed = encode(variables, ids, overwrite_tokens(embeddings, positions, -own))
    assert np.abs(changed - expected).max(axis=1).min() > 1e-3


def test_pixels_that_no_patch_reaches_do_not_count():
    """384 = 27 * 14 + 6 in the largest published one: PyTorch's convolution leaves them out."""
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = SiglipConfig(
        SiglipTextConfig(hidden_size=8, vocab_size=10, max_position_embeddings=4, **shared),
        SiglipVisionConfig(hidden_size=8, image_size=20, patch_size=6, **shared),
    )
    model = Siglip(config)
    images = np.random.default_rng(0).normal(size=(1, 20, 20, 3)).astype(np.float32)
    params = jit(model.init)(jax.random.key(0), images, np.ones((1, 4), np.int32))
    assert params["params"]["vision"]["position_embedding"].shape == (9, 8)
    tokens = jit(functools.partial(model.apply, params, method="visual_tokens"))
    assert tokens(images).shape == (1, 9, 8)
    edges, inside = images.copy(), images.copy()
    edges[:, 18:], edges[:, :, 18:], inside[:, 17, 17] = 9, 9, 9
    np.testing.assert_array_equal(tokens(edges), tokens(images))
    assert np.abs(tokens(inside) - tokens(images)).max() > 1e-3


def test_rematerialisation_and_half_precision(tiny):
    config, params, images, ids = tiny

    def gradient(remat):
        def loss(params):
            features = Siglip(config, remat=remat).apply({"params": params}, images, ids)
            return sum(jnp.sum(jnp.sin(x)) for x in features)

        return jit(jax.grad(loss))(params)

    kept, again = map(gradient, (False, True))
    assert np.abs(kept["vision"]["pool"]["probe"]).max() > 0
    assert np.abs(kept["text"]["layers_0"]["fc1"]["kernel"]).max() > 0
    for one, other in zip(*map(jax.tree.leaves, (kept, again)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    full = jit(Siglip(config).apply)({"params": params}, images, ids)
    half = jit(Siglip(config, jnp.bfloat16).apply)({"params": params}, images, ids)
    for one, other in zip(full, half, strict=True):
        assert other.dtype == jnp.bfloat16
        # as near as its 8 bits allow
        assert np.abs(one - other.astype(jnp.float32)).max() < 5e-2 * np.abs(one).max()


def test_wrong_files_and_inputs_are_told(fixture, tiny):
    config, params, images, ids = tiny
    missing = {k: v for k, v in fixture.params.items() if k != "vision_model.head.probe"}
    with pytest.raises(WeightsError, match="Missing tensors .1.: vision_model.head.probe"):
        weights.to_params(missing, config)
    model = Siglip(config).bind({"params": params})
    with pytest.raises(DataError, match=r"takes \[batch, 28, 28, 3\]"):
        model.encode_image(images[:, :21])
    with pytest.raises(DataError, match="text of 15 tokens; this text tower takes at most 14"):
        model.encode_text(np.ones((1, 15), np.int32))
    with pytest.raises(DataError, match="row 0, position 0: token id 200 is not one"):
        model.encode_text(np.full((1, 14), 200, np.int32))
    with pytest.raises(DataError, match="batch of no texts"):
        model.encode_text(ids[:0])
