"""What a query may say beside its image and its text, for the methods that listen to it."""

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.composers import COMPOSERS, composer_class
from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, DataError
from cir_jax.input import masks

STATIC = ("steps", "samples_per_query", "noised_reference")
"""Those that are another program: settings of the composer, not numbers in the query."""


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """None = as the method is set.

    guidance: weights of image and text. negative_text: what the results should not show.
    mask: the region of the reference to edit, see `masks.read`. steps: of denoising.
    samples_per_query: that are averaged. seed: of the noise. source_mixing: share of the reference
    in the result. noised_reference: share of the diffusion that the reference is spared, from which
    it starts. alpha: share of the text in an interpolation.
    Raises ConfigError for values that cannot be meant.
    """

    guidance: tuple[float, float] | None = None
    negative_text: str | None = None
    mask: Any = None
    steps: int | None = None
    samples_per_query: int | None = None
    seed: int | None = None
    source_mixing: float | None = None
    noised_reference: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if (given := self.guidance) is not None:
            if len(given) != 2 or not all(map(math.isfinite, given)):
                raise ConfigError(f"guidance={given}: expected two finite weights, (image, text)")
        for name in ("source_mixing", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}: expected a fraction from 0 to 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: expected 0 to {2**32 - 1}")

    @property
    def given(self) -> dict[str, Any]:
        """What is not None."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def check(self, composer: Composer) -> None:
        """Raises ConfigError naming a condition that the method does not have, and who has it."""
        for name in self.given:
            if name not in composer.conditions:
                able = [key for key in COMPOSERS if name in composer_class(key).conditions]
                raise ConfigError(
                    f"{type(composer).__name__} takes no {name}. Methods that do: "
                    f"{', '.join(able) or 'none'}."
                )

    def settings(self, composer: Composer, text_alone: bool = False) -> dict[str, Any]:
        """Those for `composer.varied`, {} = none. text_alone: of a query without an image."""
        found = {name: value for name, value in self.given.items() if name in STATIC}
        if text_alone and getattr(composer, "noised_reference", 0):
            found["noised_reference"] = 0.0  # without a reference, nothing can begin there
        return found

    def vary(self, composer: Composer, text_alone: bool = False) -> Composer:
        """The composer with these `settings`."""
        settings = self.settings(composer, text_alone)
        return composer.varied(**settings) if settings else composer

    @property
    def identity(self) -> dict[str, Any]:
        """What is given, as JSON has it; of a mask, a hash of its content. Raises DataError for a
        mask that cannot be read."""
        said = self.given
        if self.mask is not None:
            said["mask"] = masks.content_id(self.mask)
        return said


def fields(composer: Composer, conditions: Conditions, rows: int) -> dict[str, np.ndarray]:
    """What `compose` reads of the conditions, the same for so many queries; the mask is not among
    it, since it is about an image."""
    found: dict[str, np.ndarray] = {}
    if conditions.guidance is not None:
        found["guidance"] = np.float32(conditions.guidance)
    for name in ("source_mixing", "alpha"):
        if (value := getattr(conditions, name)) is not None:
            found[name] = np.float32(value)
    if conditions.negative_text is not None:
        tokenizer = composer.backbone.tokenizer
        text = composer.prompt(conditions.negative_text)
        length = None if composer.pools_text else tokenizer.context_length
        found["negative_token_ids"] = tokenizer([text], length)[0]
    return {name: np.repeat(value[None], rows, axis=0) for name, value in found.items()}


def masked(composer: Composer, image: Image.Image, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The reference without the region, uint8 or normalised float32 [height, width, 3], and the
    mask that `compose` reads, float32[64, 64].

    mask: see `masks.read`, whose DataError it raises.
    """
    transform = composer.backbone.image_transform
    where = masks.region(masks.read(mask, image.size), image.size, transform)
    pixels = masks.fill(transform(image), where, transform, composer.mask_fill)
    return pixels, masks.condition(where)


def check_query(conditions: Conditions, image: Any) -> None:
    """Raises DataError for conditions about an image where there is none."""
    for name in ("mask", "noised_reference"):
        if getattr(conditions, name) is not None and image is None:
            raise DataError(f"{name} is about the reference image: give one.")
