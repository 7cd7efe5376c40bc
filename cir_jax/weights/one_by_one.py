"""Parameters on their way from files to devices: one at a time is read, placed and let go.

So a host holds what its devices hold of them, and one parameter besides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from cir_jax.sharding.largest import Largest
from cir_jax.sharding.placement import from_parts
from cir_jax.weights.convert import flatten
from cir_jax.weights.files import ContentId

Shardings = Callable[[Any], Any]
"""A tree of what has a shape -> the NamedSharding of each leaf."""


def read(
    name: str, params: Mapping[str, Any], about: Any, shardings: Shardings | None = None
) -> tuple[dict[str, Any], str]:
    """The parameters as arrays, and their `files.content_id`.

    params: read here, one after the other, where they are not yet (`convert.unread`). about: what
    else changes features. shardings: None = numpy, on the host; else arrays of all processes, which
    must all call this. Then each reads what its devices hold; process 0 reads everything, as the id
    is a hash of it, and tells the others. Raises WeightsError as reading does.
    """
    where = flatten(shardings(params)) if shardings else {}
    alone = shardings is None or jax.process_count() == 1
    made = ContentId(about) if alone or jax.process_index() == 0 else None
    arrays: dict[tuple[str, ...], Any] = {}
    for path, leaf in sorted(flatten(params).items()):
        if made:
            leaf = np.asarray(leaf)
            made.add(path, leaf)
        if shardings:
            # what was read is let go before the next one is
            leaf = jax.block_until_ready(from_parts(leaf, where[path]))
        arrays[path] = leaf
    digest = str(made) if alone else _told(str(made) if made else "0")
    return unflatten_dict(arrays), f"{name}@{digest}"


def _told(own: str) -> str:
    """The id of process 0; the others say 0. All in one order, without the devices: it takes long
    to read a large file, and a collective would not wait."""
    numbers = Largest()
    numbers.say(int(own, 16))
    return f"{numbers.hear():0{ContentId.DIGITS}x}"
