"""Pickles of Flax's bytes: read as Flax writes them, and nothing of them is run."""

import os
import pickle

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from cir_jax.errors import WeightsError
from cir_jax.weights import flax_files
from tests.weights.hostile import MB, memory

TREE = {
    "params": {
        "scale": jnp.float32(2.5),
        "layer": {
            "kernel": jnp.arange(6.0).reshape(2, 3),
            "half": jnp.ones((2, 0, 3), jnp.bfloat16),
            "number": np.float32(3),
        },
    }
}


def stored(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_what_flax_writes_is_read(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(flax.serialization.to_bytes(TREE), protocol))
    found = flax_files.read(path)
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == {
        "params/scale": ((), "float32"),
        "params/layer/kernel": ((2, 3), "float32"),
        "params/layer/half": ((2, 0, 3), "bfloat16"),
        "params/layer/number": ((), "float32"),
    }
    np.testing.assert_array_equal(found["params/layer/kernel"], np.arange(6).reshape(2, 3))
    assert found["params/scale"] == 2.5 and found["params/layer/number"] == 3


def test_what_is_written_flax_reads(tmp_path):
    arrays = {"params/a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "params/c": np.float32(1)}
    flax_files.write(tmp_path / "x.pkl", arrays)
    with (tmp_path / "x.pkl").open("rb") as file:  # as the released code does
        target = {"params": {"a": {"b": np.zeros((2, 3))}, "c": np.zeros(())}}
        tree = flax.serialization.from_bytes(target, pickle.load(file))
    np.testing.assert_array_equal(tree["params"]["a"]["b"], arrays["params/a/b"])
    assert tree["params"]["c"] == 1
    again = flax_files.read(tmp_path / "x.pkl")
    assert all(np.array_equal(again[name], x) for name, x in arrays.items())


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def packed(shape, dtype="float32", numbers=b"\0" * 8, code=1):
    data = msgpack.packb((shape, dtype, numbers))
    return msgpack.packb({"x": msgpack.ExtType(code, data)})


BAD = {
    "harm": (Harm(), "it names posix.system"),
    "a tree": ({"params": {}}, "it holds dict, expected bytes"),
    "cut": (flax.serialization.to_bytes(TREE)[:-9], "not a pickle of Flax's bytes, or damaged"),
    "a number": (msgpack.packb(3), "its bytes are int, expected a tree"),
    "no arrays": (msgpack.packb({"params": {}}), "holds no arrays"),
    "a list": (msgpack.packb({"x": [1, 2]}), "x is list, expected an array"),
    "objects": (packed((1,), "object"), "an array of object, expected one of"),
    "more": (packed((2**40,)), r"an array of shape \(1099511627776,\), float32, of 8 bytes"),
    "negative": (packed((-1, -2)), r"an array of shape \(-1, -2\)"),
    "complex": (packed((1,), code=2), "an extension 2, expected arrays"),
    "deep": (b"\x81\xa1x" * 3000 + b"\xc0", "or damaged"),
    # each level declares as many entries as the file has bytes
    "declared": (b"\xdd\x00\x10\x00\x00" * 900 + bytes(MB), "or damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_in_words_and_take_no_memory(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[case]
    path = stored(tmp_path / "x.pkl", content)
    with memory(4 * path.stat().st_size + 4 * MB), pytest.raises(WeightsError, match=message):
        flax_files.read(path)
    assert not (tmp_path / "harmed").exists()


def test_files_of_another_kind_say_what_they_are(tmp_path):
    path = tmp_path / "x.pkl"
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1", "but a git-lfs pointer.*git lfs pull"),
        (b"<!doctype html><html>", "but an HTML page"),
        (b"PK\x03\x04" + bytes(40), "but a PyTorch archive. Give the file of the authors"),
        (b"", "but an empty file"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"x.pkl: not a pickle of Flax's bytes, {message}"):
            flax_files.read(path)
