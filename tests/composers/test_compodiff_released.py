"""CompoDiff against the released code: network, guidance, sampling."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers.compodiff import Denoiser
from cir_jax.diffusion.sampling import ddim, guided, stack_branches
from cir_jax.diffusion.schedule import cosine
from cir_jax.weights import compodiff as released

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
        self.config = released.config_of(self.tensors)
        self.params = released.to_params(self.tensors)
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
