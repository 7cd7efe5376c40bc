"""Pic2Word: its loss, its files, its crops. Values of the original are in tests/golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from cir_jax.composers import losses, official
from cir_jax.composers.base import normalise
from cir_jax.composers.pic2word import Pic2Word
from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input.crops import RandomResizedCrop
from cir_jax.training import optimizers
from experiments import pic2word
from tests import tiny as factory
from tests.composers import inversion


@pytest.fixture(scope="module")
def made(tiny):
    backbone, backbone_params = tiny
    composer = Pic2Word(backbone, hidden_dim=20, link="that")
    return composer, jax.jit(composer.init)(jax.random.key(0)), composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def batch(tiny):
    return {"reference_features": inversion.features(tiny[0])}


def test_the_loss_does_not_depend_on_devices_or_parts(made, batch):
    inversion.assert_independent_of_devices_and_parts(*made, batch)


def test_the_loss_is_that_of_the_full_length(made, batch, tiny):
    composer, params, frozen = made
    short = inversion.loss_and_gradient(composer, params, frozen, batch)
    longer = Pic2Word(tiny[0], hidden_dim=20)
    longer.training_ids = np.asarray(inversion.with_tail(composer.training_ids, 16))
    assert longer.training_ids.shape[1] > composer.training_ids.shape[1]
    inversion.assert_same(inversion.loss_and_gradient(longer, params, frozen, batch), short)


def test_the_scale_is_the_backbones_unless_given(made, batch, tiny):
    _, params, frozen = made
    composer = Pic2Word(tiny[0], hidden_dim=20, dropout=0.0)
    own = np.exp(frozen["backbone"]["logit_scale"])
    given = Pic2Word(tiny[0], hidden_dim=20, dropout=0.0, scale=float(own))
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    rows = jax.jit(composer.encode)(params, frozen, batch, rngs)
    loss = composer.objective(params, rows)[0]
    unit = normalise(batch["reference_features"])
    np.testing.assert_allclose(loss, losses.info_nce(unit, rows["text"], own), rtol=1e-5)
    rows = jax.jit(given.encode)(params, frozen, batch, rngs)
    np.testing.assert_allclose(given.objective(params, rows)[0], loss, rtol=1e-6)


def test_the_released_gradient_is_that_of_eps_times_the_devices(made):
    """A rank has the whole loss and the gradient of its own rows; ranks are averaged; eps 1e-6."""
    composer, ranks = made[0], 8
    settings = pic2word.get_config("vit_l14_code").stage.contrastive.optimizer.to_dict()
    assert settings["eps"] == ranks * 1e-6
    build = functools.partial(optimizers.optimizer, steps=9, to_steps=lambda *_, **__: 0)
    images, features = jax.random.normal(jax.random.key(0), (2, 2 * ranks, 6))
    rank_of = jnp.arange(2 * ranks) // 2

    def loss(weights, own=None):
        """own: bool[rows], of a rank, which come first; None = all are on one device."""
        text = normalise(features @ weights["kernel"])
        rows = {"image": 10 * normalise(images), "text": text}
        if own is not None:
            rows["text"] = jnp.where(own[:, None], text, jax.lax.stop_gradient(text))
            rows = {name: x[jnp.argsort(~own)] for name, x in rows.items()}
        return composer.objective({}, rows)[0]

    def of_ranks(weights):
        found = jax.vmap(lambda rank: jax.grad(loss)(weights, rank_of == rank))(jnp.arange(ranks))
        return jax.tree.map(lambda x: x.mean(axis=0), found)

    def updates(gradient, optimizer):
        """float32[steps, 6, 6]"""

        def step(carry, _):
            weights, state = carry
            update, state = optimizer.update(gradient(weights), state, weights)
            return (optax.apply_updates(weights, update), state), update["kernel"]

        # large weights: their gradients are of the size of eps
        start = {"kernel": 1e4 * jax.random.normal(jax.random.key(1), (6, 6))}
        return jax.lax.scan(step, (start, optimizer.init(start)), length=3)[1]

    release = build(settings | {"eps": 1e-6, "weight_decay": 0.0})
    ours = build(settings | {"weight_decay": 0.0})
    sides = ((of_ranks, release), (jax.grad(loss), ours), (jax.grad(loss), release))
    expected, code, full = jax.jit(lambda: [updates(*side) for side in sides])()
    np.testing.assert_allclose(code, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.abs(full - expected).max() > 0.2 * np.abs(expected).max()


def test_prompts(tiny):
    assert Pic2Word(tiny[0]).prompt("is red") == "a photo of * , is red"
    assert Pic2Word(tiny[0], link="that").prompt("is red") == "a photo of * that is red"
    assert Pic2Word(tiny[0]).prompt("") == "a photo of *"


def test_official_files_come_back(made, tmp_path):
    torch = pytest.importorskip("torch")
    composer, params, frozen = made
    file = tmp_path / "pic2word.pt"
    official.save(composer, file, params, frozen)
    stored = torch.load(file, weights_only=True)
    assert set(stored) == {"epoch", "name", "state_dict", "state_dict_img2text"}
    assert all(name.startswith("module.") for name in stored["state_dict_img2text"])
    assert stored["state_dict_img2text"]["module.layers.1.0.weight"].shape == (20, 20)
    again = official.load(composer, file, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    # beside an optimiser, as the original is
    torch.save(stored | {"optimizer": {"state": {0: {"step": torch.zeros(3)}}}}, file)
    official.load(composer, file, frozen)
    other = composer.freeze(factory.backbone(seed=1)[1])
    with pytest.raises(WeightsError, match="is not that of the backbone. It is tiny@0: set --con"):
        official.load(composer, file, other)
    stored["state_dict_img2text"]["module.layers.2.0.weight"] = torch.zeros(20, 20)
    torch.save(stored, file)
    message = (
        r"pic2word.pt: a network of 3 hidden layers, this one has 2. Set --config.composer.n_l"
    )
    with pytest.raises(WeightsError, match=message):
        official.load(composer, file, frozen)
    torch.save({"epoch": 1, "state_dict": stored["state_dict"]}, file)
    with pytest.raises(WeightsError, match="under 'state_dict_img2text'; it holds state_dict"):
        official.load(composer, file, frozen)
    with pytest.raises(WeightsError, match="nowhere.pt: no such file. Download"):
        official.load(composer, tmp_path / "nowhere.pt", frozen)


def test_a_network_of_another_depth_comes_back(made, tiny, tmp_path):
    pytest.importorskip("torch")
    composer = Pic2Word(tiny[0], hidden_dim=20, n_layer=3)
    params = composer.init(jax.random.key(0))
    assert list(params) == ["fc1", "fc2", "fc3", "out"]
    official.save(composer, tmp_path / "deep.pt", params, made[2])
    again = official.load(composer, tmp_path / "deep.pt", made[2])
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout=1.0: expected a fraction"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_mistaken_settings(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        Pic2Word(tiny[0], **settings)


def test_random_crops():
    crop, rng = RandomResizedCrop(8), np.random.default_rng(0)
    boxes = np.asarray([crop.box(40, 30, rng) for _ in range(300)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 30).all()
    share = wide * high / (40 * 30)
    assert share.min() > 0.86 and share.max() <= 1 and share.std() > 0.02  # sides are rounded
    assert (np.abs(np.log(wide / high)) < np.log(4 / 3) + 0.05).all()
    assert len(set(boxes[:, 0])) > 1 and len(set(boxes[:, 1])) > 1
    # no part of 90 % has an allowed ratio: the largest central one
    assert crop.box(100, 30, rng) == (30, 0, 70, 30)
    assert crop.box(30, 100, rng) == (0, 30, 30, 70)
    image = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
    first, same = (crop(image, np.random.default_rng(5)) for _ in range(2))
    assert first.shape == (8, 8, 3) and first.dtype == np.uint8 and (first == same).all()
    assert (first != crop(image, np.random.default_rng(6))).any()
    whole = RandomResizedCrop(8, (1.0, 1.0), (4 / 3, 4 / 3))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(whole(image, rng), expected)
    with pytest.raises(DataError, match="two shares of the area"):
        RandomResizedCrop(8, (0.9, 1.1))
