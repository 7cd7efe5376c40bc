"""Rows stay on their devices: what towers compute is split as the batch is, over (data, fsdp).

fsdp splits rows and parameters alike, so a compiler that meets both may gather the weights of a
layer, or leave them where they lie and move the activations of the whole batch; left alone, it does
the latter. A constraint at each border of a tower and of a layer leaves it the first way alone.

Models call `split_rows` without knowing of devices: outside `rows_over`, and on one device, it does
nothing. The transpose of a constraint is the same constraint, so that gradients obey it, too.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.sharding.mesh import BATCH, row_shards

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """Inside, `split_rows` and `whole` mean this mesh; for the time a function is traced.

    Enter it within the function that is compiled: traces that JAX keeps are found by their
    arguments, among which a mesh outside would not be.
    """
    token = _mesh.set(mesh if mesh.size > 1 else None)
    try:
        yield
    finally:
        _mesh.reset(token)


def split_rows(tree: Any) -> Any:
    """The same arrays [rows, ...], row by row on the devices of the batch; a tree of them or None.

    Rows that the devices do not divide lie whole on each: the one null text of a batch.
    """
    return jax.tree.map(lambda x: _constrain(x, BATCH), tree)


def whole(tree: Any) -> Any:
    """The same arrays, whole on every device: what all rows read, in an order of their own."""
    return jax.tree.map(lambda x: _constrain(x, P()), tree)


def gathered(table: jax.Array) -> jax.Array:
    """[n, width], each of the n whole on its device: a table that rows are looked up in."""
    return _constrain(table, P(P.UNCONSTRAINED, None))


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    mesh = _mesh.get()
    if mesh is None:
        return x
    if spec == BATCH and (not x.ndim or x.shape[0] % row_shards(mesh)):
        spec = P()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
