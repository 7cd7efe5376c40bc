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
    revision: str | None = None,
) -> Any:
    """A trained method, or a training-free one, ready to search: a `Searcher`.

    what: the workdir of a training run; a method: "slerp", "image_text:vit_l14"; or what others
        share, "ORG/NAME" on the Hugging Face hub or such a directory (`cir push` makes them).
    config: a config, a method, or the path of an experiment, for training-free methods or to
        override the one in the workdir.
    backbone: a directory or hub id in place of the config's. weights: of a trained method, the
        checkpoint of its authors. dtype: of the computation in place of the config's
        `evaluation.dtype`, "float32" (the default, as in evaluation) or "bfloat16", or a type.
    revision: of ORG/NAME: a branch, a tag or a commit.

        search = cir_jax.load("runs/compodiff/shapes")
        search = cir_jax.load("slerp", backbone="openai/clip-vit-large-patch14")
        search = cir_jax.load("searle:vit_l14", weights="SEARLE_ViT-L14.pt")
        search = cir_jax.load("ORG/NAME", revision="v1")
        search.index("photos/")
        search.search("reference.jpg", "is red instead of blue", k=5)

    Raises CheckpointError, ConfigError or WeightsError that say what is missing.
    """
    from cir_jax import loading  # JAX is imported when it is needed

    return loading.load(
        what, config, backbone=backbone, weights=weights, dtype=dtype, revision=revision
    )
