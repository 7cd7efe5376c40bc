"""One way in and one way out for backbones, whatever their family and format."""

from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.models.backbone import TOWERS, Backbone, Pair
from cir_jax.weights import artemis, blip, clip, families, files, siglip

FAMILIES = {"clip": clip, "blip": blip, "siglip": siglip, "artemis": artemis}
"""model_type of a config -> module with `read`, `architecture` and `write`."""

RELATIVES = {
    "siglip2": "SigLIP 2 of any aspect ratio (NaFlex), whose image tower is another network. Use "
    "one of fixed resolution, such as google/siglip2-base-patch16-224.",
    **dict.fromkeys(
        clip.TOWER_TYPES.values(),
        "one tower of a CLIP. Give the whole model, or name the directories of both towers, "
        "IMAGES+TEXTS.",
    ),
}
"""model_type of what is easily taken for one of them -> what it is, and what to do."""


def load(
    name_or_path: str | Path,
    dtype: Any = jnp.float32,
    *,
    params_dtype: Any = jnp.float32,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters of a directory, file or hub id (see `files.find`).

    "IMAGES+TEXTS" takes the image tower of one CLIP and the text tower of another (`Pair`).
    dtype: of the computation. params_dtype: of the parameters, None = as they are stored.
    image_size: for images of so many pixels, by interpolated position embeddings (a ViT's).
    context_length: for longer texts, by Long-CLIP's stretching (a CLIP's; 248 of 77).
    Raises WeightsError naming what is missing, unreadable, another model's, or does not fit.
    """
    names, asked = _split(name_or_path), _asked(image_size, context_length)
    if len(names) == 1:
        source, family = _find(name_or_path)
        return family.read(source, dtype, params_dtype, **asked[""])
    halves = {
        half: clip.read(_find_half(name, half), dtype, params_dtype, half, **asked[half])
        for half, name in zip(TOWERS, names, strict=True)
    }
    return (
        _pair(*(backbone for backbone, _ in halves.values())),
        {half: params for half, (_, params) in halves.items()},
    )


def load_architecture(
    name_or_path: str | Path,
    dtype: Any = jnp.float32,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
) -> Backbone:
    """Backbone without its weights, which need not be there unless the config is read off them."""
    names, asked = _split(name_or_path), _asked(image_size, context_length)
    if len(names) == 1:
        source, family = _find(name_or_path)
        return family.architecture(source, dtype, **asked[""])
    halves = zip(TOWERS, names, strict=True)
    return _pair(
        *(
            clip.architecture(_find_half(name, half), dtype, half, **asked[half])
            for half, name in halves
        )
    )


def _asked(image_size: int | None, context_length: int | None) -> dict[str, dict[str, int]]:
    """Half of a `Pair`, or "" for a whole model -> the sizes that are asked of it."""
    image = {"image_size": image_size} if image_size else {}
    text = {"context_length": context_length} if context_length else {}
    return {"": image | text, "image": image, "text": text}


def save(path: Path, backbone: Backbone, params: Any, dtype: Any = np.float32) -> None:
    """Writes a directory, whole or not at all: Hugging Face's format, which transformers loads;
    OpenCLIP's for ResNets, which Hugging Face's cannot say.

    dtype: of the stored tensors; float16 halves the files.
    """
    if isinstance(backbone, Pair):
        raise WeightsError(
            f"backbone {backbone.weights_id}: two models in one cannot be saved as one directory. "
            "Save each of them, and load IMAGES+TEXTS."
        )
    FAMILIES[backbone.family].write(path, backbone, params, dtype)


def _split(name_or_path: str | Path) -> list[str | Path]:
    """The two names of a pair, or the one name (which may be a path with a plus in it)."""
    names = str(name_or_path).split("+")
    if len(names) != 2 or any(path.exists() for path in files.places(name_or_path)):
        return [name_or_path]
    return list(names)


def _find(name_or_path: str | Path) -> tuple[files.Source, ModuleType]:
    source = files.find(name_or_path)
    family = source.model_type
    if not source.kind:
        tensors = source.tensors()
        family = families.family(tensors)
        if family not in FAMILIES:
            raise WeightsError(
                f"{source.file}: tensors of {families.describe(tensors)}. Expected an OpenAI CLIP "
                "or BLIP file, or the directory of a model with its config. "
                "`weights.load_encoder` loads encoders of images or texts alone."
            )
    if family in RELATIVES:
        raise WeightsError(
            f"{source.directory / source.kind}: model_type {family!r}, {RELATIVES[family]}"
        )
    if family not in FAMILIES:
        raise WeightsError(
            f"{source.directory / source.kind}: model_type {family!r}, expected "
            f"{' or '.join(map(repr, FAMILIES))}. Give the weights of a CLIP, BLIP or SigLIP; "
            "`weights.load_encoder` loads encoders of images or texts alone."
        )
    return source, FAMILIES[family]


def _find_half(name_or_path: str | Path, half: str) -> files.Source:
    """The source of a pair's half: a CLIP, or a directory that holds this tower alone."""
    source = files.find(name_or_path)
    if source.model_type == clip.TOWER_TYPES[half]:
        return source
    if source.model_type in clip.TOWER_TYPES.values():
        raise WeightsError(
            f"{source.directory / source.kind}: model_type {source.model_type!r}, expected the "
            f"{half} tower of a CLIP here: IMAGES+TEXTS."
        )
    source, family = _find(name_or_path)
    if family is not clip:
        raise WeightsError(
            f"{source.file or source.directory / source.kind}: weights of "
            f"{source.model_type or 'BLIP'}, expected CLIP. Only the towers of two CLIPs can be "
            "combined (IMAGES+TEXTS)."
        )
    return source


def _pair(images: Backbone, texts: Backbone) -> Pair:
    return Pair(
        model=images.model,
        tokenizer=texts.tokenizer,
        image_transform=images.image_transform,
        weights_id=f"{images.weights_id}+{texts.weights_id}",
        text_model=texts.model,
    )
