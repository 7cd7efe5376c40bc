"""The image tower of one CLIP and the text tower of another: "IMAGES+TEXTS"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import composers, weights
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation.evaluate import baselines
from cir_jax.models.backbone import TOWERS
from cir_jax.weights.convert import Parameter
from tests.weights import worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`small` and `large`, whose text towers differ in width; `resnet` in OpenCLIP's format."""
    path = tmp_path_factory.mktemp("pair")
    weights.save(path / "small", *worlds.make())
    weights.save(path / "large", *worlds.make(act="gelu", seed=1, text_width=128))
    weights.save(path / "resnet", *worlds.make("resnet"))
    return path


@pytest.mark.parametrize("images", ["small", "resnet"])
def test_each_tower_is_its_own_models(folder, images):
    pair, params = weights.load(f"{folder / images}+{folder / 'large'}")
    first, first_params = weights.load(folder / images)
    second, second_params = weights.load(folder / "large")
    assert (pair.dim, pair.token_dim, pair.context_length) == (24, 128, 16)
    assert pair.image_transform == first.image_transform and not pair.joint
    size = first.config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (2, size, size, 3), np.uint8)
    ids = pair.tokenizer(worlds.TEXTS)

    @jax.jit
    def both(params, first_params, second_params):
        ours = [pair.encode_image(params, pixels), pair.visual_tokens(params, pixels)]
        ours += [pair.embed_tokens(params, ids), pair.text_hidden_states(params, ids)]
        theirs = [first.encode_image(first_params, pixels)]
        theirs += [first.visual_tokens(first_params, pixels)]
        theirs += [second.embed_tokens(second_params, ids)]
        return ours, [*theirs, second.text_hidden_states(second_params, ids)]

    for ours, theirs in zip(*both(params, first_params, second_params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_what_is_not_used_is_not_read(folder, monkeypatch):
    """A bigG has five times the parameters of its text tower."""
    read = []
    convert = Parameter.__getitem__
    monkeypatch.setattr(
        Parameter, "__getitem__", lambda self, index: read.append(self.name) or convert(self, index)
    )
    pair, params = weights.load(f"{folder / 'small'}+{folder / 'large'}")
    assert {half: set(tree) for half, tree in params.items()} == {
        half: set(names) for half, names in TOWERS.items()
    }
    assert sum(name.startswith("text_model.") for name in read) == sum(
        len(jax.tree.leaves(params["text"][name])) for name in ("text",)
    )
    assert "text_projection.weight" not in read
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(pair.init, jax.random.key(0))
    )
    assert pair.weights_id.count("@") == 2
    other = weights.load(f"{folder / 'small'}+{folder / 'small'}")[0]
    assert other.weights_id.split("+")[0] == pair.weights_id.split("+")[0]
    assert other.weights_id != pair.weights_id
    half = pair.with_dtype(jnp.bfloat16)
    assert {half.model.dtype, half.text_model.dtype} == {np.dtype(jnp.bfloat16).type}
    assert pair.with_dtype(jnp.bfloat16) is half and pair.with_dtype(jnp.float32) is pair


def test_it_serves_compodiff_and_says_no_to_others(folder):
    name = f"{folder / 'small'}+{folder / 'large'}"
    pair, params = weights.load(name)
    composer = composers.build("compodiff", pair, depth=1, heads=2, dim_head=8, cross_heads=2)
    assert (composer.config.embed_dim, composer.config.text_dim) == (24, 128)
    query = {
        "reference_images": np.zeros((2, 16, 16, 3), np.uint8),
        "token_ids": pair.tokenizer(worlds.TEXTS),
    }
    frozen = composer.freeze(params)
    key = jax.random.key(0)
    run = jax.eval_shape(composer.compose, jax.eval_shape(composer.init, key), frozen, query, key)
    assert run.shape == (2, 24)
    with pytest.raises(ConfigError, match="two models' towers, whose features are not in one spac"):
        composers.build("text_only", pair).compose({}, frozen, query, key)
    assert list(baselines(pair)) == ["image_only"]
    with pytest.raises(ConfigError, match="clip_pretraining trains a CLIP"):
        composers.build("clip_pretraining", pair)
    assert weights.load_architecture(name).weights_id == "small@untrained+large@untrained"
    with pytest.raises(WeightsError, match="cannot be saved as one directory"):
        weights.save(folder / "never", pair, params)


def test_halves_that_do_not_fit(folder, tmp_path):
    weights.save(tmp_path / "blip", *worlds.make_blip(tmp_path))
    for name in (f"{tmp_path / 'blip'}+{folder / 'small'}", f"{folder / 'small'}+{tmp_path}/blip"):
        with pytest.raises(WeightsError, match="blip/config.json: weights of blip, expected CLIP"):
            weights.load(name)
    with pytest.raises(WeightsError, match="backbone 'nowhere': no such directory"):
        weights.load(f"{folder / 'small'}+nowhere")
    # a plus in a path is a plus in a path
    weights.save(tmp_path / "a+b", *worlds.make())
    assert weights.load(tmp_path / "a+b")[0].joint
