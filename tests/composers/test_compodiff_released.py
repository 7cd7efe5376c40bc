"""CompoDiff against the released code: network, guidance, sampling, checkpoints."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import compodiff
from cir_jax.composers.compodiff import Denoiser
from cir_jax.diffusion.sampling import ddim, guided, stack_branches
from cir_jax.diffusion.schedule import cosine
from cir_jax.errors import WeightsError
from cir_jax.models import denoiser as layers
from cir_jax.weights.convert import flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "compodiff_tiny.npz"


class Golden:
    """The fixture: tensors, inputs, outputs, our denoiser with its parameters."""

    def __init__(self):
        with np.load(GOLDEN, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.tensors = {
            k.removeprefix("param/"): v for k, v in self.arrays.items() if k.startswith("param/")
        }
        self.config = compodiff.released_config(self.tensors)
        self.params = compodiff.from_released(self.tensors)
        self.denoiser = Denoiser(self.config)

    def __getattr__(self, name):
        return jnp.asarray(self.arrays[f"in/{name}"])

    def apply(self, *args, method=None):
        return self.denoiser.apply({"params": self.params}, *args, method=method)

    def check(self, name, got):
        expected = self.arrays[f"out/{name}"]
        rule = self.meta["tolerance"]
        sampled = name.startswith("sample")
        tolerance = float(rule["exceptions"]["sample*"] if sampled else rule["tol"])
        error = np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()
        print(f"{name}: relative error {error:.2e}")
        assert error <= tolerance, f"{name}: relative error {error:.2e}"

    def conditions(self, negative):
        """Three passes of guidance; `negative` in the place of the null text."""
        image, mask = self.image_cond[:, 0], self.input_mask
        return [
            (self.text_cond, image, mask),
            (negative, image, mask),
            (negative, jnp.zeros_like(image), mask),
        ]


@pytest.fixture(scope="module")
def golden():
    return Golden()


@pytest.fixture(scope="module")
def forward(golden):
    """(x, time, text, image, mask) -> prediction of the fixture's denoiser, compiled once."""
    return jax.jit(golden.apply)


def test_forward_equals_the_released_code(golden, forward):
    time = golden.timestep[:, None]
    conditions = golden.text_cond, golden.image_cond[:, 0], golden.input_mask
    golden.check("net_forward", forward(golden.noisy_image_embed, time, *conditions))
    golden.check("time_embed", golden.apply(time, method="embed_time"))
    golden.check("rel_pos_bias", golden.apply(method="position_bias"))
    mask = golden.denoiser.bind({"params": golden.params}).mask_embedding(
        golden.input_mask.reshape(2, 1, -1)
    )
    golden.check("mask_embed", mask)


def test_guidance_equals_the_released_code_and_three_passes(golden, forward):
    x, time = golden.noisy_image_embed, golden.timestep
    passes = golden.conditions(golden.negative_text_cond)
    weights = jnp.asarray([golden.meta["config"]["cond_scale"]])

    @jax.jit
    def run():
        stacked = jax.tree.map(
            stack_branches, *(golden.apply(*c, method="condition") for c in passes)
        )

        def denoise(x, time):
            return golden.apply(x, jnp.repeat(time, 3)[:, None], stacked, method="denoise")

        return guided(denoise, weights)(x, time)

    got = run()
    golden.check("net_forward_cond_scale", got)
    a, b, c = (forward(x, time[:, None], *condition) for condition in passes)
    w_image, w_text = golden.meta["config"]["cond_scale"]
    by_hand = c + w_image * (b - c) + w_text * (a - b)
    np.testing.assert_allclose(got, by_hand, rtol=0, atol=5e-5)


def test_sampling_equals_the_released_code(golden):
    passes = golden.conditions(golden.negative_text_cond)
    noise = jnp.concatenate([golden.initial_noise[None], golden.step_noise])
    schedule = cosine(golden.config.timesteps)
    weights = jnp.asarray([golden.meta["config"]["cond_scale"]])

    @jax.jit
    def sample():
        stacked = jax.tree.map(
            stack_branches, *(golden.apply(*c, method="condition") for c in passes)
        )

        def denoise(x, time):
            return golden.apply(x, time[None, None], stacked, method="denoise")

        steps = golden.meta["config"]["sample_steps"] - 1
        return ddim(guided(denoise, weights), schedule, steps, lambda draw: noise[draw])

    result, (path, predicted) = sample()
    golden.check("sample_x_t", path)
    golden.check("sample_pred_x_start", predicted)
    golden.check("sample", result[:, 0])


def test_samples_and_shared_rows_are_independent(golden, forward):
    """Samples of a row share its keys and values, and conditions may have one row for all."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    text, image, mask = golden.text_cond[:1], golden.image_cond[:, 0], golden.input_mask[:1]
    time = jnp.asarray([[3, 500, 999]])
    together = forward(x, time, text, image, mask)
    for i in range(3):
        times = jnp.repeat(time[:, i : i + 1], 2, axis=0)
        conditions = jnp.repeat(text, 2, axis=0), image, jnp.repeat(mask, 2, axis=0)
        alone = forward(x[:, i : i + 1], times, *conditions)
        np.testing.assert_allclose(together[:, i], alone[:, 0], rtol=0, atol=2e-5)


# --- released checkpoints


@pytest.mark.parametrize("prefix", ["", "model."])
def test_checkpoints_survive_a_round_trip(golden, prefix):
    tensors = {prefix + name: tensor for name, tensor in golden.tensors.items()}
    assert compodiff.released_config(tensors) == golden.config
    params = compodiff.from_released(tensors)
    back = compodiff.to_released(params, golden.config)
    assert sorted(back) == sorted(golden.tensors)
    for name, tensor in golden.tensors.items():
        np.testing.assert_allclose(back[name], tensor, rtol=2e-7, atol=1e-12, err_msg=name)


def test_a_shared_tensor_may_be_stored_once(golden):
    tensors = dict(golden.tensors)
    del tensors["net.transformer.layers.1.0.rotary_emb.freqs"]
    compodiff.from_released(tensors)


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
    tensors = {k: v for k, v in (golden.tensors | change).items() if v is not None}
    with pytest.raises(WeightsError, match=message):
        compodiff.from_released(tensors)


def test_the_released_size():
    """Parameters and names of CompoDiff-Aesthetic, from shapes alone."""
    config = layers.DenoiserConfig()
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
    names = layers.released_names(config)
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
    constants = compodiff.released_constants(config)
    assert sum(name.startswith("noise_scheduler.") for name in constants) == 13
