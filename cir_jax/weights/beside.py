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
from cir_jax.storage.atomic import new_directory
from cir_jax.weights import files

PREPROCESSING = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""transformers 5: all of a processor in one file, the images' part under `image_processor`."""


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


def preprocessing(directory: Path) -> tuple[str, dict[str, Any]]:
    """The description of the image preprocessing, and what messages call it.

    As in transformers, the newer file is the one that counts where it holds such a description.
    Raises WeightsError when there is neither.
    """
    newer = directory / PROCESSOR
    stored = files.read_json(newer).get("image_processor") if newer.is_file() else None
    if stored is None:
        file = directory / PREPROCESSING
        return str(file), files.read_json(file)
    if not isinstance(stored, dict):
        raise WeightsError(f"{newer}: image_processor is no object. Download or copy it again.")
    return f"{newer}, image_processor", stored


def image_transform(directory: Path, family: str) -> ImageTransform:
    """The preprocessing that comes with weights in Hugging Face format.

    family: "clip", "blip" or "siglip", for files that do not name their image processor.
    Raises WeightsError naming file and field for what is missing or cannot be honoured.
    """
    what, stored = preprocessing(directory)
    return ImageTransform.from_dict(stored, what, family)


def check(
    directory: Path, tokenizer: Tokenizer | None, transform: ImageTransform, config: Any
) -> None:
    """Raises WeightsError when tokenizer or preprocessing in `directory` are another model's."""
    if transform.crop != config.vision.image_size:
        what, _ = preprocessing(directory_of(directory, "image_encoder", "feature_extractor"))
        raise WeightsError(
            f"{what}: images of {transform.crop} pixels, but the model "
            f"takes {config.vision.image_size}. Correct crop_size (or size)."
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
    newer = Path(path) / PROCESSOR
    if newer.is_file():  # it would win over the file that we write
        about = {**about, PROCESSOR: files.read_json(newer)}
        about[PROCESSOR]["image_processor"] = about[PREPROCESSING]
    with new_directory(Path(path)) as scratch:
        save_file(tensors, scratch / file, metadata={"format": "pt"})
        for name, content in {**about, "tokenizer_config.json": tokenizer.to_dict()}.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save(scratch / "tokenizer.json")
