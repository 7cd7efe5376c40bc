"""Devices that need not be here, and the meshes of several slices."""

import dataclasses
import os
import sys

import jax
import numpy as np
import pytest
from jax.experimental import topologies as libtpus

from cir_jax.errors import ConfigError, MeshError
from cir_jax.sharding import mesh as meshes
from cir_jax.sharding import topologies


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v9:4x4", 1, "unknown kind of --topology: 'v9'. Valid: cpu, v4, v5e, v5p, v6e."),
        ("v5e:16", 1, "--topology=v5e:16: expected v5e:4x4 or so"),
        ("v5e", 1, "--topology=v5e: expected v5e:4x4 or so"),
        ("cpu:4x4", 1, "--topology=cpu:4x4: expected cpu:8 or so"),
        ("cpu:64", 1, "this process has 8 virtual devices. Set JAX_NUM_CPU_DEVICES=64"),
        ("cpu:8", 2, "--slices=2: virtual devices are in one slice"),
    ],
)
def test_what_is_no_topology(topology, slices, message):
    with pytest.raises(ConfigError) as raised:
        topologies.devices(topology, slices)
    assert message in str(raised.value)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r'pip install "cir_jax\[tpu-aot\]"; it needs no TPU'):
        topologies.devices("v5e:4x4")


def test_libtpu_is_told_that_there_is_no_machine_and_nobody_else(monkeypatch):
    told = {}

    def refuse(*_, **__):
        told.update(os.environ)
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: 3 is not divisible\nmore")

    monkeypatch.setitem(sys.modules, "libtpu", sys)
    monkeypatch.setattr(libtpus, "get_topology_desc", refuse)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="knows no such one .INVALID_ARGUMENT: 3 is not divis"):
        topologies.devices("v5e:3x5")
    assert told["TPU_SKIP_MDS_QUERY"] == "1" and told["TPU_ACCELERATOR_TYPE"] == "v5p-8"
    assert dict(os.environ) == before


def test_virtual_devices_have_no_memory_of_their_own():
    assert topologies.devices("cpu:4") == jax.devices("cpu")[:4]
    assert topologies.memory_gib("cpu:4") is None and topologies.memory_gib("v5p:2x2x2") == 95


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    platform: str = "tpu"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0
    device_kind: str = "of a test"


def test_slices_lie_along_data():
    # in any order; four in the square of a slice
    chips = [Chip(i, slice_index=i % 2, coords=(i // 2 % 2, i // 4, 0)) for i in range(8)]
    made = meshes.make_mesh({"data": -1, "fsdp": 2}, chips)
    of = np.vectorize(lambda chip: chip.slice_index)(made.devices)
    assert made.shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert (of[:2] == 0).all() and (of[2:] == 1).all()
    assert meshes.count_slices(made.devices.flat) == 2


def test_slices_that_would_split_parameters():
    chips = [Chip(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(MeshError, match="2 slices lie along data, which is 1 here.* multiple of 2"):
        meshes.make_mesh({"data": 1, "fsdp": 8}, chips)


@pytest.mark.parametrize("slices", [1, 2])
def test_an_axis_may_end_within_a_side_of_the_chips(slices):
    """Eight of the chips of 4 x 4."""
    squares = [
        Chip(i, slice_index=i // 16, coords=(i % 4, i // 4 % 4, 0)) for i in range(16 * slices)
    ]
    made = meshes.make_mesh({"data": -1, "fsdp": 8}, squares)
    assert made.shape["data"] == 2 * slices
    assert [len({chip.slice_index for chip in row}) for row in made.devices[..., 0]] == (
        [1] * 2 * slices
    )


def test_hosts_of_gpus_may_share_an_axis():
    """JAX numbers them as slices, as it does hosts without accelerators."""
    gpus = [Chip(i, slice_index=i // 4, platform="gpu") for i in range(8)]
    assert meshes.count_slices(gpus) == 1
    assert meshes.make_mesh({"data": 1, "fsdp": 8}, gpus).devices.ravel().tolist() == gpus
    of = [
        [chip.slice_index for chip in row]
        for row in meshes.make_mesh({"fsdp": 4, "data": -1}, gpus).devices[..., 0]
    ]
    assert of == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("topology", "slices", "count"), [("v5e:4x4", 2, 32), ("v4:2x2x2", 1, 8), ("v5p:2x2x2", 1, 8)]
)
def test_chips_of_libtpu(topology, slices, count):
    pytest.importorskip("libtpu", reason="compiling for TPUs: pip install cir_jax[tpu-aot]")
    found = topologies.devices(topology, slices)
    assert len(found) == count and {chip.platform for chip in found} == {"tpu"}
    made = meshes.make_mesh({"data": -1, "fsdp": 4}, found)
    # those of one slice have no such number
    of = np.vectorize(lambda chip: getattr(chip, "slice_index", 0))(made.devices)
    assert [len(np.unique(half)) for half in np.split(of, slices)] == [1] * slices
    with pytest.raises(ConfigError, match="libtpu knows no such one.*not divisible"):
        topologies.devices("v5e:3x5")
