"""Images of a gallery -> rows of features: the compiled step, and what its rows depend on."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax.composers.base import Composer, Params
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import rows_over
from cir_jax.sharding.mesh import replicated
from cir_jax.sharding.placement import on_mesh
from cir_jax.sharding.rows import map_rows
from cir_jax.sharding.together import Together
from cir_jax.weights import finite
from cir_jax.weights.fingerprint import fingerprint

PLAIN = ("encode_image", "backbone image features, un-normalised")
"""A method of the backbone, and what its rows are called where they are stored."""
TOKENS = ("visual_tokens", "backbone visual tokens")


class Encoder(NamedTuple):
    """step: {"image": uint8[batch, height, width, 3], "unreadable": bool[batch]} -> replicated
    float32[batch, dim], as `finite.marked` leaves them. description: all that the rows depend on
    beside the images and their preprocessing."""

    step: Callable[[Any], jax.Array]
    description: Mapping[str, Any]
    backbone: Backbone

    @property
    def identity(self) -> str:
        """Hash of all that the rows depend on but the images, with the backbone's preprocessing."""
        whole = {**self.description, "preprocessing": preprocessing(self.backbone.image_transform)}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]

    def rows(
        self,
        load: Callable[[int], dict[str, np.ndarray]],
        n: int,
        name: Callable[[int], str],
        *,
        mesh: Mesh,
        batch_size: int,
        first: int = 0,
        label: str = "",
    ) -> Iterator[np.ndarray]:
        """float32[some, dim] of images first..n-1 in order, as soon as they are computed; NaN where
        unreadable. load: one image, see `map_rows`; name: what errors call it; label: of the
        progress bar, "" = none. Raises WeightsError for features that are not finite."""
        pieces = map_rows(
            self.step, load, n, first=first, mesh=mesh, batch_size=batch_size, description=label
        )
        return finite.checked(pieces, first, self.description["features"], self.backbone, name)


def preprocessing(transform: Any) -> str:
    """A transform, as descriptions have it."""
    return f"{type(transform).__module__}.{transform!r}"


def of_backbone(
    backbone: Backbone,
    params: Params,
    mesh: Mesh,
    what: tuple[str, str] = PLAIN,
    identified: bool = True,
) -> Encoder:
    """What a method of the backbone gives of an image, a row each. identified: whether the
    description tells parameters apart, which takes a look at them."""
    method, rows = what
    description = {
        "features": rows,
        **backbone.identity,
        "parameters": fingerprint(params) if identified else "",
    }
    params = on_mesh(mesh, params)
    return Encoder(
        lambda batch: _encode_images(backbone, mesh, params, batch, method), description, backbone
    )


def of_composer(
    composer: Composer, params: Params, frozen: Params, mesh: Mesh, identified: bool = True
) -> Encoder:
    """`composer.embed_gallery`, for methods that do not rank by the backbone's features."""
    description = {
        "features": f"{type(composer).__module__}.{type(composer).__qualname__}.embed_gallery",
        # a setting whose repr holds an address never matches: computed again, never reused wrongly
        "settings": {k: repr(v) for k, v in sorted(vars(composer).items()) if k != "backbone"},
        **composer.backbone.identity,
        "parameters": fingerprint({"params": params, "frozen": frozen}) if identified else "",
    }
    params, frozen = on_mesh(mesh, params), on_mesh(mesh, frozen)
    return Encoder(
        lambda batch: _embed_gallery(composer, mesh, params, frozen, batch),
        description,
        composer.backbone,
    )


@Together
@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _encode_images(
    backbone: Backbone,
    mesh: Mesh,
    params: Params,
    batch: dict[str, jax.Array],
    method: str,
) -> jax.Array:
    with rows_over(mesh), backbone.full_precision():
        features = getattr(backbone, method)(params, batch["image"])
    features = features.reshape(len(features), -1).astype(jnp.float32)  # tokens are of its dtype
    marked = finite.marked(features, batch["unreadable"])
    return jax.lax.with_sharding_constraint(marked, replicated(mesh))


@Together
@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_gallery(
    composer: Composer, mesh: Mesh, params: Params, frozen: Params, batch: dict[str, jax.Array]
) -> jax.Array:
    with rows_over(mesh), composer.backbone.full_precision():
        features = composer.embed_gallery(params, frozen, batch["image"])
    marked = finite.marked(features, batch["unreadable"])
    return jax.lax.with_sharding_constraint(marked, replicated(mesh))
