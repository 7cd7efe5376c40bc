"""One way in and one way out for backbones, whatever their family and format."""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input.text import JoinedTokenizer, Tokenizer
from cir_jax.models.backbone import TOWERS, Backbone, Pair
from cir_jax.models.t5 import T5Encoder
from cir_jax.models.with_t5 import WithT5
from cir_jax.weights import artemis, blip, clip, encoders, families, files, siglip
from cir_jax.weights.one_by_one import Shardings

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
    shardings: Shardings | None = None,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters of a directory, file or hub id (see `files.find`).

    "IMAGES+TEXTS" takes the image tower of one CLIP and the text tower of another (`Pair`), or a T5
    in its place; "IMAGES+TEXTS+T5" both (`WithT5`).
    dtype: of the computation. params_dtype: of the parameters, None = as they are stored.
    image_size: for images of so many pixels, by interpolated position embeddings (a ViT's).
    context_length: for longer texts, by Long-CLIP's stretching (a CLIP's; 248 of 77).
    shardings: where the parameters are to lie, for arrays of all processes; all must call this, and
        of a safetensors file each reads what its devices hold. None = numpy, on the host.
    Raises WeightsError naming what is missing, unreadable, another model's, or does not fit.
    """
    names, asked = _split(name_or_path), _asked(image_size, context_length)
    if len(names) == 1:
        source, family = _find(name_or_path)
        return family.read(source, dtype, params_dtype, shardings=shardings, **asked[""])

    def read(name: str | Path, half: str) -> tuple[Backbone, dict[str, Any]]:
        found, about = _find_half(name, half), asked[half]
        return clip.read(found, dtype, params_dtype, half, shardings=shardings, **about)

    names, t5_source = _t5_of(names)
    halves = {half: read(name, half) for half, name in zip(TOWERS, names, strict=False)}
    params = {half: params for half, (_, params) in halves.items()}
    towers = [backbone for backbone, _ in halves.values()]
    if t5_source is None:
        return pair(*towers), params
    encoder, params["t5"] = encoders.load_t5(t5_source, dtype, params_dtype, shardings)
    return with_t5(towers, encoder.model, encoder.tokenizer, encoder.weights_id), params


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
    names, t5_source = _t5_of(names)
    towers = [
        clip.architecture(_find_half(name, half), dtype, half, **asked[half])
        for half, name in zip(TOWERS, names, strict=False)
    ]
    if t5_source is None:
        return pair(*towers)
    model, tokenizer = encoders.t5_architecture(t5_source, dtype)
    return with_t5(towers, model, tokenizer, f"{t5_source.name}@untrained")


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


def hub_ids(name_or_path: str | Path) -> tuple[str, ...]:
    """The hub ids that a backbone is named by; () where it lies here.

    Raises WeightsError for two models in one of which one lies here: no directory holds both.
    """
    names = [str(name) for name in _split(name_or_path)]
    here = [name for name in names if any(path.exists() for path in files.places(name))]
    if here and len(names) > 1:
        raise WeightsError(
            f"backbone {name_or_path}: two models in one cannot be written as one directory, and "
            f"{here[0]} lies here alone. Put it on the hub, and give its id."
        )
    return () if here else tuple(names)


def _split(name_or_path: str | Path) -> list[str | Path]:
    """The names of a pair, with T5 behind it or not; or the one name (a path may have a plus)."""
    names = str(name_or_path).split("+")
    if len(names) not in (2, 3) or any(path.exists() for path in files.places(name_or_path)):
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


def pair(images: Backbone, texts: Backbone) -> Pair:
    return Pair(
        model=images.model,
        tokenizer=texts.tokenizer,
        image_transform=images.image_transform,
        weights_id=f"{images.weights_id}+{texts.weights_id}",
        text_model=texts.model,
    )


def _t5_of(names: list[str | Path]) -> tuple[list[str | Path], files.Source | None]:
    """The names of CLIPs, and the T5 that stands last, if one does."""
    source = files.find(names[-1])
    if source.model_type == "t5":
        return names[:-1], source
    if len(names) == 3:
        raise WeightsError(
            f"backbone {'+'.join(map(str, names))}: {names[-1]} is of "
            f"{source.model_type or 'another model'}, expected T5 as the third: IMAGES+TEXTS+T5."
        )
    return names, None


def with_t5(
    towers: Sequence[Backbone], model: T5Encoder, tokenizer: Tokenizer, weights_id: str
) -> WithT5:
    """A T5 beside CLIPs. towers: with the images, and with the texts if CLIP's are conditions, too.

    tokenizer: T5's.
    """
    images, texts = towers[0], towers[1] if len(towers) > 1 else None
    tokenizer = copy.copy(tokenizer)
    # as many as CLIP's, section 5.1
    tokenizer.context_length = (texts or images).config.text.max_position_embeddings
    return WithT5(
        model=images.model,
        tokenizer=JoinedTokenizer(texts.tokenizer, tokenizer) if texts else tokenizer,
        image_transform=images.image_transform,
        weights_id="+".join([*(tower.weights_id for tower in towers), weights_id]),
        text_model=texts.model if texts else None,
        t5_model=model,
    )
