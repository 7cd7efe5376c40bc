"""Every composer on a BLIP backbone loaded from disk: BERT reads both ways, so padding must not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import composers, weights
from cir_jax.composers import official
from cir_jax.errors import ConfigError, DataError
from cir_jax.input.records import TrimText
from cir_jax.input.text import BUCKET, placeholder_positions
from cir_jax.models.clip import overwrite_tokens
from tests.tiny import drawn
from tests.weights import worlds

# compiled once and run once: compiling is all that takes time
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TEXTS = ["is red", "make it a blue star and two cats", "has two $ cats that is blue , and a star"]
SETTINGS = {
    "image_only": {},
    "text_only": {},
    "image_text": {},
    "slerp": {"alpha": 0.6},
    "compodiff": {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2, "steps": 1},
}


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    weights.save(folder / "blip", *worlds.make_blip(folder))
    return weights.load(folder / "blip")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", SETTINGS)
def test_composes_the_same_batched_alone_and_at_any_length(blip, images, name):
    backbone, params = blip
    composer = composers.build(name, backbone, **SETTINGS[name])
    frozen = composer.freeze(params)
    trained = drawn(composer.init)
    compose = jit(composer.compose)
    ids = backbone.tokenizer(TEXTS)
    assert ids.shape == (3, 16)  # a bucket, not the 35 of the model

    def run(rows, length):
        query = {
            "reference_images": images[rows],
            "token_ids": backbone.tokenizer([TEXTS[row] for row in rows], length),
            "query_index": np.asarray(rows, np.int32),
        }
        return np.asarray(compose(trained, frozen, query, jax.random.key(1)))

    together = run([0, 1, 2], None)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    if composer.pools_text:  # the others pad by themselves
        np.testing.assert_allclose(run([0, 1, 2], 35), together, atol=2e-5)
    for row in (0, 2):
        np.testing.assert_allclose(run([row], None)[0], together[row], atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    gallery = jit(composer.embed_gallery)(trained, frozen, images)
    scores = composer.score(trained, together, gallery)
    assert scores.shape == (3, 3) and np.abs(scores).max() < 1 + 1e-5
    if name == "image_only":
        np.testing.assert_allclose(np.diag(scores), 1, atol=1e-5)


def test_compodiff_has_a_loss_on_it(blip, images):
    backbone, params = blip
    composer = composers.build("compodiff", backbone, **SETTINGS["compodiff"])
    batch = {
        "target_images": images,
        "reference_images": images[::-1],
        "token_ids": backbone.tokenizer(TEXTS),
    }
    trained, frozen = drawn(composer.init), composer.freeze(params)
    loss, metrics = jit(composer.loss)(trained, frozen, batch, jax.random.key(1))
    assert np.isfinite(loss) and metrics["mse_triplet"] == loss


def test_pretraining_wants_a_clip(blip):
    with pytest.raises(ConfigError, match="clip_pretraining trains a CLIP, and backbone blip@"):
        composers.build("clip_pretraining", blip[0])


def test_trimmed_text_has_the_same_features(blip):
    backbone, params = blip
    ids = backbone.tokenizer(TEXTS, backbone.context_length)
    trim = TrimText(backbone.tokenizer.eos_id, BUCKET)
    short = trim.map({"token_ids": ids})["token_ids"]
    assert short.shape == (3, 16)
    encode = jit(backbone.encode_text)
    np.testing.assert_allclose(encode(params, short), encode(params, ids), atol=1e-4)
    states = jit(backbone.text_hidden_states)
    short_states, long_states = states(params, short), states(params, ids)
    words = short != backbone.tokenizer.pad_id
    np.testing.assert_allclose(short_states[words], long_states[:, :16][words], atol=1e-4)


def test_pseudo_words_by_berts_placeholder(blip):
    """At word level, before positions and norm; the token's own embedding changes nothing."""
    backbone, params = blip
    placeholder = backbone.tokenizer.id_of("$")
    ids = backbone.tokenizer(["a photo of $ that is red", "$ , a cat"])
    positions = placeholder_positions(ids, placeholder)
    assert positions.tolist() == [4, 1]

    @jit
    def run(params):
        """Plain; with the words' own embeddings put in; with others."""
        embeddings = backbone.embed_tokens(params, ids)
        assert embeddings.shape == (2, 16, backbone.token_dim)
        own = embeddings[np.arange(2), positions]
        put_in = (overwrite_tokens(embeddings, positions, factor * own) for factor in (1, -2))
        return [backbone.encode_text(params, ids, each) for each in (None, *put_in)]

    expected, same, other = run(params)
    np.testing.assert_allclose(same, expected, atol=1e-5)
    assert np.abs(other - expected).max(axis=1).min() > 1e-3
    with pytest.raises(DataError, match="row 1: no placeholder"):
        placeholder_positions(backbone.tokenizer(["$", "a cat"]), placeholder)


def test_the_matching_encoder(blip, images):
    """[ENC] first, also with pseudo-words; its own image for each text; padding does not count."""
    backbone, params = blip
    ids = backbone.tokenizer(TEXTS)
    longer = backbone.tokenizer(TEXTS, 35)
    with_enc = np.where(np.arange(16) == 0, backbone.config.text.enc_token_id, ids)

    @jit
    def run(params, images):
        tokens = backbone.visual_tokens(params, images)
        assert tokens.shape == (3, 5, 64)
        embeddings = backbone.embed_tokens(params, ids)  # of [CLS] still
        return {
            "logits": backbone.match(params, ids, tokens),
            "plain": backbone.model.apply({"params": params}, with_enc, tokens, method="match"),
            "put in": backbone.match(params, ids, tokens, embeddings),
            "longer": backbone.match(params, longer, tokens),
        }, backbone.match(params, ids, tokens[::-1])

    same, other = run(params, images)
    logits = same["logits"]
    assert logits.shape == (3, 2) and logits.dtype == jnp.float32
    for name in ("plain", "put in", "longer"):
        np.testing.assert_allclose(same[name], logits, atol=1e-4, err_msg=name)
    assert np.abs(other[0] - logits[0]).max() > 1e-3


def test_a_clip_has_no_matching_encoder(tiny):
    backbone, params = tiny
    with pytest.raises(ConfigError, match="tiny@0: a CLIP has no matching encoder. Use a BLIP"):
        backbone.match(params, np.ones((1, 4), np.int32), np.zeros((1, 5, 48)))


def test_bad_input_is_named(blip):
    backbone, params = blip
    ids = backbone.tokenizer(TEXTS)
    wrong = ids.copy()
    wrong[1, 2] = 30_000
    with pytest.raises(DataError, match="row 1, position 2: token id 30000 is not one of the mode"):
        backbone.encode_text(params, wrong)
    with pytest.raises(DataError, match="batch of no texts"):
        backbone.encode_text(params, ids[:0])
    with pytest.raises(DataError, match="batch of no images"):
        backbone.encode_image(params, np.zeros((0, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="33 x 32 pixels are not made of 16 x 16 patches"):
        backbone.encode_image(params, np.zeros((1, 33, 32, 3), np.uint8))
    with pytest.raises(DataError, match="text of 49 tokens; this text tower takes at most 48"):
        backbone.encode_text(params, np.ones((1, 49), np.int32))


def test_pic2word_has_no_file_for_it(blip):
    composer = composers.build("pic2word", blip[0], scale=100.0)
    with pytest.raises(ConfigError, match="export_to=f.pt: Pic2Word on a blip backbone has no off"):
        official.check_known(composer, "config.export_to=f.pt")
