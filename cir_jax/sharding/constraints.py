"""Rows stay on their devices: what towers compute is split as the batch is, over (data, fsdp).

fsdp splits rows and parameters alike, so a compiler that meets both may gather the weights of a
layer, or leave them where they lie and move the activations of the whole batch; left alone, it does
the latter. A constraint at each border of a tower and of a layer leaves it the first way only.

Models call `split_rows` without knowing of devices: outside `rows_over`, and on one device, it does
nothing. The transpose of a constraint is the same constraint, so that gradients obey it, too.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.sharding.mesh import BATCH, ROW_AXES, row_shards
from cir_jax.sharding.placement import FROZEN, parameter_shardings

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_in_row = contextvars.ContextVar("in_row", default=False)
_target: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar(
    "target", default=None
)


@contextlib.contextmanager
def rows_over(mesh: Mesh) -> Iterator[None]:
    """Inside, the functions below mean this mesh; for the time a function is traced.

    Enter it within the function that is compiled: traces that JAX keeps are found by their
    arguments, among which a mesh outside would not be.
    """
    token = _mesh.set(mesh if mesh.size > 1 else None)
    target = _target.set((mesh.devices.flat[0].platform, mesh.size))
    try:
        yield
    finally:
        _target.reset(target)
        _mesh.reset(token)


def target() -> tuple[str, int]:
    """Platform ("cpu", "gpu", "tpu") and number of the devices that is traced for: of the mesh of
    `rows_over`, which need not be here, else all there are."""
    return _target.get() or (jax.default_backend(), jax.device_count())


def split_rows(tree: Any) -> Any:
    """The same arrays [rows, ...], row by row on the devices of the batch; a tree of them or None.

    Rows that the devices do not divide lie whole on each: the one null text of a batch. Inside of
    `each_row` arrays have no axis of rows, and the one that is mapped over is meant.
    """

    def split(x: jax.Array) -> jax.Array:
        if _in_row.get():
            return _constrain(x, P(*[P.UNCONSTRAINED] * x.ndim))
        mesh = _mesh.get()
        divides = mesh is not None and x.shape[0] % row_shards(mesh) == 0
        return _constrain(x, BATCH if divides else P())

    return jax.tree.map(split, tree)


def whole(tree: Any) -> Any:
    """The same arrays, whole on every device: what all rows read, in an order of their own."""
    return jax.tree.map(lambda x: _constrain(x, P()), tree)


def over_tensor(params: Any) -> Any:
    """Parameters by their paths, split over the tensor axis alone: what a loop reads is gathered
    over fsdp once, not in each of its iterations."""
    mesh = _mesh.get()
    if mesh is None:
        return params
    where = parameter_shardings(mesh, params, FROZEN["replicated"])
    return jax.tree.map(jax.lax.with_sharding_constraint, params, where)


def gathered(table: jax.Array) -> jax.Array:
    """[n, width], each of the n whole on its device: a table that rows are looked up in."""
    return _constrain(table, P(P.UNCONSTRAINED, None))


def each_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` over rows, for what draws random numbers of its own in each; see `split_rows`."""
    if _mesh.get() is None:
        return jax.vmap(function)

    def of_row(*args: Any) -> Any:
        token = _in_row.set(True)
        try:
            return function(*args)
        finally:
            _in_row.reset(token)

    return jax.vmap(of_row, spmd_axis_name=ROW_AXES)


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    mesh = _mesh.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
