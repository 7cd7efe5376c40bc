"""Zero-shot composed image retrieval in JAX and Flax: an image and a text rank a gallery."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(workdir: str | Path | None = None, config: Any = None) -> Any:
    """A trained method, or a training-free one, ready to search: a `Searcher`.

    workdir: of a training run. config: a config, or the path of an experiment
    ("experiments/slerp.py"), for training-free methods or to override the one in the workdir.

        search = cir_jax.load("runs/compodiff/shapes")
        search.index("photos/")
        search.search("reference.jpg", "is red instead of blue", k=5)

    Raises CheckpointError, ConfigError or WeightsError that say what is missing.
    """
    from cir_jax import loading  # JAX is imported when it is needed

    return loading.load(workdir, config)
