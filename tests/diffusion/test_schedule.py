"""The cosine schedule against the buffers of the released model."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.diffusion.schedule import cosine, predict_noise_from_start, q_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "compodiff_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def test_every_table_is_that_of_the_release(golden):
    tables = dataclasses.asdict(cosine(1000))
    prefix = "param/noise_scheduler."
    stored = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    assert sorted(stored) == sorted(tables)
    for name, expected in stored.items():
        assert tables[name].dtype == np.float32
        np.testing.assert_allclose(tables[name], expected, rtol=2e-7, atol=1e-12, err_msg=name)


def test_noising_and_its_inverse(golden):
    schedule, time = cosine(1000), golden["in/timestep"][:, None]
    image, noise = jnp.asarray(golden["in/image_cond"]), jnp.asarray(golden["in/initial_noise"])
    for name, got in (
        ("q_sample", q_sample(schedule, image, time, noise)),
        # the image is x_t here, and the noise x0
        ("predict_noise_from_start", predict_noise_from_start(schedule, image, time, noise)),
    ):
        expected = golden[f"out/{name}"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    noisy = q_sample(schedule, image, time, noise)
    back = predict_noise_from_start(schedule, noisy, time, image)
    np.testing.assert_allclose(back, noise, rtol=0, atol=1e-5)


def test_ends_are_finite_and_right():
    schedule = cosine(1000)
    assert all(np.isfinite(table).all() for table in dataclasses.asdict(schedule).values())
    assert schedule.alphas_cumprod[0] > 0.9999 and schedule.alphas_cumprod[-1] < 1e-8
    assert schedule.betas.max() == np.float32(0.999)
    assert schedule.timesteps == 1000
