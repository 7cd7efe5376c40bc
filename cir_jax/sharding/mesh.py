"""Meshes: which axes there are, and how rows of a batch lie on them."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.errors import MeshError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
BATCH = P(ROW_AXES)
"""The batch is split over both: fsdp shards parameters *and* rows."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over (data, fsdp, tensor); at most one size may be -1 = whatever is left.

    Several slices of TPUs lie along data, one behind the other: between them the network is slow.
    Raises MeshError when the sizes do not multiply to the number of devices, or the slices do not
    divide data.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = count_slices(devices)
    shape = mesh_shape(sizes, len(devices), slices)
    # not jax.make_mesh, which takes no hosts of GPUs; a side of most TPUs' chips it leaves whole
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, **options)
    else:
        inside, outside = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
        arranged = mesh_utils.create_hybrid_device_mesh(inside, outside, **options)
    # the compiler propagates shardings
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices of TPUs devices are of; others are one, though JAX numbers their hosts so."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def mesh_shape(sizes: Mapping[str, int], count: int, slices: int = 1) -> tuple[int, ...]:
    """Sizes of `AXES` over `count` devices in so many slices; MeshError as `make_mesh`."""
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise MeshError(f"mesh ({given}): sizes are positive, at most one is -1 (the rest).")
    if shape.count(-1):
        if count % known:
            raise MeshError(
                f"mesh ({given}): {count} devices are not divisible by {known}. "
                "Change --config.mesh.* so that they are."
            )
        shape[shape.index(-1)] = count // known
    total = int(np.prod(shape))
    if total > count:
        raise MeshError(
            f"mesh ({given}) needs {total} devices, there are {count}. "
            "Lower --config.mesh.*, or use -1 for one axis."
        )
    if total < count:
        raise MeshError(
            f"mesh ({given}) uses {total} of {count} devices. Use -1 for one axis, "
            "or hide the other devices."
        )
    if shape[0] % slices:
        raise MeshError(
            f"mesh ({given}): {slices} slices lie along data, which is {shape[0]} here: their "
            f"network is for gradients alone. Make --config.mesh.data a multiple of {slices}."
        )
    return tuple(shape)


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
    processes = len(np.unique(owners))  # of the mesh: its devices need not be here
    if (owners != owners[:, :, :1]).any():
        raise MeshError(
            f"mesh {dict(mesh.shape)}: the tensor axis spans several processes, which would have "
            "to read the same rows. Lower --config.mesh.tensor to the devices of one process."
        )
    check_rows(batch_size, shards, processes, field)


def check_rows(batch_size: int, shards: int, processes: int, field: str) -> None:
    """Raises MeshError unless the rows divide over data x fsdp and the processes."""
    if batch_size % shards or batch_size % processes:
        raise MeshError(
            f"{field}={batch_size} is not divisible by data x fsdp = {shards} "
            f"({processes} processes). Use a multiple of {int(np.lcm(shards, processes))}."
        )
