"""Of a large checkpoint each process reads what its devices hold, and holds no more than that and
one tensor; the numbers, ids and errors are those of a file that is read whole."""

import dataclasses
import functools
import hashlib
import json
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models.clip import Clip
from cir_jax.sharding import mesh as meshes
from cir_jax.sharding import placement
from cir_jax.weights import convert, files, lazy, one_by_one, safetensors_files
from tests.launch.binaries import ROOT, environment
from tests.weights import worlds

MB = 1 << 20
WIDTH = 2048
"""Of the image tower: half a row of a kernel is a page."""


def save(path, width):
    """A CLIP with one layer of images, 6 kernels of width x width."""
    made, _ = worlds.make()
    vision = dataclasses.replace(
        made.config.vision,
        hidden_size=width,
        intermediate_size=width,
        num_attention_heads=width // 64,
    )
    backbone = dataclasses.replace(
        made, model=Clip(dataclasses.replace(made.config, vision=vision))
    )
    rng, shapes = np.random.default_rng(0), jax.eval_shape(backbone.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    weights.save(path, backbone, params)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """small: all that loading imports and compiles, once; large: 98 MB; damaged: the same, but for
    a number of the second process's half."""
    path = tmp_path_factory.mktemp("large")
    save(path / "small", 128)
    save(path / "large", WIDTH)
    shutil.copytree(path / "large", path / "damaged")
    tensors = load_file(path / "damaged" / "model.safetensors")
    tensors[SPOILT] = np.array(tensors[SPOILT])
    tensors[SPOILT][7, WIDTH // 2 + 5] = np.nan
    save_file(tensors, path / "damaged" / "model.safetensors")
    return path


SPOILT = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


class Process:
    """`tests.weights.reading` with so many devices."""

    def __init__(self, folder, devices, *arguments):
        folder.mkdir()
        self.log = folder / "log"
        command = [sys.executable, "-m", "tests.weights.reading", *map(str, arguments)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=environment(folder, devices),
            )  # fmt: skip

    def end(self):
        """Exit status, what was said of each load, and the last line."""
        status = self.process.wait(timeout=120)
        lines = self.log.read_text().splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{")]
        return status, said, lines[-1]


@pytest.mark.slow
def test_a_process_holds_what_its_device_holds_and_little_more(world, tmp_path):
    """Read whole it was twice the file, in the host's arrays and as pages of it."""
    run = Process(
        tmp_path / "run", 1, 0, 1, 0, f"split={world / 'small'}", f"split={world / 'large'}"
    )
    status, said, last = run.end()
    assert status == 0, last
    size, largest = (world / "large" / "model.safetensors").stat().st_size, 4 * WIDTH**2
    assert size <= said[1]["read"] < size + MB
    assert said[1]["peak"] < size + largest + 24 * MB < 1.5 * size
    assert said[1]["id"] == weights.load(world / "large")[0].weights_id


@pytest.mark.slow
def test_two_processes_read_and_hold_a_half_each(world, tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    loads = [
        f"split={world / 'small'}",
        f"split={world / 'large'}",
        f"replicated={world / 'large'}",
    ]
    own = [f"split={world / 'large'}", f"split={world / 'damaged'}"]  # on disks of their own
    (first, one, end_1), (second, two, end_2) = (
        run.end()
        for run in [
            Process(tmp_path / str(number), 2, port, 2, number, *loads, last)
            for number, last in enumerate(own)
        ]
    )
    assert len(one) == len(two) == 3, (end_1, end_2)

    backbone, params = weights.load(world / "large")
    assert {x["id"] for x in (*one, *two)} == {said["id"] for said in one}
    assert one[1]["id"] == one[2]["id"] == backbone.weights_id

    # what they read: the first everything, as the id is a hash of it
    size = (world / "large" / "model.safetensors").stat().st_size
    halves = 6 * 4 * WIDTH**2 // 2
    assert size <= one[1]["read"] < size + MB and size <= two[2]["read"] < size + MB
    assert size - halves - WIDTH * 4 * 192 <= two[1]["read"] < size - halves + MB
    # what they hold
    largest = 4 * WIDTH**2
    assert two[1]["peak"] < size - halves + largest + 24 * MB
    assert one[1]["peak"] < size
    assert max(one[2]["peak"], two[2]["peak"]) < size + 2 * largest + 24 * MB

    # every number is where it was
    for path, leaf in convert.flatten(params).items():
        for said in (one, two):
            for shards in (said[load]["shards"]["/".join(path)] for load in (1, 2)):
                assert len(shards) == 2
                for place, digest in shards:
                    part = leaf[tuple(slice(*ends) for ends in place)]
                    assert hashlib.sha256(part.tobytes()).hexdigest() == digest, path
    rows = WIDTH // 4
    kernel = two[1]["shards"]["vision/layers_0/attention/query/kernel"]
    assert [place for place, _ in kernel] == [
        [[start, start + rows], [0, WIDTH]] for start in (2 * rows, 3 * rows)
    ]

    # what the second alone can find ends both with its words
    message = f"model.safetensors: {SPOILT} holds 1 of {WIDTH**2} values that are NaN"
    assert (first, second) == (2, 2) and message in end_1 and message in end_2, (end_1, end_2)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("page", [1, 64, 4096])
def test_parts_of_tensors_are_those_of_whole_ones(tmp_path, monkeypatch, kind, page):
    """Whatever is cut, and whether runs or whole rows are read."""
    monkeypatch.setattr(safetensors_files, "PAGE", page)
    monkeypatch.setattr(safetensors_files, "_BLOCK", 100)
    rng = np.random.default_rng(0)
    shapes = {"0": (), "1": (17,), "2": (9, 14), "4": (6, 3, 4, 5), "empty": (0, 3)}
    arrays = {name: rng.integers(-9, 9, shape).astype(kind) for name, shape in shapes.items()}
    save_file(arrays, tmp_path / "x.safetensors")
    tensors = files.read_tensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        stored = lazy.stored(tensors, name)
        assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name], array)
        for _ in range(20):
            ends = (sorted(rng.integers(0, size + 1, 2)) for size in array.shape)
            index = tuple(slice(*map(int, pair)) for pair in ends)
            part = stored[index]
            assert part.dtype == array.dtype and part.flags.c_contiguous
            np.testing.assert_array_equal(part, array[index])


@pytest.mark.parametrize("layout", ["linear", "same"])
def test_what_is_split_and_turned_is_read_in_part(layout):
    """Parts of a query, key and value in one tensor, each sharded another way."""
    asked = []
    whole = np.random.default_rng(0).standard_normal((12, 8), np.float32)
    stored = lazy.Stored(
        whole.shape, whole.dtype, lambda index: asked.append(whole[index]) or whole[index]
    )
    table = convert.Names({"qkv": ((("q", "k", "v"), "kernel"), layout)})
    tree = convert.unread(lazy.Lazy({"qkv": lambda: stored}), table, dtype=ml_dtypes.bfloat16)
    assert not asked
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    for parts, spec in zip(tree.values(), [P("fsdp"), P(None, "tensor"), P()], strict=True):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        asked.clear()
        array = placement.from_parts(parts["kernel"], sharding)
        assert [part.shape for part in asked] == [(4, 8)]  # once, for all eight devices
        assert array.sharding == sharding and array.dtype == ml_dtypes.bfloat16
        asked.clear()
        one = parts["kernel"][slice(1, 3), slice(0, 2)]
        assert sum(part.size for part in asked) == one.size == 4
    expected = [p.T if layout == "linear" else p for p in np.split(whole, 3)]
    for parts, part in zip(tree.values(), expected, strict=True):
        np.testing.assert_array_equal(parts["kernel"], part.astype(ml_dtypes.bfloat16))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones((100, 100), np.float32)}, path)
    tensors = files.read_tensors(path)
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(WeightsError, match="x.safetensors: unreadable .it ends too early.. Downl"):
        tensors["x"]


