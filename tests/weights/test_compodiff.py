"""CompoDiff's released checkpoints: names, sizes, constants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers.compodiff import Denoiser
from cir_jax.errors import WeightsError
from cir_jax.models.denoiser import DenoiserConfig
from cir_jax.weights import compodiff
from cir_jax.weights.convert import flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "compodiff_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    """The tensors of the released code's model, small."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {k.removeprefix("param/"): file[k] for k in file if k.startswith("param/")}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_checkpoints_survive_a_round_trip(golden, prefix):
    config = compodiff.config_of(golden)
    tensors = {prefix + name: tensor for name, tensor in golden.items()}
    assert compodiff.config_of(tensors) == config
    params = compodiff.to_params(tensors)
    back = compodiff.to_tensors(params, config)
    assert sorted(back) == sorted(golden)
    for name, tensor in golden.items():
        np.testing.assert_allclose(back[name], tensor, rtol=2e-7, atol=1e-12, err_msg=name)


def test_a_shared_tensor_may_be_stored_once(golden):
    tensors = dict(golden)
    del tensors["net.transformer.layers.1.0.rotary_emb.freqs"]
    compodiff.to_params(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_scheduler.betas": np.linspace(0, 0.02, 1000, dtype=np.float32)}, "betas differs"),
        ({"net.transformer.layers.0.0.rotary_emb.freqs": np.ones(4, np.float32)}, "freqs differs"),
        ({"net.transformer.surprise": np.ones(4, np.float32)}, "net.transformer.surprise"),
        ({"net.transformer.norm.g": None}, "net.transformer.norm.g"),
        ({"net.to_text_embeds.0.weight": None}, "not a CompoDiff checkpoint"),
    ],
)
def test_wrong_checkpoints_are_refused(golden, change, message):
    tensors = {k: v for k, v in (golden | change).items() if v is not None}
    with pytest.raises(WeightsError, match=message):
        compodiff.to_params(tensors)


def test_the_released_size():
    """Parameters and names of CompoDiff-Aesthetic, from shapes alone."""
    config = DenoiserConfig()
    shapes = jax.eval_shape(
        lambda rng: Denoiser(config).init(
            rng,
            jnp.zeros((1, 1, 768)),
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros((1, 77, 1280)),
            jnp.zeros((1, 768)),
            jnp.zeros((1, 64, 64)),
        )["params"],
        jax.random.key(0),
    )
    flat = flatten(shapes)
    rotary = 16  # the one tensor that is stored and is no parameter here
    assert sum(leaf.size for leaf in flat.values()) + rotary == 140_043_792
    names = compodiff.names(config)
    assert sorted(path for path, _ in names.values()) == sorted(flat)
    released = {
        name: flat[path].shape[::-1] if layout == "linear" else flat[path].shape
        for name, (path, layout) in names.items()
    }
    block = "net.transformer.layers.11"
    for name, shape in {
        "net.to_text_embeds.0.weight": (768, 1280),
        "net.to_text_embeds.0.bias": (768,),
        "net.to_time_embeds.0.1.net.0.0.weight": (1536, 768),
        "net.to_time_embeds.0.1.net.1.0.bias": (1536,),
        "net.to_mask_embeds.1.net.0.0.weight": (1536, 4096),
        "net.to_mask_embeds.1.net.2.weight": (768, 1536),
        "net.transformer.rel_pos_bias.relative_attention_bias.weight": (32, 16),
        f"{block}.0.norm.g": (768,),
        f"{block}.0.null_kv": (2, 64),
        f"{block}.0.to_q.weight": (1024, 768),
        f"{block}.0.to_kv.weight": (128, 768),
        f"{block}.0.to_out.0.weight": (768, 1024),
        f"{block}.0.to_out.1.g": (768,),
        f"{block}.1.norm.g": (768,),
        f"{block}.1.null_kv": (2, 64),
        f"{block}.1.to_q.weight": (512, 768),
        f"{block}.1.to_kv.weight": (1024, 768),
        f"{block}.1.to_out.0.weight": (768, 512),
        f"{block}.1.to_out.1.g": (768,),
        f"{block}.2.0.g": (768,),
        f"{block}.2.1.weight": (6144, 768),
        f"{block}.2.5.weight": (768, 3072),
        "net.transformer.norm.g": (768,),
        "net.transformer.project_out.weight": (768, 768),
    }.items():
        assert released[name] == shape, name
    # 14 around the layers, 1 table, 15 per layer, 2 at the end
    assert len(released) == 14 + 1 + 12 * 15 + 2
    constants = compodiff.constants(config)
    assert sum(name.startswith("noise_scheduler.") for name in constants) == 13
