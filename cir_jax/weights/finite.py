"""Rows that hold NaN or infinity: told apart from images that cannot be read, and refused in words.

A row leaves the device as NaN when its image did not decode (`unreadable`, which the host said), as
infinity when the computation itself went wrong. All processes see both, so they raise together.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.models.backbone import Backbone

SHOWN = 3
"""Records that a message names."""

DAMAGED = "these weights or what was trained on them are damaged"


def marked(rows: jax.Array, unreadable: jax.Array | None = None) -> jax.Array:
    """float[batch, dim]: NaN where unreadable (bool[batch]), else infinite where any value is not
    finite, else as it is."""
    finite = jnp.isfinite(rows).all(axis=-1, keepdims=True)
    rows = jnp.where(finite, rows, jnp.inf)
    return rows if unreadable is None else jnp.where(unreadable[:, None], jnp.nan, rows)


def checked(
    pieces: Generator[np.ndarray, None, None],
    first: int,
    what: str,
    backbone: Backbone,
    name: Callable[[int], str],
    cause: str = DAMAGED,
) -> Iterator[np.ndarray]:
    """The pieces of `marked` rows, which begin with row `first`.

    what: the rows, name: one of them, in messages. Raises WeightsError before it hands on a piece
    with an infinite row.
    """
    with contextlib.closing(pieces):  # its threads end with it, whoever raises
        for piece in pieces:
            refuse(piece, first, what, backbone, name, cause)
            yield piece
            first += len(piece)


def refuse(
    rows: np.ndarray,
    first: int,
    what: str,
    backbone: Backbone,
    name: Callable[[int], str],
    cause: str = DAMAGED,
) -> None:
    """Raises WeightsError when one of the `marked` rows, `first` and following, is infinite."""
    # a finite sum has finite terms; a mask as large as the rows only where it is not
    odd = np.flatnonzero(~np.isfinite(_sums(rows)))
    odd = odd[np.isinf(rows[odd]).any(axis=1)]
    if not len(odd):
        return
    dtype = backbone.dtype.name
    names = ", ".join(name(first + int(row)) for row in odd[:SHOWN])
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    fields = "--config.dtype=float32 (in training), --config.evaluation.dtype=float32 (elsewhere)"
    wider = "" if dtype == "float32" else f"try {fields}; "
    raise WeightsError(
        f"{what}: not finite, though the input was read: {names}{more}. Computed in {dtype} with "
        f"{backbone.weights_id}: {cause}, or numbers overflow. None of these rows was stored. "
        f"To do: {wider}get the weights again, or take an earlier checkpoint."
    )


def stored_whole(rows: np.ndarray, unreadable: bool) -> bool:
    """Whether stored rows are what is stored now: finite or, where images may be `unreadable`, NaN
    throughout. Earlier versions stored whatever came."""
    odd = rows[~np.isfinite(_sums(rows))]
    odd = odd[~np.isfinite(odd).all(axis=1)]
    return not len(odd) or (unreadable and bool(np.isnan(odd).all()))


def _sums(rows: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return rows.sum(axis=1)
