"""The config that --config=ORG/NAME and --config=DIR of a shared composer stand for."""

from ml_collections import ConfigDict

from cir_jax import loading


def get_config(name: str) -> ConfigDict:
    """See `loading.read_shared`."""
    return loading.read_shared(name)