def test_equal_tensors_are_compared_a_few_rows_at_a_time():
    seen = []
    one = np.arange(30).reshape(10, 3)

    def stored(array):
        read = lambda index: seen.append(array[index].shape) or array[index]  # noqa: E731
        return lazy.Stored(array.shape, array.dtype, read)

    other = one.copy()
    assert lazy.equal(stored(one), stored(other), rows=4)
    assert seen == [(4, 3)] * 4 + [(2, 3)] * 2
    other[9, 2] = 0
    assert not lazy.equal(stored(one), stored(other), rows=4)
    assert not lazy.equal(stored(one), stored(one[:9]))
    number = np.float32(3)[...]
    assert lazy.equal(stored(number), number) and not lazy.equal(stored(number), number + 1)


def test_processes_with_files_of_different_models(world, monkeypatch):
    """The second of two: what it says, hears, and finds."""
    said, heard = [], []

    class Numbers:
        def say(self, number):
            said.append(number)

        def hear(self):
            return said[-1] if heard[len(said) - 1] is ... else heard[len(said) - 1]

    monkeypatch.setattr(one_by_one, "Largest", Numbers)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    where = functools.partial(placement.parameter_shardings, meshes.make_mesh({"fsdp": -1}))
    heard[:] = [..., 0xABC]
    assert weights.load(world / "small", shardings=where)[0].weights_id == "small@000000000abc"
    assert said[0] > 0 and said[1] == 0
    heard[:], own = [said[0] + 1], said[0]
    said.clear()
    with pytest.raises(
        WeightsError, match="model.safetensors: process 1 reads other numbers in it"
    ):
        weights.load(world / "small", shardings=where)
    assert said == [own]
