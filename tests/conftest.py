"""Eight CPU devices for every test, and JAX strict about broadcasting."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny():
    """A small random CLIP: (backbone, params)."""
    from tests import tiny as factory

    return factory.backbone()
