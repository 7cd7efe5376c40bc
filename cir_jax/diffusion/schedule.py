"""The noise schedule of a Gaussian diffusion, and the two identities training and sampling need.

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n,   n ~ N(0, I)

Cosine schedule of Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models"
(arXiv 2102.09672, equation 17), as CompoDiff uses it (Table A.1).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

OFFSET = 0.008  # s of the paper: keeps beta from vanishing near t = 0
LARGEST_BETA = 0.999  # ditto: no singularity near t = T


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Tables over t = 0 .. T - 1, float32[T]; abar = alphas_cumprod.

    The names are those of the buffers in CompoDiff checkpoints, so that one can be checked against
    the other. The posterior_* tables and p2_loss_weight serve nothing else here.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    """abar one step earlier; 1 at t = 0."""
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    """sqrt(1 / abar - 1)."""
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray
    p2_loss_weight: np.ndarray
    """All ones: the released model weighs every time alike."""

    @property
    def timesteps(self) -> int:
        return len(self.betas)


def cosine(timesteps: int) -> Schedule:
    """The cosine schedule; computed in float64, stored in float32."""
    grid = np.linspace(0, timesteps, timesteps + 1)
    curve = np.cos((grid / timesteps + OFFSET) / (1 + OFFSET) * np.pi / 2) ** 2
    betas = np.clip(1 - curve[1:] / curve[:-1], 0, LARGEST_BETA)
    # from the clipped betas, not from the curve: the last entries differ
    bar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], bar[:-1]])
    variance = betas * (1 - previous) / (1 - bar)
    tables = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - bar),
        "p2_loss_weight": np.ones(timesteps),
    }
    return Schedule(**{name: table.astype(np.float32) for name, table in tables.items()})


def _at(table: np.ndarray, time: jax.Array) -> jax.Array:
    """float32[..., 1]: the table at int32[...] times, ready to scale vectors."""
    return jnp.asarray(table)[time][..., None]


def q_sample(schedule: Schedule, clean: jax.Array, time: jax.Array, noise: jax.Array) -> jax.Array:
    """z_t of clean float32[..., dim] at int32[...] times, with noise of the same shape."""
    return (
        _at(schedule.sqrt_alphas_cumprod, time) * clean
        + _at(schedule.sqrt_one_minus_alphas_cumprod, time) * noise
    )


def predict_noise_from_start(
    schedule: Schedule, noisy: jax.Array, time: jax.Array, clean: jax.Array
) -> jax.Array:
    """The n that q_sample would have used to get `noisy` from `clean`."""
    return (_at(schedule.sqrt_recip_alphas_cumprod, time) * noisy - clean) / _at(
        schedule.sqrt_recipm1_alphas_cumprod, time
    )
