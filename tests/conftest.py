"""Eight CPU devices for every test, and JAX strict about broadcasting."""

import collections

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no worker idles while the other has one left."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tiny():
    """A small random CLIP: (backbone, params)."""
    from tests import tiny as factory

    return factory.backbone()
