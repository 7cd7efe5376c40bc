"""What a search asks for: a query of images, texts and negatives, by method or by arithmetic."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cir_jax.composers import COMPOSERS, composer_class
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import ConfigError
from cir_jax.evaluation import protocols
from cir_jax.retrieval import features
from cir_jax.retrieval.search import Searcher

NEGATIVE = 0.5
"""What a negative text is subtracted with, where that is vector arithmetic. In the embedded world
the ten best photos of "a star" are stars, two of them red; without half of "a red star" they are
stars, none is red; without the whole of it one is a star (tests/data/test_shapes_photos.py)."""

_SHARED = dataclasses.replace(protocols.CIRCO, text="shared_concept")
"""For its sentence alone."""


class Asked(NamedTuple):
    """query: float32[1, dim]. own: whether it is ranked by the method's own gallery. approximate:
    what of it is vector arithmetic, "" = nothing."""

    query: np.ndarray
    own: bool
    approximate: str


def references(
    image: Any, several: Sequence[Any], weights: Sequence[float] | None
) -> list[tuple[Any, float]]:
    """Images with their weights. Raises ConfigError for both of `image` and `several`, and for
    weights that are not one for each of several."""
    if image is not None and len(several):
        raise ConfigError("image= and images= are both given. Give all of them as images=.")
    given = [image] if image is not None else list(several)
    if weights is None:
        return [(one, 1.0) for one in given]
    if len(weights) != len(given) or len(given) < 2:
        raise ConfigError(
            f"weights={list(weights)}: expected one for each of several images, "
            f"here are {len(given)}."
        )
    if not np.isfinite(np.float64(weights)).all() or not any(weights):
        raise ConfigError(f"weights={list(weights)}: expected finite ones, not all of them 0.")
    return list(zip(given, map(float, weights), strict=True))


@dataclasses.dataclass(frozen=True)
class Asking:
    """by_cosine: whether the method ranks by the dot product. gallery_is_its_own: whether it ranks
    by other vectors than the backbone's."""

    searcher: Searcher
    by_cosine: bool
    gallery_is_its_own: bool

    def __call__(
        self,
        references: Sequence[tuple[Any, float]],
        text: str | None,
        negatives: Sequence[str] = (),
        mask: Any = None,
        controls: Mapping[str, Any] | None = None,
        concept: str = "",
    ) -> Asked:
        """Of `references`, opened, and the rest as `Library.search` takes it.

        Raises ConfigError for what the method does not take.
        """
        composer, composing = self.searcher.composer, self.searcher.composing
        method, prompt = type(composer).__name__, self._prompt(text, concept, bool(references))
        native = ", ".join(negatives) if "negative_text" in composer.conditions else ""
        conditions = Conditions(negative_text=native or None, mask=mask, **(controls or {}))
        if len(references) < 2:
            reference = references[0][0] if references else None
            query, own = composing.compose(reference, text, conditions, prompt=prompt)
            arithmetic = []
        else:
            if mask is not None:
                raise ConfigError("mask: the region of one image; here are several.")
            if not self.by_cosine:
                raise ConfigError(f"images: {method} has no sum of queries. Give one image.")
            made = [
                composing.compose(one, text, conditions, prompt=prompt) for one, _ in references
            ]
            own = made[0].own
            query = sum(w * one.features for one, (_, w) in zip(made, references, strict=True))
            arithmetic = [f"{len(made)} images are composed one by one and added"]
        if negatives and not native:
            if own and self.gallery_is_its_own:
                able = [n for n in COMPOSERS if "negative_text" in composer_class(n).conditions]
                raise ConfigError(
                    f"negative: {method} ranks by features of its own, among which a text has no "
                    f"place. Methods that take one: {', '.join(able)}, and, as vector arithmetic, "
                    "all that rank by the backbone's features."
                )
            query = features.unit(query)
            for negative in negatives:
                query = query - NEGATIVE * composing.compose(None, negative).features
            arithmetic.append("the negative text is subtracted")
        if arithmetic:
            query = features.unit(query)
        said = f"approximate: {', '.join(arithmetic)}" if arithmetic else ""
        return Asked(query, own, said)

    def _prompt(self, text: str | None, concept: str, with_image: bool) -> str:
        """ "" = the method's own. Raises ConfigError for a concept without an image and a text."""
        if not concept.strip():
            return ""
        if not (with_image and text and text.strip()):
            raise ConfigError(f"concept={concept!r}: what an image shares with a text. Give both.")
        return _SHARED.prompt(self.searcher.composer.prompt, text.strip(), concept.strip())
