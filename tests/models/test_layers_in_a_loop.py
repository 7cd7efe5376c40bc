"""Equal layers in a loop: the same numbers and the same parameters, one copy in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.models import layers, lora
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import Blip, BlipConfig, BlipVisionConfig
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.models.denoiser import Denoiser, DenoiserConfig
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.training import flops

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 16, 16, 3)).astype(np.float32)
IDS = RNG.integers(5, 20, (3, 6))
TEXTS = {"vocab_size": 24, "max_position_embeddings": 8, "bos_token_id": 1, **SIZES}
CLIP = ClipConfig(
    TextConfig(**TEXTS, eos_token_id=2, pad_token_id=0),
    VisionConfig(image_size=16, patch_size=8, **SIZES),
    12,
)
BLIP = BlipConfig(
    BertConfig(**TEXTS | {"bos_token_id": 22}, encoder_hidden_size=16),
    BlipVisionConfig(image_size=16, patch_size=8, **SIZES),
    12,
)
DENOISED = (
    RNG.normal(size=(3, 2, 16)).astype(np.float32),
    RNG.integers(0, 1000, (3, 2)),
    RNG.normal(size=(3, 6, 10)).astype(np.float32),
    RNG.normal(size=(3, 16)).astype(np.float32),
    np.ones((1, 8, 8), np.float32),
    IDS > 9,
)


def denoiser(conditioning):
    sizes = {"embed_dim": 16, "text_dim": 10, "depth": 2, "heads": 2, "dim_head": 8}
    return Denoiser(DenoiserConfig(**sizes, cross_heads=2, mask_size=8, conditioning=conditioning))


T5 = T5Encoder(T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
MODELS = {
    "clip, remat": (Clip(CLIP, remat=True), (IMAGES, IDS)),
    "blip": (Blip(BLIP), (IMAGES, IDS)),
    "t5": (T5, (IDS, IDS > 9)),
    "denoiser": (denoiser("cross_attention"), DENOISED),
    "denoiser of tokens": (denoiser("tokens"), DENOISED[:-1]),
}


def drawn(model, given):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *given)
    return jax.tree.map(lambda x: RNG.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def step(model, given, scan):
    """Value and gradients, as a function of the variables."""

    def loss(variables):
        with layers.scanned(scan):
            made = model.apply(variables, *given)
        return sum(jnp.sum(jnp.sin(each)) for each in jax.tree.leaves(made))

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_has_the_same_values_and_gradients(name):
    model, given = MODELS[name]
    variables = drawn(model, given)
    plain, scanned = (step(model, given, scan) for scan in (False, True))
    (value, grads), (again, of_loop) = plain(variables), scanned(variables)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(of_loop), strict=True):
        assert np.abs(leaf - other).max() <= 1e-5 * largest
    # the same work, in fewer lines
    whole, loop = (str(each.trace(variables).jaxpr) for each in (plain, scanned))
    counts = [text.count("dot_general") for text in (whole, loop)]
    assert counts[1] < 0.9 * counts[0], counts
    asked = [flops.of_products(each.trace(variables).jaxpr) for each in (plain, scanned)]
    assert asked[1] == pytest.approx(asked[0], rel=0.02)


def test_parameters_are_made_as_without_it():
    def made(scan):
        with layers.scanned(scan):
            return str(jax.make_jaxpr(Clip(CLIP).init)(jax.random.key(0), IMAGES, IDS))

    assert made(True) == made(False)


def test_an_adapter_beside_the_layers_is_used():
    """It is found by the paths of the layers, which a loop does not have."""
    model, given = Clip(CLIP), (IMAGES, IDS)
    params = drawn(model, given)["params"]
    adapter = lora.init(jax.random.key(0), params, r".*/attention/query/kernel", 2)
    adapter = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), adapter)

    def encode(scan):
        rng = jax.random.key(1)
        with layers.scanned(scan), lora.attached(adapter, 1.0, dropout=0.5, rng=rng):
            return model.apply({"params": params}, *given)

    for plain, scanned in zip(encode(False), encode(True), strict=True):
        np.testing.assert_array_equal(plain, scanned)
