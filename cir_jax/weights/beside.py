"""What comes with a model's tensors: settings that shapes do not show, tokenizer, preprocessing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.weights import files

PREPROCESSING = "preprocessor_config.json"


def settings(config: Any, tokenizer: Tokenizer | None) -> list[Any]:
    """What changes features and is neither a shape nor a value; part of the weights_id.

    The tokens as well: what was stored under the wrong start token must not be taken for right.
    """
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    values = [
        getattr(tower, name, None) for tower in (config.text, config.vision) for name in names
    ]
    return [*values, tokenizer.identity if tokenizer else None]


def directory_of(directory: Path, model: str, part: str) -> Path:
    """Where tokenizer or preprocessing lie: beside the weights, or in a sibling as in diffusers.

    model: "text_encoder", what its directories begin with; part: "tokenizer". `text_encoder_2` has
    its tokenizer in `tokenizer_2`.
    """
    sibling = directory.with_name(directory.name.replace(model, part, 1))
    names = ("tokenizer.json", "merges.txt", "spiece.model", "*processor_config.json")
    own = any(any(directory.glob(name)) for name in names)
    apart = directory.name.startswith(model) and sibling.is_dir() and not own
    return sibling if apart else directory


def check(
    directory: Path, tokenizer: Tokenizer | None, transform: ImageTransform, config: Any
) -> None:
    """Raises WeightsError when tokenizer or preprocessing in `directory` are another model's."""
    if transform.crop != config.vision.image_size:
        raise WeightsError(
            f"{directory / PREPROCESSING}: images of {transform.crop} pixels, but the model takes "
            f"{config.vision.image_size}. Correct crop_size (or size)."
        )
    if tokenizer and tokenizer.vocab_size > config.text.vocab_size:
        raise WeightsError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.text.vocab_size}. Use the tokenizer that comes with the weights."
        )


def write(
    path: Path,
    file: str,
    tensors: Mapping[str, np.ndarray],
    about: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    dtype: Any,
) -> None:
    """A directory with tensors, JSON files and tokenizer, whole or not at all."""
    tensors = {name: np.asarray(array, dtype, order="C") for name, array in tensors.items()}
    with files.new_directory(Path(path)) as scratch:
        save_file(tensors, scratch / file, metadata={"format": "pt"})
        for name, content in {**about, "tokenizer_config.json": tokenizer.to_dict()}.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save(scratch / "tokenizer.json")
