"""One query at a time, as a user gives it, to what a gallery is ranked by; search stands on it."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from cir_jax import composers
from cir_jax.composers import conditions as conditions_of
from cir_jax.composers.base import Composer, Params
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import CirError
from cir_jax.input import images
from cir_jax.retrieval import features

Picture = str | Path | Image.Image | np.ndarray | jax.Array
"""A file, a PIL image, or an array [height, width, 3] of uint8 or of floats in [0, 1]."""


class Composed(NamedTuple):
    """features: float32[1, dim], of unit norm for most methods. own: whether they are ranked by
    what the method makes of the gallery, else by the backbone's unit features."""

    features: np.ndarray
    own: bool


class Composing:
    """A method over its parameters. Queries of one modality that the method does not answer in its
    own way live in the backbone's space. seed: of methods that draw noise."""

    def __init__(
        self, composer: Composer, params: Params, frozen: Params, mesh: Mesh, seed: int = 0
    ):
        self.composer, self.params, self.frozen = composer, params, frozen
        self.mesh, self.seed = mesh, seed
        self._text_only = composers.build("text_only", composer.backbone)
        self._image_only = composers.build("image_only", composer.backbone)
        self._variants: dict[tuple[Any, ...], Composer] = {}

    def compose(
        self,
        image: Picture | None,
        text: str | None,
        conditions: Conditions | None = None,
        max_megapixels: float | None = None,
        prompt: str = "",
    ) -> Composed:
        """The query of an image, a text, or both.

        max_megapixels: of the image, None = the limit of this process. prompt: what is tokenised
        for both, "" = the method's own of the text.
        Raises CirError without either, ConfigError for a condition that the method does not take,
        DataError for an image or a mask that cannot be read.
        """
        conditions = Conditions() if conditions is None else conditions
        text = (text or "").strip() or None
        if image is None and text is None:
            raise CirError("an empty query: give an image, a text, or both.")
        conditions.check(self.composer)
        conditions_of.check_query(conditions, image)
        pixels = None
        if image is not None:
            with images.limited(max_megapixels):
                pixels = self._pixels(image, text, conditions.mask)
        if self.composer.alone or (image is not None and text is not None):
            composer = self._varied(conditions, image is None)
            prompt = prompt or composer.prompt(text or "")
            return Composed(self._features(composer, pixels, prompt, conditions), True)
        alone = self._text_only if image is None else self._image_only
        return Composed(self._features(alone, pixels, alone.prompt(text or "")), False)

    @functools.cached_property
    def _of_queries(self) -> Params:
        alone = self.mesh.size == 1 and self.mesh.devices.item().platform == "cpu"
        return self.composer.for_one_query(self.params) if alone else self.params

    def _varied(self, conditions: Conditions, text_alone: bool) -> Composer:
        """The method with the settings of a query: one object of each, which is one program."""
        settings = conditions.settings(self.composer, text_alone)
        if not settings:
            return self.composer
        key = tuple(sorted(settings.items()))
        if key not in self._variants:
            self._variants[key] = self.composer.varied(**settings)
        return self._variants[key]

    def _pixels(self, image: Picture, text: str | None, mask: Any = None) -> Any:
        """uint8[height, width, 3], edited, if the method does that; with a mask, what `masked`
        gives."""
        what = str(image) if isinstance(image, str | Path) else "image"
        with images.reading(what):
            if isinstance(image, str | Path):
                image = images.read(Path(image))
            elif not isinstance(image, Image.Image):
                image = images.of_array(image)
            images.check_size(image.size, what)
            if mask is not None:
                return conditions_of.masked(self.composer, image, mask)
            if text and self.composer.edits_reference:
                image = self.composer.edit(image, text, str(self.seed))
            return self.composer.backbone.image_transform(image)

    def _features(
        self, composer: Composer, image: Any, prompt: str, conditions: Conditions | None = None
    ) -> np.ndarray:
        """float32[1, dim]; the same path as evaluation. image: None, or of `_pixels`."""
        backbone = composer.backbone
        length = None if composer.pools_text else backbone.context_length
        references: dict[str, Any] = {}
        if image is None:
            references["reference_features"] = np.zeros((1, backbone.dim), np.float32)
        else:
            references["reference_images"] = lambda row: image
        params, seed, fields = {}, self.seed, {}
        if conditions is not None:  # the method's own query
            params, fields = self._of_queries, conditions_of.fields(composer, conditions, 1)
            seed = self.seed if conditions.seed is None else conditions.seed
        return features.query_features(
            composer,
            params,
            self.frozen,
            backbone.tokenizer([prompt], length),
            np.zeros(1, np.int32),
            **references,
            has_reference=image is not None or not composer.alone,
            fields=fields,
            mesh=self.mesh,
            batch_size=1,
            seed=seed,
        )
