"""DDIM and guidance on functions whose result is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.diffusion.sampling import ddim, ddim_times, guided, stack_branches
from cir_jax.diffusion.schedule import cosine


def test_times_are_those_of_the_release():
    # 10 "timesteps" there, or 10 asked for in its demo
    assert ddim_times(1000, 9).tolist() == [899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    assert ddim_times(1000, 10).tolist() == [909, 818, 727, 636, 545, 454, 363, 272, 181, 90, -1]
    assert ddim_times(1000, 1).tolist() == [499, -1]
    # a point on an integer that float32 rounds below it, as torch.linspace does
    assert ddim_times(1000, 98)[-2:].tolist() == [9, -1]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="expected 1 to 1000"):
            ddim_times(1000, steps)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_times_fall_and_end(steps):
    times = ddim_times(1000, steps)
    assert len(times) == steps + 1 and times[-1] == -1
    assert (np.diff(times) < 0).all() and 0 <= times[-2] and times[0] < 1000


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_a_perfect_denoiser_gives_the_clean_sample(steps):
    clean = jnp.asarray([[1.0, -2.0, 0.5]])
    rng = jax.random.key(0)
    result, _ = jax.jit(
        lambda: ddim(
            lambda x, time: clean,
            cosine(1000),
            steps,
            lambda draw: jax.random.normal(jax.random.fold_in(rng, draw), (1, 3)),
        )
    )()
    np.testing.assert_array_equal(result, clean)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_path_keeps_the_variance_of_its_time(eta):
    # clean = 0: every x_t is noise, of the (shifted) time's variance
    schedule, rng = cosine(1000), jax.random.key(1)
    _, (path, _) = ddim(
        lambda x, time: jnp.zeros_like(x),
        schedule,
        10,
        lambda draw: jax.random.normal(jax.random.fold_in(rng, draw), (4000, 2)),
        eta,
    )
    variance = 1 - schedule.alphas_cumprod_prev[ddim_times(1000, 10)[:-1]]
    # from step to step the unshifted abar is divided by: a few per cent at small times
    np.testing.assert_allclose(np.var(path, axis=(1, 2))[1:], variance[1:], rtol=0.1)


def test_a_stored_table_of_noise_is_used_in_order():
    table = jnp.arange(4.0).reshape(4, 1, 1)
    _, (path, _) = ddim(
        lambda x, time: jnp.zeros_like(x), cosine(1000), 3, lambda draw: table[draw], eta=1.0
    )
    assert path[0, 0, 0] == 0.0 and path[1, 0, 0] > 0


def test_guidance_extrapolates_from_three_passes_in_one_batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 2, 4)), jnp.float32)
    full, null_text = (jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
    null = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)
    conditions = stack_branches(full, null_text, null)
    weights = jnp.asarray(rng.uniform(0, 5, (5, 2)), jnp.float32)
    calls = []

    def denoise(x, time):
        calls.append(x.shape)
        return jnp.sin(x + conditions[:, None])

    got = guided(denoise, weights)(x, jnp.zeros((), jnp.int32))
    a, b, c = (np.sin(x + y[:, None]) for y in (full, null_text, jnp.tile(null, (5, 1))))
    image, text = weights[:, 0, None, None], weights[:, 1, None, None]
    np.testing.assert_allclose(got, c + image * (b - c) + text * (a - b), rtol=1e-5, atol=1e-5)
    assert calls == [(15, 2, 4)]
