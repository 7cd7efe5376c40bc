"""TAT: what moves, what stays, and the backbone that comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cir_jax import weights
from cir_jax.composers import build, official
from cir_jax.composers.losses import pair_cross_entropy
from cir_jax.composers.slerp import Slerp
from cir_jax.composers.tat import Tat
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from tests.composers import inversion
from tests.weights import worlds

ROWS = 8


def batch(backbone, rows=ROWS):
    size = backbone.config.vision.image_size
    images = np.random.default_rng(0).integers(0, 255, (rows, size, size, 3), np.uint8)
    texts = ["a red star", "blue and two circle", "no green", "it is that"] * (rows // 4)
    return {"target_images": images, "token_ids": backbone.tokenizer(texts)}


def trained(composer, size=0.2):
    """Parameters as after training: the product is not zero."""
    shapes = jax.eval_shape(composer.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return tree.unflatten([rng.normal(0, size, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def made(tiny):
    composer = Tat(tiny[0], rank=2, lora_alpha=4.0)
    return composer, trained(composer), composer.freeze(tiny[1])


def test_the_loss_does_not_depend_on_devices_or_parts(made, tiny):
    """With dropout: each row has masks of its own."""
    inversion.assert_independent_of_devices_and_parts(*made, batch(tiny[0]))


def test_it_begins_as_slerp_and_moves_images_alone(made, tiny):
    composer, params, frozen = made
    given = batch(tiny[0])
    query = {"reference_images": given["target_images"], "token_ids": given["token_ids"]}
    start = jax.jit(composer.init)(jax.random.key(0))
    compose = jax.jit(composer.compose)
    slerp = jax.jit(Slerp(tiny[0]).compose)({}, frozen, query, jax.random.key(0))
    before = compose(start, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(before, slerp, atol=1e-6)
    after = compose(params, frozen, query, jax.random.key(0))
    assert np.abs(after - before).max() > 1e-2
    one = {name: x[3:4] for name, x in query.items()}
    np.testing.assert_allclose(
        compose(params, frozen, one, jax.random.key(0)), after[3:4], rtol=1e-4, atol=1e-6
    )
    assert set(params) == {"vision"}
    whole = composer.encoders(params, frozen)
    moved = {
        "/".join(path)
        for path, x in flatten_dict(whole).items()
        if not np.array_equal(x, flatten_dict(frozen["backbone"])[path])
    }
    layers = range(tiny[0].config.vision.num_hidden_layers)
    assert moved == {
        f"vision/layers_{i}/attention/{part}/kernel" for i in layers for part in ("query", "value")
    }


def test_merged_and_unmerged_are_the_same_and_dropout_is_on_the_adapter(made, tiny):
    composer, params, frozen = made
    given, keys = batch(tiny[0], 4), jax.random.split(jax.random.key(0), 4)
    encode = {
        rate: jax.jit(Tat(tiny[0], rank=2, lora_alpha=4.0, dropout=rate).encode)
        for rate in (0.0, 1e-6, 0.5)
    }
    rows = {rate: run(params, frozen, given, keys) for rate, run in encode.items()}
    np.testing.assert_allclose(rows[0.0]["image"], rows[1e-6]["image"], atol=1e-5)
    gallery = jax.jit(composer.embed_gallery)(params, frozen, given["target_images"])
    np.testing.assert_allclose(rows[0.0]["image"], gallery, atol=1e-6)
    assert np.abs(rows[0.5]["image"] - gallery).max() > 1e-3
    np.testing.assert_array_equal(rows[0.5]["text"], rows[0.0]["text"])
    same = {name: np.repeat(x[:1], 3, axis=0) for name, x in given.items()}
    drawn = encode[0.5](params, frozen, same, keys[jnp.array([0, 0, 1])])["image"]
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-6)
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3


def test_the_loss_is_the_sum_of_both_directions_at_the_fixed_scale(made):
    composer, params, _ = made
    rng = np.random.default_rng(0)
    rows = {n: rng.normal(size=(5, 4)).astype(np.float32) for n in ("image", "text")}
    logits = rows["image"] @ rows["text"].T / 0.07
    expected = pair_cross_entropy(logits) + pair_cross_entropy(logits.T)
    np.testing.assert_allclose(composer.objective(params, rows)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "share"), [((768, 12, 32, 512, 8), 0.39), ((1024, 24, 14, 768, 12), 0.37)]
)
def test_less_than_half_a_percent_is_learned(tiny, size, share):
    width, layers, patch, text, heads = size
    vision = VisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, patch_size=patch,
    )  # fmt: skip
    config = ClipConfig(
        TextConfig(hidden_size=text, num_attention_heads=heads, intermediate_size=4 * text),
        vision,
        projection_dim=text,
    )
    backbone = dataclasses.replace(tiny[0], model=Clip(config))
    key = jax.random.key(0)
    counts = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, key)))
        for init in (Tat(backbone).init, backbone.init)
    ]
    assert round(100 * counts[0] / counts[1], 2) == share


@pytest.mark.parametrize(("tuned", "towers"), [("text", {"text"}), ("both", {"text", "vision"})])
def test_ablations_anchor_the_other_tower_or_none(tiny, tuned, towers):
    composer = Tat(tiny[0], rank=2, tuned=tuned, dropout=0.5)
    params, frozen = trained(composer), composer.freeze(tiny[1])
    assert set(params) == towers
    given, keys = batch(tiny[0], 4), jax.random.split(jax.random.key(0), 4)
    encode = jax.jit(composer.encode)
    rows, other = (encode(params, frozen, given, k) for k in (keys, keys[::-1]))
    for tower, name in (("vision", "image"), ("text", "text")):
        assert (np.abs(rows[name] - other[name]).max() > 1e-4) == (tower in towers)


@pytest.mark.parametrize("family", ["clip", "blip"])
def test_the_tuned_backbone_is_one_for_others(family, tiny, tmp_path):
    """Hugging Face's directory has its features; the adapter in it is read back."""
    backbone, params = tiny if family == "clip" else worlds.make_blip(tmp_path)
    composer = Tat(backbone, rank=2, lora_alpha=4.0)
    learned, frozen = trained(composer), composer.freeze(params)
    official.save(composer, tmp_path / "tuned", learned, jax.device_get(frozen))
    images = batch(backbone, 4)["target_images"]
    loaded, loaded_params = weights.load(tmp_path / "tuned")
    ours = jax.jit(composer.embed_gallery)(learned, frozen, images)
    theirs = jax.jit(loaded.encode_image)(loaded_params, images)
    theirs /= np.linalg.norm(theirs, axis=-1, keepdims=True)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert loaded.weights_id.partition("@")[2] != backbone.weights_id.partition("@")[2]
    for path in (tmp_path / "tuned", tmp_path / "tuned" / "adapter"):
        again = official.load(composer, path, frozen)
        jax.tree.map(np.testing.assert_array_equal, again, learned)
    with pytest.raises(WeightsError, match=r"rank 2, alpha 4.0; this one has 4, 4.0. Set .*rank=2"):
        official.load(Tat(backbone, rank=4, lora_alpha=4.0), tmp_path / "tuned", frozen)


def test_mistakes_are_named(tiny):
    for settings, message in (
        ({"tuned": "images"}, "images"),
        ({"alpha": 2.0}, "alpha=2.0"),
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"scale": 0.0}, "scale=0.0, lora_alpha=16.0: expected more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("tat", tiny[0], **settings)
    with pytest.raises(ConfigError, match="LoRA pattern 'vision/.* matches no parameter"):
        build("tat", worlds.make("resnet")[0])
