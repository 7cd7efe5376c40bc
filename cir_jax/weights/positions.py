"""Position embeddings for other sizes than those that were trained: larger images, longer texts."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.models.backbone import Backbone
from cir_jax.models.blip import interpolate_positions
from cir_jax.models.resnet import ResNetConfig

KEPT, STRETCH = 20, 4
"""Long-CLIP (arXiv 2403.15378) keeps the first positions, which are trained best, and puts the
others this many times as far apart."""


def of_long_clip(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The one table that Long-CLIP's two amount to, exactly. All float[length, width]."""
    if np.shape(first) != np.shape(rest):
        raise WeightsError(
            f"positional_embedding {np.shape(first)} and positional_embedding_res "
            f"{np.shape(rest)}: expected two tables of one shape, as Long-CLIP's."
        )
    return np.concatenate([first[:KEPT], rest[KEPT:]])


def stretched_length(length: int) -> int:
    """What `stretched` makes of that many positions: 248 of 77."""
    return KEPT + STRETCH * (length - KEPT)


def stretched(positions: np.ndarray) -> np.ndarray:
    """Long-CLIP's start: float[length, width] -> [stretched_length(length), width].

    Between two positions it is linear; behind the last it goes on as before it.
    """
    old = np.asarray(positions, np.float32)
    known = np.concatenate([old[KEPT:], 2 * old[-1:] - old[-2:-1]])
    parts = np.arange(STRETCH, dtype=np.float32)[None, :, None] / STRETCH
    between = known[:-1, None] * (1 - parts) + known[1:, None] * parts
    new = np.concatenate([old[:KEPT], between.reshape(-1, old.shape[1])])
    return new.astype(np.asarray(positions).dtype)


def on_grid(
    positions: np.ndarray, side: int, antialias: bool = False, first: bool = True
) -> np.ndarray:
    """float[1 + cells, width] of square images -> [1 + side * side, width]; the first stays as is.

    Bicubic, as transformers' `interpolate_pos_encoding`; antialias: as open_clip's
    `resize_pos_embed`, whose kernel is another one, too. first: False = there is no class token.
    """
    if not first:
        return on_grid(np.concatenate([positions[:1], positions]), side, antialias)[1:]
    table = jnp.asarray(positions, jnp.float32)
    if not antialias:
        made = interpolate_positions(table[None], (side, side))[0]
    else:
        old = round((len(table) - 1) ** 0.5)
        cells = table[1:].reshape(old, old, -1)
        shape = (side, side, cells.shape[2])
        cells = jax.image.resize(cells, shape, "cubic", antialias=True, precision="highest")
        made = jnp.concatenate([table[:1], cells.reshape(side * side, -1)])
    return np.asarray(made, np.asarray(positions).dtype)


def check(params: Mapping[str, Any], config: Any, what: str) -> None:
    """Raises WeightsError where a ViT's positions are those of another image or text size."""
    if "text" in params:
        _check_count(
            f"{what}: positions of {{}} text tokens, and a config of {{}}",
            len(params["text"]["position_embedding"]),
            config.text.max_position_embeddings,
            "Correct the config; to stretch texts as Long-CLIP does, load with context_length=N.",
        )
    vision = config.vision
    if "vision" in params and not isinstance(vision, ResNetConfig):
        _check_count(
            f"{what}: positions of {{}} image tokens, and a config of {{}} (image_size="
            f"{vision.image_size}, patch_size={vision.patch_size})",
            len(params["vision"]["position_embedding"]),
            (vision.image_size // vision.patch_size) ** 2 + 1,
            "Correct the config; to interpolate, load with image_size=N (--config.image_size=N).",
        )


def _check_count(problem: str, found: int, expected: int, remedy: str) -> None:
    if found != expected:
        raise WeightsError(f"{problem.format(found, expected)}. {remedy}")


def resized(
    backbone: Backbone,
    params: Mapping[str, Any],
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    antialias: bool = False,
) -> tuple[Backbone, dict[str, Any]]:
    """A CLIP for images of image_size pixels and texts of context_length tokens; None = its own.

    params: of the backbone, or those of them that are there. antialias: see `on_grid`.
    Raises WeightsError for a size that the model cannot have.
    """
    params, config = dict(params), backbone.config
    if image_size and image_size != config.vision.image_size:
        backbone = for_images(backbone, image_size)
        side = image_size // config.vision.patch_size
        _replace(params, "vision", lambda table: on_grid(table, side, antialias))
    if context_length and context_length != config.text.max_position_embeddings:
        backbone = _for_texts(backbone, context_length)
        _replace(params, "text", stretched)
    return backbone, params


def _replace(params: dict[str, Any], tower: str, change: Any) -> None:
    if tower in params:
        table = np.asarray(params[tower]["position_embedding"])
        params[tower] = {**params[tower], "position_embedding": change(table)}


def for_images(backbone: Backbone, image_size: int) -> Backbone:
    """Model and image transform for another image size. Raises WeightsError where it has none."""
    vision = backbone.config.vision
    if isinstance(vision, ResNetConfig):
        raise WeightsError(
            f"image_size={image_size}: a ResNet takes images of {vision.image_size} pixels only. "
            "Position embeddings are interpolated for image towers that are a ViT."
        )
    if image_size < 1 or image_size % vision.patch_size:
        below = max(image_size // vision.patch_size, 1) * vision.patch_size
        raise WeightsError(
            f"image_size={image_size}: no multiple of the patches' {vision.patch_size}. Give "
            f"{below} or {below + vision.patch_size}."
        )
    own = backbone.image_transform
    transform = dataclasses.replace(
        own, resize=own.resize * image_size // own.crop, crop=image_size
    )
    made = _with_config(backbone, vision=dataclasses.replace(vision, image_size=image_size))
    return dataclasses.replace(made, image_transform=transform)


def _for_texts(backbone: Backbone, context_length: int) -> Backbone:
    text = backbone.config.text
    own = text.max_position_embeddings
    if own <= KEPT + 1 or context_length != stretched_length(own):
        raise WeightsError(
            f"context_length={context_length}: texts of {own} tokens are stretched to "
            f"{stretched_length(own)}, as Long-CLIP does, and to nothing else."
        )
    made = _with_config(
        backbone, text=dataclasses.replace(text, max_position_embeddings=context_length)
    )
    tokenizer = copy.copy(backbone.tokenizer)
    tokenizer.context_length = context_length
    return dataclasses.replace(made, tokenizer=tokenizer)


def _with_config(backbone: Backbone, **changes: Any) -> Backbone:
    config = dataclasses.replace(backbone.config, **changes)
    return dataclasses.replace(backbone, model=backbone.model.clone(config=config))
