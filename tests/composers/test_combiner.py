"""Combiner: its loss, its files, its texts. Values of the original are in tests/golden."""

import collections

import jax
import numpy as np
import pytest

from cir_jax.composers import official
from cir_jax.composers.combiner import Combiner
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input.records import JoinedTriplets
from tests.composers import inversion

NAMES = ("reference", "target")
SIZES = {"projection_dim": 12, "hidden_dim": 20}


@pytest.fixture(scope="module")
def made(tiny):
    backbone, backbone_params = tiny
    composer = Combiner(backbone, **SIZES)
    return composer, jax.jit(composer.init)(jax.random.key(0)), composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def batch(tiny):
    texts = ["a red star", "blue and two circle", "no green", "it is that"]
    return {
        "reference_features": inversion.features(tiny[0]),
        "target_features": inversion.features(tiny[0], seed=1),
        "token_ids": tiny[0].tokenizer(texts * (inversion.ROWS // 4)),
    }


def test_the_loss_does_not_depend_on_devices_or_parts(made, batch):
    inversion.assert_independent_of_devices_and_parts(*made, batch)


def test_queries_are_the_same_one_by_one_and_nothing_is_dropped(made, batch):
    composer, params, frozen = made
    query = {name: batch[name] for name in ("reference_features", "token_ids")}
    compose = jax.jit(composer.compose)
    together = compose(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(compose(params, frozen, query, jax.random.key(1)), together)
    one = {name: x[3:4] for name, x in query.items()}
    alone = compose(params, frozen, one, jax.random.key(0))
    np.testing.assert_allclose(alone, together[3:4], rtol=1e-4, atol=1e-6)


def test_each_row_drops_out_by_its_own_key(made, batch):
    composer, params, frozen = made
    same = {name: np.repeat(np.asarray(x[:1]), 4, axis=0) for name, x in batch.items()}
    first, second = jax.random.split(jax.random.key(0))
    rngs = jax.numpy.stack([first, first, second, second])
    rows = jax.jit(composer.encode)(params, frozen, same, rngs)["query"]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    np.testing.assert_allclose(rows[2], rows[3], atol=1e-6)
    assert np.abs(rows[0] - rows[2]).max() > 1e-2


def test_images_give_the_loss_of_their_features(made, tiny):
    composer, params, frozen = made
    rng = np.random.default_rng(0)
    images = {f"{n}_images": rng.integers(0, 255, (4, 16, 16, 3), np.uint8) for n in NAMES}
    encode = jax.jit(tiny[0].encode_image)
    stored = {f"{n}_features": encode(frozen["backbone"], images[f"{n}_images"]) for n in NAMES}
    texts = {"token_ids": tiny[0].tokenizer(["a red star"] * 4)}
    rngs = jax.random.split(jax.random.key(0), 4)
    losses = [
        composer.objective(params, jax.jit(composer.encode)(params, frozen, given | texts, rngs))[0]
        for given in (images, stored)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("layout", ["of CLIP4Cir", "of GeneCIS"])
def test_files_of_pytorch_are_read(made, tmp_path, layout):
    """As `torch.save({"epoch": ..., "Combiner": model.state_dict()})` and GeneCIS write them."""
    torch = pytest.importorskip("torch")
    dim = made[0].backbone.dim
    theirs = {
        "text_projection_layer": torch.nn.Linear(dim, 12),
        "image_projection_layer": torch.nn.Linear(dim, 12),
        "combiner_layer": torch.nn.Linear(24, 20),
        "output_layer": torch.nn.Linear(20, dim),
        "dynamic_scalar": torch.nn.Sequential(
            torch.nn.Linear(24, 20), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Linear(20, 1), torch.nn.Sigmoid(),
        ),
    }  # fmt: skip
    model = torch.nn.ModuleDict(theirs)
    file = tmp_path / "combiner.pt"
    if layout == "of CLIP4Cir":
        torch.save({"epoch": 29, "Combiner": model.state_dict()}, file)
    else:
        torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, file)
    params = official.load(made[0], file, made[2])
    expected = theirs["combiner_layer"].weight.detach().numpy().T
    np.testing.assert_array_equal(params["combiner"]["kernel"], expected)
    text, image = np.random.default_rng(0).standard_normal((2, 3, dim), np.float32)
    ours = made[0].network.apply({"params": params}, text, image)
    with torch.no_grad():
        t, i = torch.from_numpy(text), torch.from_numpy(image)
        both = torch.cat(
            [theirs["text_projection_layer"](t).relu(), theirs["image_projection_layer"](i).relu()],
            dim=-1,
        )
        share = theirs["dynamic_scalar"].eval()(both)
        fused = theirs["output_layer"](theirs["combiner_layer"](both).relu())
        fused = fused + share * t + (1 - share) * i
    np.testing.assert_allclose(ours, fused.numpy(), atol=1e-5)


def test_written_files_come_back(made, tmp_path):
    pytest.importorskip("torch")
    composer, params, frozen = made
    official.save(composer, tmp_path / "combiner.pt", jax.device_get(params), frozen)
    again = official.load(composer, tmp_path / "combiner.pt", frozen)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))


def test_files_of_another_width_or_method_are_refused(made, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    composer, params, frozen = made
    official.save(composer, tmp_path / "combiner.pt", jax.device_get(params), frozen)
    wider = Combiner(tiny[0], projection_dim=13, hidden_dim=20)
    with pytest.raises(WeightsError, match=r"combiner.pt on the backbone tiny.*\(24, 12\)"):
        official.load(wider, tmp_path / "combiner.pt", frozen)
    torch.save({"epoch": 1, "Phi": {"layers.0.weight": torch.zeros(2, 2)}}, tmp_path / "phi.pt")
    with pytest.raises(WeightsError, match="expected a state dict under 'Combiner'; it holds Phi"):
        official.load(composer, tmp_path / "phi.pt", frozen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout=1.0: expected a fraction from 0 to less than 1"),
        ({"hidden_dim": 0}, "hidden_dim=0: expected 1 or more"),
        ({"scale": 0.0}, "scale=0.0: expected more than 0"),
    ],
)
def test_settings_that_cannot_work(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        Combiner(tiny[0], **settings)


def test_two_texts_are_joined_in_four_ways(tiny):
    transform = JoinedTriplets(tiny[0].tokenizer, "features")
    element = {"reference": 1, "target": 2, "text": b"unused", "texts": (b" is red.", b"a star?")}
    rng = np.random.default_rng(0)
    drawn = collections.Counter(
        transform.random_map(element, rng)["token_ids"].tobytes() for _ in range(200)
    )
    texts = ("is red and a star", "a star and is red", "is red", "a star")
    expected = {tiny[0].tokenizer([text], tiny[0].context_length)[0].tobytes() for text in texts}
    assert set(drawn) == expected and min(drawn.values()) > 25
    single = element | {"text": b"no green", "texts": (b"no green",)}
    ids = transform.random_map(single, rng)["token_ids"]
    np.testing.assert_array_equal(ids, tiny[0].tokenizer(["no green"], len(ids))[0])
