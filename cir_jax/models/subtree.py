"""Some parameters of a model, kept apart from the rest: those that a method tunes.

    tuned = subtree.chosen(params, r"text/.*")       # {"text": {...}}, nothing copied
    whole = subtree.put(params, tuned)               # the model's tree, with the tuned ones in it

A method holds the tuned ones in its own parameters and the rest frozen, once.
"""

import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from cir_jax.errors import ConfigError


def chosen(params: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The parameters whose whole path ("text/layers_0/fc1/kernel") matches; also of shapes.

    Raises ConfigError when there are none.
    """
    flat = flatten_dict(params, sep="/")
    found = {path: x for path, x in flat.items() if re.fullmatch(pattern, path)}
    if not found:
        some = list(flat)[:: max(1, len(flat) // 6)][:6]
        raise ConfigError(
            f"pattern {pattern!r} matches no parameter of the backbone. Paths look like: "
            f"{', '.join(some)}."
        )
    return unflatten_dict(found, sep="/")


def put(params: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `params` with `tuned` in its place, each in the type it had."""
    flat, own = flatten_dict(params, sep="/"), flatten_dict(tuned, sep="/")
    return unflatten_dict(
        flat | {path: x.astype(flat[path].dtype) for path, x in own.items()}, sep="/"
    )


def without(params: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `params` without the paths of `tuned`."""
    own = flatten_dict(tuned)
    return unflatten_dict({path: x for path, x in flatten_dict(params).items() if path not in own})
