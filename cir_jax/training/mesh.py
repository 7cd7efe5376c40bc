"""Meshes, sharding rules by parameter path, and global arrays from process-local data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.errors import MeshError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""The batch is split over both: fsdp shards parameters *and* rows."""

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


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over (data, fsdp, tensor); at most one size may be -1 = whatever is left.

    Raises MeshError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise MeshError(f"mesh ({given}): sizes are positive, at most one is -1 (the rest).")
    if shape.count(-1):
        if len(devices) % known:
            raise MeshError(
                f"mesh ({given}): {len(devices)} devices are not divisible by {known}. "
                "Change --config.mesh.* so that they are."
            )
        shape[shape.index(-1)] = len(devices) // known
    total = int(np.prod(shape))
    if total > len(devices):
        raise MeshError(
            f"mesh ({given}) needs {total} devices, there are {len(devices)}. "
            "Lower --config.mesh.*, or use -1 for one axis."
        )
    if total < len(devices):
        raise MeshError(
            f"mesh ({given}) uses {total} of {len(devices)} devices. Use -1 for one axis, "
            "or hide the other devices."
        )
    # Auto: the compiler propagates shardings; make_mesh would default to Explicit axes
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp)."""
    return NamedSharding(mesh, BATCH)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises MeshError unless the global batch divides over the mesh and the processes."""
    shards = row_shards(mesh)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (owners != owners[:, :, :1]).any():
        raise MeshError(
            f"mesh {dict(mesh.shape)}: the tensor axis spans several processes, which would have "
            "to read the same rows. Lower --config.mesh.tensor to the devices of one process."
        )
    if batch_size % shards or batch_size % jax.process_count():
        raise MeshError(
            f"{field}={batch_size} is not divisible by data x fsdp = {shards} "
            f"({jax.process_count()} processes). Use a multiple of "
            f"{int(np.lcm(shards, jax.process_count()))}."
        )


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
    """The same host values on every process -> global arrays, sharded by the rules."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        ),
        tree,
        parameter_shardings(mesh, tree, rules),
    )


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
