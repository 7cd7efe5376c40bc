"""The BLIP that ISA stands on: its pretraining, the matching of ISA and BLIP, what ships."""

from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special

from cir_jax import weights
from cir_jax.composers import matching
from cir_jax.composers.blip_pretraining import BlipPretraining
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone

ROOT = Path(__file__).resolve().parents[2]


def test_wrong_ones_look_right_and_never_are():
    scores = np.zeros((5, 5), np.float32)
    scores[0, 3] = scores[1, 1] = 9.0
    draw = jax.jit(jax.vmap(lambda key: matching.wrong_ones(scores, key)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert not (found == np.arange(5)).any()
    shares = np.stack([(found == column).mean(0) for column in range(5)], axis=1)
    assert shares[0, 3] > 0.99
    np.testing.assert_allclose(shares[1, [0, 2, 3, 4]], 0.25, atol=0.04)  # by the floor alone
    np.testing.assert_allclose(shares[2, [0, 1, 3, 4]], 0.25, atol=0.04)


def test_pretraining_is_contrastive_and_matching(tiny_blip, monkeypatch):
    backbone, params = tiny_blip
    composer = BlipPretraining(backbone, temperature=0.1)
    texts = ["a red star", "two blue", "green circle", "it is that"]
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    batch = {"target_images": images, "token_ids": backbone.tokenizer(texts)}
    wrong = np.array([1, 2, 3, 0])
    monkeypatch.setattr(matching, "wrong_ones", lambda scores, _: wrong)
    loss, metrics = composer.loss(params, {}, batch, jax.random.key(0))
    image = np.float64(backbone.encode_image(params, batch["target_images"]))
    text = np.float64(backbone.encode_text(params, batch["token_ids"]))
    norms = np.linalg.norm(text, axis=1)[:, None] * np.linalg.norm(image, axis=1)
    logits = text @ image.T / norms / 0.1
    expected = -np.mean(
        [scipy.special.log_softmax(way, axis=1).diagonal() for way in (logits, logits.T)]
    )
    np.testing.assert_allclose(metrics["contrastive"], expected, rtol=1e-4)
    tokens = backbone.visual_tokens(params, batch["target_images"])
    every, answers = np.arange(4), []
    for rows, shown, label in ((every, every, 1), (every, wrong, 0), (wrong, every, 0)):
        found = backbone.match(params, batch["token_ids"][rows], tokens[shown])
        answers += list(scipy.special.log_softmax(np.float64(found), axis=1)[:, label])
    np.testing.assert_allclose(metrics["matching"], -np.mean(answers), rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["contrastive"] + metrics["matching"], rtol=1e-6)


def test_pretraining_wants_a_blip(tiny):
    with pytest.raises(ConfigError, match="trains a BLIP, and backbone tiny@0 is none"):
        BlipPretraining(tiny[0])


@pytest.mark.peer
def test_the_worlds_blip_beside_transformers():
    """What ships is a Hugging Face BLIP: its features and its matching."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = ROOT / "data" / "shapes" / "blip"
    backbone, params = weights.load(path)
    assert isinstance(backbone, Backbone) and backbone.family == "blip"
    model = transformers.BlipForImageTextRetrieval.from_pretrained(path).float().eval()
    ids = backbone.tokenizer(["a photo of a red star", "two blue circles on gray"])
    images = np.float32(np.random.default_rng(0).standard_normal((2, 32, 32, 3)))
    mask = torch.from_numpy((ids != 0).astype(np.int64))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": mask}
    with torch.no_grad():
        cosine = model(pixel_values=pixels, use_itm_head=False, **given).itm_score
        logits = model(pixel_values=pixels, **given).itm_score
    text = backbone.encode_text(params, ids)
    image = backbone.encode_image(params, images)
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    np.testing.assert_allclose(image @ text.T, cosine, atol=1e-5)
    tokens = backbone.visual_tokens(params, images)
    # transformers leaves [CLS] in front
    ours = backbone.model.apply({"params": params}, ids, tokens, method="match")
    np.testing.assert_allclose(ours, logits, atol=1e-4)
