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


def settings(config: Any) -> list[Any]:
    """What changes the features of a backbone and is not a shape; part of its weights_id."""
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    return [getattr(tower, name, None) for tower in (config.text, config.vision) for name in names]


def check(directory: Path, tokenizer: Tokenizer, transform: ImageTransform, config: Any) -> None:
    """Raises WeightsError when tokenizer or preprocessing in `directory` are another model's."""
    if transform.crop != config.vision.image_size:
        raise WeightsError(
            f"{directory / PREPROCESSING}: images of {transform.crop} pixels, but the model takes "
            f"{config.vision.image_size}. Correct crop_size (or size)."
        )
    if tokenizer.vocab_size > config.text.vocab_size:
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
