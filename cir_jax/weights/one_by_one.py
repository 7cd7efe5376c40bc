"""Parameters on their way from files to devices: one at a time is read, placed and let go.

So a host holds what its devices hold of them, and one parameter besides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from cir_jax.errors import WeightsError
from cir_jax.sharding.largest import Largest
from cir_jax.sharding.placement import from_parts
from cir_jax.weights.convert import flatten
from cir_jax.weights.files import ContentId, Source

Shardings = Callable[[Any], Any]
"""A tree of what has a shape -> the NamedSharding of each leaf."""

SMALL = 1 << 16
"""Numbers of a parameter by which processes compare their files: of all norms and biases."""


def read(
    source: Source, params: Mapping[str, Any], about: Any, shardings: Shardings | None = None
) -> tuple[dict[str, Any], str]:
    """The parameters of a source as arrays, and their `files.content_id`.

    params: read here, one after the other, where they are not yet (`convert.unread`). about: what
    else changes features. shardings: None = numpy, on the host; else arrays of all processes, which
    must all call this. Then each reads what its devices hold; process 0 reads everything, as the id
    is a hash of it, and tells the others.
    Raises WeightsError as reading does, and where a process finds another model's numbers.
    """
    where = flatten(shardings(params)) if shardings else {}
    several = shardings is not None and jax.process_count() > 1
    whole = ContentId(about) if not several or jax.process_index() == 0 else None
    small = ContentId()
    arrays: dict[tuple[str, ...], Any] = {}
    for path, leaf in sorted(flatten(params).items()):
        if whole:
            leaf = np.asarray(leaf)
            whole.add(path, leaf)
        if shardings:
            # what was read is let go before the next one is
            leaf = jax.block_until_ready(from_parts(leaf, where[path]))
            if several and leaf.is_fully_replicated and leaf.size <= SMALL:
                small.add(path, leaf.addressable_data(0))
        arrays[path] = leaf
    digest = str(whole)
    if several:
        own = int(str(small), 16)
        if _largest(own) != own:
            raise WeightsError(
                f"{source.what()}: process {jax.process_index()} reads other numbers in it than "
                "another one does in its own. Copy the same file to all hosts."
            )
        # the others say 0
        digest = f"{_largest(int(digest, 16) if whole else 0):0{ContentId.DIGITS}x}"
    return unflatten_dict(arrays), f"{source.name}@{digest}"


def _largest(number: int) -> int:
    """All processes in one order. Without the devices: it takes long to read a large file, and a
    collective would not wait."""
    numbers = Largest()
    numbers.say(number)
    return numbers.hear()
