"""Where arrays lie: sharding rules by parameter path, host values to devices and back."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.errors import MeshError
from cir_jax.sharding.mesh import batch_sharding, replicated

Rules = Sequence[tuple[str, P]]
RULES: Rules = (
    (r".*/(query|key|value|key_value|fc1|gate)/kernel", P("fsdp", "tensor")),
    (r".*/(out|fc2)/kernel", P("tensor", "fsdp")),
    (r".*/(token_embedding/embedding)", P("tensor", "fsdp")),
    (r".*/kernel", P("fsdp", None)),
    (r".*", P()),
)
"""First match wins. Columns of the first matmul and rows of the second lie on `tensor`, so one
reduction per block suffices. Everything else is small: replicated."""

FROZEN: dict[str, Rules] = {
    "split": RULES,
    "replicated": tuple(
        (pattern, P(*(None if axis == "fsdp" else axis for axis in spec)))
        for pattern, spec in RULES
    ),
}
"""config.frozen -> where parameters lie that no optimiser moves. "replicated": no step gathers
them, and each device holds up to fsdp times as much; the tensor axis splits them either way."""


def global_batch(mesh: Mesh, batch: Any) -> Any:
    """Process-local rows (numpy, equal on all processes in number) -> global arrays."""
    sharding = batch_sharding(mesh)
    # the one transfer to the devices that a loop means; JAX's guard would call it implicit
    with jax.transfer_guard("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The same host values on every process -> replicated global arrays."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]
        ),
        tree,
    )


def parameter_shardings(mesh: Mesh, tree: Any, rules: Rules = RULES) -> Any:
    """NamedSharding for each leaf of a tree of arrays or shapes: the first rule matching its path.

    An axis that the mesh does not divide stays whole (logged at level info). Raises MeshError
    for a parameter that no rule matches.
    """

    def shard(path: Any, leaf: Any) -> NamedSharding:
        name = "/" + "/".join(_key(key) for key in path)
        for pattern, spec in rules:
            if re.fullmatch(pattern, name):
                fitted = _fit(mesh, spec, np.shape(leaf))
                if any(fitted) != any(spec):
                    logging.info("%s %s stays whole: not divisible", name, np.shape(leaf))
                return NamedSharding(mesh, fitted)
        raise MeshError(f"no sharding rule matches parameter {name}; add one to the rules.")

    return jax.tree_util.tree_map_with_path(shard, tree)


def place(mesh: Mesh, tree: Any, rules: Rules = RULES) -> Any:
    """The same host values on every process -> global arrays, sharded by the rules.

    Arrays that lie so already are taken as they are. Shapes get the shardings.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array | jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        return jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        )

    return jax.tree.map(put, tree, parameter_shardings(mesh, tree, rules))


def from_parts(x: Any, sharding: NamedSharding) -> jax.Array:
    """A global array of what each process finds where it indexes `x`, once: the smallest block
    with all that its devices hold. x: has a shape, and is the same on every process."""
    shape = np.shape(x)
    held = [
        [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    starts, stops = (
        [how(ends[side] for ends in axis) for axis in zip(*held, strict=True)]
        for side, how in enumerate((min, max))
    )
    block = x[tuple(map(slice, starts, stops))]
    if isinstance(x, np.ndarray) and block.size < x.size:
        block = block.copy()  # a CPU device may take it as it is, and all of `x` with it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ends = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
        return block[
            tuple(
                slice(a - first, b - first) for (a, b, _), first in zip(ends, starts, strict=True)
            )
        ]

    return jax.make_array_from_callback(shape, sharding, part)


def own_shardings(mesh: Mesh, tree: Any) -> Any:
    """How the leaves lie on the mesh: arrays and shapes with a sharding on it as they are, others
    (host values) as `RULES` would place them."""

    def own(leaf: Any, rule: NamedSharding) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        on_it = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return sharding if on_it else rule

    return jax.tree.map(own, tree, parameter_shardings(mesh, tree))


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _fit(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> P:
    if len(spec) > len(shape):
        return P()
    return P(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        )
    )


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Host values and arrays of other devices -> replicated on the mesh; arrays on it stay."""
    devices = set(mesh.devices.flat)

    def put(x: Any) -> Any:
        if isinstance(x, jax.Array) and x.sharding.device_set == devices:
            return x
        return replicate(mesh, x)

    return jax.tree.map(put, tree)


def to_host(leaf: Any) -> np.ndarray:
    """The whole array, on every process; all must call it for an array sharded over hosts."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
