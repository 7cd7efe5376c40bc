"""CLIP4Cir's first stage: what is tuned, and the CLIP that comes out."""

import jax
import numpy as np
import pytest

from cir_jax import weights
from cir_jax.composers import build, official
from cir_jax.composers.clip4cir import Clip4Cir
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models import subtree
from cir_jax.weights import convert
from tests.composers import inversion
from tests.weights import worlds

ROWS = 8
TOWERS = {"image": {"vision", "visual_projection"}, "text": {"text", "text_projection"}}
TOWERS["both"] = TOWERS["image"] | TOWERS["text"]


def batch(backbone, rows=ROWS):
    size, rng = backbone.config.vision.image_size, np.random.default_rng(0)
    images = rng.integers(0, 255, (2, rows, size, size, 3), np.uint8)
    texts = ["a red star", "blue and two circle", "no green", "it is that"] * (rows // 4)
    return {
        "reference_images": images[0],
        "target_images": images[1],
        "token_ids": backbone.tokenizer(texts),
    }


@pytest.fixture(scope="module")
def made(tiny):
    composer = Clip4Cir(tiny[0], scale=2.0)
    frozen = composer.freeze(tiny[1])
    return composer, composer.start(jax.random.key(0), frozen), frozen


def moved(params):
    return jax.tree.map(lambda x: x * 1.2 + 0.01, params)


def test_the_loss_does_not_depend_on_devices_or_parts(made, tiny):
    inversion.assert_independent_of_devices_and_parts(*made, batch(tiny[0]), least=1e-2)


def test_a_query_is_the_sum_of_the_tuned_features(made, tiny):
    composer, params, frozen = made
    given, tuned = batch(tiny[0], 4), moved(params)
    ours = jax.jit(composer.compose)(tuned, frozen, given, jax.random.key(0))
    whole = frozen["backbone"] | tuned
    image = jax.jit(tiny[0].encode_image)(whole, given["reference_images"])
    total = image + jax.jit(tiny[0].encode_text)(whole, given["token_ids"])
    total /= np.linalg.norm(total, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, total, atol=1e-6)
    gallery = jax.jit(composer.embed_gallery)(tuned, frozen, given["reference_images"])
    np.testing.assert_allclose(
        gallery, image / np.linalg.norm(image, axis=-1, keepdims=True), atol=1e-6
    )
    one = {name: x[3:4] for name, x in given.items()}
    alone = jax.jit(composer.compose)(tuned, frozen, one, jax.random.key(0))
    np.testing.assert_allclose(alone, ours[3:4], rtol=1e-4, atol=1e-6)


def test_the_loss_has_one_direction(made):
    """Against its definition: -log softmax over the targets of each query."""
    rng = np.random.default_rng(0)
    rows = {n: rng.normal(size=(5, 4)).astype(np.float32) for n in ("query", "target")}
    logits = 2.0 * rows["query"] @ rows["target"].T
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
    np.testing.assert_allclose(made[0].objective(made[1], rows)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("tuned", ["image", "text"])
def test_one_encoder_is_tuned_alone(tiny, tuned):
    composer = Clip4Cir(tiny[0], tuned=tuned)
    frozen = composer.freeze(tiny[1])
    params = composer.start(jax.random.key(0), frozen)
    assert set(params) == TOWERS[tuned]
    assert set(jax.eval_shape(composer.init, jax.random.key(0))) == TOWERS[tuned]
    whole = composer.encoders(moved(params), frozen)
    for path, x in convert.flatten(frozen["backbone"]).items():
        assert (convert.flatten(whole)[path] is x) == (path[0] not in TOWERS[tuned]), path


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_files_of_the_authors_are_read_and_written(family, tiny, tmp_path):
    """As `torch.save({"epoch", "CLIP": clip_model.state_dict()})` writes them."""
    torch = pytest.importorskip("torch")
    backbone, params = tiny if family == "vit" else worlds.make("resnet")
    composer = Clip4Cir(backbone)
    frozen = composer.freeze(params)
    rng = np.random.default_rng(0)
    expected = jax.tree.map(
        lambda x: np.asarray(x + rng.normal(0, 0.1, x.shape), np.float32),
        composer.start(jax.random.key(0), frozen),
    )
    theirs = worlds.openai_tensors(backbone, jax.device_get(frozen["backbone"] | expected))
    state = {name: torch.from_numpy(np.array(x)) for name, x in theirs.items()}
    file = tmp_path / "tuned_clip_best.pt"
    torch.save({"epoch": 7, "CLIP": state}, file)
    found = official.load(composer, file, frozen)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    official.save(composer, tmp_path / "mine.pt", found, frozen)
    written = torch.load(tmp_path / "mine.pt", weights_only=True)["CLIP"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    with pytest.raises(WeightsError, match="is not that of the backbone. Set .*tuned=both, or"):
        official.load(Clip4Cir(backbone, tuned="text"), file, frozen)
    torch.save({"epoch": 7, "CLIP": state | {"more": torch.zeros(2)}}, file)
    with pytest.raises(WeightsError, match="more"):
        official.load(composer, file, frozen)


def test_the_tuned_clip_is_a_backbone_for_others(made, tiny, tmp_path):
    composer, params, frozen = made
    tuned = jax.device_get(moved(params))
    official.save(composer, tmp_path / "clip", tuned, jax.device_get(frozen))
    _, loaded = weights.load(tmp_path / "clip")
    assert subtree.chosen(loaded, composer.pattern).keys() == tuned.keys()
    for path, x in convert.flatten(tuned).items():
        np.testing.assert_array_equal(convert.flatten(loaded)[path], x)


def test_mistakes_are_named(tiny, tmp_path):
    for settings, message in (({"tuned": "all"}, "all"), ({"scale": 0.0}, "scale=0.0")):
        with pytest.raises(ConfigError, match=message):
            build("clip4cir", tiny[0], **settings)
    with pytest.raises(ConfigError, match="clip4cir tunes a CLIP, and blip@0 is none"):
        build("clip4cir", worlds.make_blip(tmp_path)[0])
