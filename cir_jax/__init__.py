"""Zero-shot composed image retrieval in JAX and Flax: an image and a text rank a gallery."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(
    what: str | Path | None = None,
    config: Any = None,
    *,
    backbone: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: Any = None,
) -> Any:
    """A trained method, or a training-free one, ready to search: a `Searcher`.

    what: the workdir of a training run, or a method: "slerp", "image_text:vit_l14".
    config: a config, a method, or the path of an experiment, for training-free methods or to
        override the one in the workdir.
    backbone: a directory or hub id in place of the config's. weights: of a trained method, the
        checkpoint of its authors. dtype: of the computation in place of the config's
        `evaluation.dtype`, "float32" (the default, as in evaluation) or "bfloat16", or a type.

        search = cir_jax.load("runs/compodiff/shapes")
        search = cir_jax.load("slerp", backbone="openai/clip-vit-large-patch14")
        search = cir_jax.load("searle:vit_l14", weights="SEARLE_ViT-L14.pt")
        search.index("photos/")
        search.search("reference.jpg", "is red instead of blue", k=5)

    Raises CheckpointError, ConfigError or WeightsError that say what is missing.
    """
    from cir_jax import loading  # JAX is imported when it is needed

    return loading.load(what, config, backbone=backbone, weights=weights, dtype=dtype)
