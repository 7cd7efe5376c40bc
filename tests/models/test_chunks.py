"""Chunks of a batch on CPU: the features of the whole batch, and where there are none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.models import chunks, lora


@pytest.fixture
def one_device(monkeypatch):
    """As if this process, with eight devices for the other tests, had one, of 16 KiB a core."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(chunks, "CACHE_PER_CORE", 2**14)
    monkeypatch.setattr(chunks, "cores", lambda: 2)


@pytest.fixture
def counted(tiny):
    """(backbone, params, batches): `batches` gets the number of rows of each pass of the model."""
    batches = []

    class Counting(type(tiny[0])):
        def _apply(self, params, *args, method):
            batches.append((method, len(args[0])))
            return super()._apply(params, *args, method=method)

    fields = {f.name: getattr(tiny[0], f.name) for f in dataclasses.fields(tiny[0])}
    return Counting(**fields), tiny[1], batches


def test_chunks_are_even_and_fit_the_cache(monkeypatch):
    monkeypatch.setattr(chunks, "cores", lambda: 2)
    b32, l14 = chunks.activation_bytes(50, 3072), chunks.activation_bytes(257, 4096)
    assert chunks.chunk_size(256, b32) == chunks.chunk_size(32, b32) == 8
    assert chunks.chunk_size(33, b32) == 7  # 35 rows are computed; in eights it would be 40
    assert chunks.chunk_size(15, b32) == 15  # less than two chunks of 8
    assert chunks.chunk_size(256, l14) == 1
    monkeypatch.setattr(chunks, "cores", lambda: 64)
    assert chunks.chunk_size(256, b32) == 256
    for batch in (1, 39, 41, 67, 257, 1000):
        size = chunks.chunk_size(batch, 2**24)  # 20 of them fit
        assert size == batch < 40 or (10 < size <= 20 and -batch % size <= 0.07 * batch), batch


def test_features_are_those_of_the_whole_batch(counted, one_device):
    backbone, params, batches = counted
    rng, batch, size = np.random.default_rng(0), 37, backbone.config.vision.image_size
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    ids = rng.integers(5, 12, (batch, 6))
    ids[:, -1] = backbone.config.text.eos_token_id
    embeddings = backbone.embed_tokens(params, ids)
    mask = np.arange(6)[None] <= rng.integers(0, 6, (batch, 1))

    def features(params):
        return {
            "encode_image": backbone.encode_image(params, images),
            "encode_text": backbone.encode_text(params, ids, embeddings[::-1]),
            "text_hidden_states": backbone.text_hidden_states(params, ids, mask),
        }

    with chunks.whole():
        expected = jax.jit(features)(params)
    batches.clear()
    ours = jax.jit(lambda params: features(params))(params)
    traced = [(name, rows) for name, rows in batches if name != "embed_tokens"]
    assert [name for name, _ in traced] == list(expected)  # one chunk of each
    assert all(1 < rows <= batch / 2 for _, rows in traced)
    for name, x in expected.items():
        assert ours[name].dtype == x.dtype
        np.testing.assert_allclose(ours[name], x, rtol=1e-5, atol=2e-6, err_msg=name)
    batches.clear()
    eager = backbone.encode_text(params, ids, embeddings[::-1])
    assert len(batches) > 1 and sum(rows for _, rows in batches) >= batch
    np.testing.assert_allclose(eager, expected["encode_text"], rtol=1e-5, atol=2e-6)


def test_gradients_are_those_of_the_whole_batch(tiny, one_device):
    backbone, params = tiny
    ids = np.full((32, 6), 7)
    ids[:, -1] = backbone.config.text.eos_token_id
    words = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6, backbone.token_dim)))

    def gradient(words):
        return jax.grad(lambda w: jnp.sin(backbone.encode_text(params, ids, w)).sum())(words)

    with chunks.whole():
        expected = jax.jit(gradient)(words)
    cut = jax.jit(lambda words: gradient(words))(words)
    np.testing.assert_allclose(cut, expected, rtol=1e-5, atol=1e-6)


def test_where_batches_stay_whole(counted, one_device, monkeypatch):
    backbone, params, batches = counted
    ids = np.full((64, 6), backbone.config.text.eos_token_id)

    def rows(params=params):
        batches.clear()
        jax.eval_shape(lambda p: backbone.encode_text(p, ids), params)
        return batches[-1][1]

    assert rows() < 64
    assert rows(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)) == 64
    # LoRA's dropout gives each call of a layer one mask: a chunk must not be a call
    with chunks.whole():
        assert rows() == 64
    with pytest.raises(ZeroDivisionError), lora.attached({}, 1.0):
        assert rows() == 64
        raise ZeroDivisionError
    assert rows() < 64
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert rows() == 64
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows() == 64


def test_an_error_names_the_row_of_the_batch(tiny, one_device):
    backbone, params = tiny
    ids = np.full((64, 6), backbone.config.text.eos_token_id)
    ids[60, 2] = 10**6
    with pytest.raises(DataError, match="row 60, position 2: token id 1000000"):
        backbone.encode_text(params, ids)
