"""DDIM sampling and classifier-free guidance, for networks that predict the clean sample x0.

DDIM: arXiv 2010.02502, equation 12; here in the form CompoDiff was released with: eta = 1 (as much
noise as DDPM), and abar shifted by one step in the update but not in the noise estimate.
Guidance with two weights: CompoDiff, equation 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""(x float32[rows, ..., dim], time int32[]) -> predicted x0, of x's shape."""


def ddim_times(timesteps: int, steps: int) -> np.ndarray:
    """int32[steps + 1]: times of the `steps` network evaluations, falling, then -1 (the end).

    The released sampler calls N = steps + 1 its "timesteps" and evaluates the network N - 1 times;
    its demo adds 1 to what the user asks for, so `steps` is the demo's and the paper's number.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} sampling steps; expected 1 to {timesteps} (timesteps)")
    # N + 1 equidistant points from -1 to T without the last, truncated to integers. As
    # torch.linspace: float32, from the nearer end, rounded once. Truncation shows that rounding
    # where a point falls on an integer (28 of the 1000 step counts, none of them below 98)
    count = steps + 1
    index = np.arange(count)
    stride = np.float64(np.float32(timesteps + 1) / np.float32(count))
    points = np.where(
        index < (count + 1) // 2, index * stride - 1, timesteps - (count - index) * stride
    )
    return points.astype(np.float32)[::-1].astype(np.int32)


class _Updates(NamedTuple):
    """One row per network evaluation: x <- clean * x0 + noise * n + direction * eps."""

    time: np.ndarray
    recip: np.ndarray
    recipm1: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    direction: np.ndarray


def _updates(schedule: Schedule, steps: int, eta: float, below: int) -> _Updates:
    times = ddim_times(below, steps)
    time, following = times[:-1], times[1:]
    shifted = schedule.alphas_cumprod_prev.astype(np.float64)
    now, then = shifted[time], shifted[np.maximum(following, 0)]
    # at t = 0 both abar are 1 and the quotient is 0 / 0; that row ends the sampling anyway
    spread = np.where(now < 1, (1 - now / then) * (1 - then) / np.where(now < 1, 1 - now, 1), 0)
    sigma = eta * np.sqrt(np.maximum(spread, 0))
    direction = np.sqrt(np.maximum(1 - then - sigma**2, 0))
    last = following < 0  # the result is x0 itself
    rows = {
        "recip": schedule.sqrt_recip_alphas_cumprod[time],
        "recipm1": schedule.sqrt_recipm1_alphas_cumprod[time],
        "clean": np.where(last, 1, np.sqrt(then)),
        "noise": np.where(following > 0, sigma, 0),
        "direction": np.where(last, 0, direction),
    }
    return _Updates(time=time, **{name: row.astype(np.float32) for name, row in rows.items()})


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    steps: int,
    noise: Callable[[jax.Array], jax.Array],
    eta: float = 1.0,
    *,
    start: jax.Array | None = None,
    below: int | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Samples x0 in `steps` evaluations of the network, as one scan.

    noise: draw number (int32[], 0 = the start, k = after evaluation k) -> float32[rows, ..., dim],
    N(0, I). Draws are made where they are used, so no table of all of them is held; a stored table
    is `lambda draw: table[draw]`.
    start: float32[rows, ..., dim] that is noised as at the first time, None = noise alone.
    below: the times are those of a diffusion of so many steps, None = the schedule's own.

    Returns the sample and the path (x_t, predicted x0), each float32[steps, rows, ..., dim]; a path
    that is not used is never computed under jit.
    """
    updates = _updates(schedule, steps, eta, below or schedule.timesteps)
    table = _Updates(*(jnp.asarray(row) for row in updates))

    def step(x: jax.Array, inputs: tuple[jax.Array, _Updates]):
        draw, row = inputs
        clean = denoise(x, row.time)
        eps = (row.recip * x - clean) / row.recipm1
        following = row.clean * clean + row.noise * noise(draw) + row.direction * eps
        return following, (x, clean)

    draws = jnp.arange(1, steps + 1)
    x = noise(jnp.zeros((), draws.dtype))
    if start is not None:
        first = int(updates.time[0])
        kept, added = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        x = kept[first] * start + added[first] * x
    return jax.lax.scan(step, x, (draws, table))


def stack_branches(*branches: jax.Array) -> jax.Array:
    """b arrays [rows or 1, ...] -> [rows * b, ...], the branches of one row side by side.

    Side by side, because rows lie on different devices: one branch after the other would move
    two thirds of the batch between them.
    """
    rows = max(branch.shape[0] for branch in branches)
    stacked = jnp.stack(
        [jnp.broadcast_to(branch, (rows, *branch.shape[1:])) for branch in branches], axis=1
    )
    return stacked.reshape(-1, *stacked.shape[2:])


def guided(denoise: Denoise, weights: jax.Array) -> Denoise:
    """Classifier-free guidance by image and text, all branches one batch (CompoDiff, equation 4).

        x0 = C + w_image (B - C) + w_text (A - B)

    denoise: takes 3 * rows, per row A (image, text), B (image, null text), C (null, null) from
    `stack_branches`; its conditions are closed over. weights: float32[rows or 1, 2], (image, text).
    """

    def denoise_guided(x: jax.Array, time: jax.Array) -> jax.Array:
        predicted = denoise(stack_branches(x, x, x), time)
        predicted = predicted.reshape(x.shape[0], 3, *x.shape[1:])
        full, null_text, null = predicted[:, 0], predicted[:, 1], predicted[:, 2]
        w = weights.reshape(*weights.shape, *[1] * (x.ndim - 1))
        return null + w[:, 0] * (null_text - null) + w[:, 1] * (full - null_text)

    return denoise_guided
