"""Files of another kind, shards of another model, numbers that are none: all are named."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models import lora
from cir_jax.weights import convert, files, kinds, shards
from tests.weights import worlds
from tests.weights.hostile import LITTLE, SIX, archive, read_all, tensor

# --- files that are something else


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605247071\n"
OTHERS = [
    (LFS, "a git-lfs pointer. The repository was cloned without git-lfs: run `git lfs install"),
    (b"<!DOCTYPE html><html>", "an HTML page. The page about a file was downloaded"),
    (b"\n <html>", "an HTML page"),
    (b"", "an empty file. The download was cut off"),
    (b"Entry not found", "a text file that begins 'Entry not found'. Get the file itself: `hf dow"),
    (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
    (b"GGUF\x03\0\0\0", "a GGUF file"),
]


@pytest.mark.parametrize(("content", "message"), OTHERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files_that_are_something_else(tmp_path, content, message, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    expected = "a safetensors file" if suffix == ".safetensors" else "a PyTorch archive"
    with pytest.raises(WeightsError, match=f"x{suffix}: not {expected}, but {message}"):
        files.read_tensors(path)


def test_files_with_the_suffix_of_another_kind(tmp_path):
    save_file(LITTLE, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="bin: not a PyTorch .*rename it to model.safetensors"):
        files.read_tensors(tmp_path / "pytorch_model.bin")
    archive(tmp_path / "model.safetensors", {"x": tensor(6, (6,), (1,))}, SIX)
    with pytest.raises(WeightsError, match="not a safetensors .*rename it to pytorch_model.bin"):
        files.read_tensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert list(files.read_tensors(tmp_path / "pytorch_model.bin")) == ["x"]


def test_no_file_and_a_directory(tmp_path):
    (tmp_path / "d.pt").mkdir()
    for name in ("d.pt", "none.pt", "none.safetensors"):
        with pytest.raises(WeightsError, match=f"{name}: unreadable"):
            files.read_tensors(tmp_path / name)


# --- shards


@pytest.fixture
def sharded(tmp_path):
    """A directory of two shards, and a function that writes its index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    save_file({"a": LITTLE["a.weight"]}, folder / "1.safetensors")
    save_file({"b": LITTLE["b"]}, folder / "2.safetensors")

    def index(content):
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder

    return index


GOOD = {"a": "1.safetensors", "b": "2.safetensors"}


def test_shards_are_joined_lazily(sharded):
    folder = sharded({"weight_map": GOOD})
    assert read_all(folder, lambda path: files.find(path).tensors()).keys() == GOOD.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a 'weight_map' .* found no such field"),
        ({"weight_map": {}}, "expected a 'weight_map' .* found {}"),
        ({"weight_map": ["1.safetensors"]}, "expected a 'weight_map'"),
        ([], "expected a JSON object, found a list"),
        ({"weight_map": GOOD | {"a": 1}}, "a lies in 1, expected the plain name"),
        ({"weight_map": GOOD | {"a": None}}, "a lies in None, expected the plain name"),
        ({"weight_map": GOOD | {"a": "../x.safetensors"}}, "a lies in '../x.safetensors'"),
        ({"weight_map": GOOD | {"a": "/etc/passwd"}}, "a lies in '/etc/passwd'"),
        ({"weight_map": GOOD | {"a": "sub/1.safetensors"}}, "a lies in 'sub/1.safetensors'"),
        ({"weight_map": GOOD | {"a": "..\\1.safetensors"}}, "a lies in "),
        ({"weight_map": GOOD | {"a": ".."}}, "a lies in '..'"),
        ({"weight_map": GOOD | {"a": ""}}, "a lies in ''"),
        ({"weight_map": GOOD | {"c": "3.safetensors"}}, "missing shards: 3.safetensors"),
    ],
)
def test_malformed_maps(sharded, content, message):
    folder = sharded(content)
    with pytest.raises(WeightsError, match=f"model.safetensors.index.json: {message}"):
        files.find(folder).tensors()


def test_maps_of_other_shards(sharded):
    folder = sharded({"weight_map": GOOD | {"c": "2.safetensors"}})
    with pytest.raises(
        WeightsError, match="2.safetensors: c is not in it, as model.safetensors.in"
    ):
        files.find(folder).tensors()
    sharded({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}})
    with pytest.raises(WeightsError, match="1.safetensors: b is not in it"):
        files.find(folder).tensors()
    sharded({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}})
    with pytest.raises(
        WeightsError, match="index.json: a lies in 1.safetensors, but .* 2.safetens"
    ):
        files.find(folder).tensors()
    save_file({"a": LITTLE["b"], "b": LITTLE["b"]}, folder / "2.safetensors")
    sharded({"weight_map": GOOD})
    with pytest.raises(
        WeightsError, match="index.json: a lies in 2.safetensors, but .* 1.safetens"
    ):
        files.find(folder).tensors()


def test_links_of_shards(sharded, tmp_path):
    folder = sharded({"weight_map": GOOD})
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (folder / "1.safetensors").rename(outside / "1.safetensors")
    (folder / "1.safetensors").symlink_to(outside / "1.safetensors")
    with pytest.raises(
        WeightsError, match="1.safetensors: a link out of its directory, to .*elsew"
    ):
        files.find(folder).tensors()
    (folder / "1.safetensors").unlink()
    (folder / "1.safetensors").symlink_to("2.safetensors")
    assert shards.check_inside(folder / "1.safetensors")


def test_links_of_the_hubs_cache(sharded, tmp_path):
    """Snapshots are links into ../../blobs of the same model, and of no other."""
    folder = sharded({"weight_map": GOOD})
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    linked = tmp_path / "cache" / snapshot.relative_to(tmp_path / "hub")
    for path in (snapshot, linked):
        assert read_all(path, lambda path: files.find(path).tensors()).keys() == GOOD.keys()
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (blobs / "0").rename(other / "0")
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to(other / "0")
    with pytest.raises(WeightsError, match="1.safetensors: a link out of its directory"):
        files.find(snapshot).tensors()


# --- numbers


def ours(array, dtype=None, more=(), ignore=()):
    tensors = {"x.weight": array} | {name: np.ones(1) for name in more}
    table = convert.Names({"x.weight": (("x",), "same")})
    return convert.to_ours(tensors, table, what="DIR/x.pt", dtype=dtype, ignore=ignore)["x"]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_short_floats_in_both_formats(tmp_path, kind):
    """fp8 becomes float32, as nothing computes in it; others stay unless a type is asked for."""
    exact = np.array([[1.5, -0.25, 0.0], [448, 2**-6, -1]], np.float32)
    stored = exact.astype(getattr(ml_dtypes, kind, kind))
    dtype = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}.get(kind)
    path = tmp_path / "x.safetensors"
    if dtype:  # the library writes none of them
        about = {"dtype": dtype, "shape": [2, 3], "data_offsets": [4, 10]}
        first = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = json.dumps({"first": first, "x.weight": about}).encode()
        data = struct.pack("<Q", len(header)) + header + bytes(4) + stored.tobytes()
        path.write_bytes(data)
    else:
        save_file({"x.weight": stored}, path)
    got = files.read_tensors(path)["x.weight"]
    assert got.dtype == stored.dtype
    np.testing.assert_array_equal(got.astype(np.float32), stored.astype(np.float32))
    as_stored = ours(got)
    assert as_stored.dtype == (np.float32 if dtype else stored.dtype)
    np.testing.assert_array_equal(ours(got, np.float32), stored.astype(np.float32))


@pytest.mark.parametrize(
    "scale",
    ["x.weight_scale_inv", "x.weight_scale", "x.scale_weight", "x.SCB", "x.weight.absmax",
     "x.weight.quant_state.bitsandbytes__nf4", "x.qweight", "scaled_fp8", "x.input_scale"],
)  # fmt: skip
def test_quantised_weights_are_refused(scale):
    with pytest.raises(WeightsError, match=f"DIR/x.pt: quantised weights, as {scale} says"):
        ours(np.ones(3, ml_dtypes.float8_e4m3fn), more=[scale])
    assert ours(np.ones(3, np.float32), more=["logit_scale"], ignore=["logit_scale"]).size == 3


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_, np.complex64])
def test_weights_of_other_types_are_refused(dtype):
    with pytest.raises(WeightsError, match=f"x.weight is of type {np.dtype(dtype)}, expected floa"):
        ours(np.ones(3, dtype), np.float32)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
)
def test_nan_and_infinity_are_refused(dtype):
    array = np.ones((2, 3), dtype)
    array[0, 0], array[1, 2] = np.inf, -np.inf
    why = "Numbers above 65504 overflow in float16" if dtype is np.float16 else ""
    with pytest.raises(WeightsError, match=f"DIR/x.pt: x.weight holds 2 of 6 values that.*{why}"):
        ours(array, np.float32)
    array[:] = np.nan
    with pytest.raises(WeightsError, match="holds 6 of 6 values that are NaN or infinite"):
        ours(array)


def test_large_numbers_are_no_infinity():
    """Their sum overflows, they do not; unless the type that is asked for is too small."""
    largest = np.full(9, np.finfo(np.float32).max)
    assert ours(largest)[0] == largest[0]
    assert ours(np.full(9, 65504, np.float16))[0] == 65504
    assert ours(np.full((0, 3), 1, np.float32)).shape == (0, 3)
    with pytest.raises(
        WeightsError, match="DIR/x.pt as float16: x.weight holds 9 of 9 values .*65"
    ):
        ours(largest, np.float16)
    with pytest.raises(WeightsError, match="DIR/x.pt as float32: x.weight holds 1 of 2"):
        ours(np.array([1e300, 1]), np.float32)
    assert ours(np.array([1e300, 1])).dtype == np.float64
    with pytest.raises(WeightsError, match="as bfloat16: x.weight holds 9 of 9"):
        ours(largest, jnp.bfloat16)
    assert ours(largest / 2, jnp.bfloat16).dtype == jnp.bfloat16


# --- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', "not valid JSON .*Download or copy it again"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found a NoneType"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a":' * 100_000, "not valid JSON .maximum recursion"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b" " * (files._JSON + 1), "more than 16777216 bytes"),
        (b"", "not a JSON file, but an empty file"),
        (LFS, "not a JSON file, but a git-lfs pointer"),
        (b"<html>", "not a JSON file, but an HTML page"),
    ],
)
def test_configs_that_are_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"config.json: .*{message}"):
        files.read_json(path)


def test_configs_that_are_not_there(tmp_path):
    with pytest.raises(WeightsError, match="config.json is missing: it belongs to the weights"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(WeightsError, match="config.json: unreadable .Is a directory.*Copy it from"):
        files.read_json(tmp_path / "config.json")


def test_harmless_oddities_of_published_configs(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": {"b": "\xc3\xa9"}}\r\n')
    assert files.read_json(path) == {"a": {"b": "é"}}


# --- from end to end


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "clip"
    weights.save(path, *worlds.make())
    return path


def test_a_clip_that_is_damaged(published, tmp_path):
    tensors = files.read_tensors(published / "model.safetensors")
    tensors = {name: np.array(tensors[name]) for name in tensors}
    content = (published / "model.safetensors").read_bytes()
    name = "text_model.final_layer_norm.bias"
    try:
        (published / "model.safetensors").write_bytes(LFS)
        with pytest.raises(
            WeightsError, match="model.safetensors: not a safetensors file, but a g"
        ):
            weights.load(published)
        tensors[name][0] = np.nan
        save_file(tensors, published / "model.safetensors")
        with pytest.raises(WeightsError, match=f"model.safetensors: {name} holds 1 of 64 values"):
            weights.load(published)
        tensors[name] = np.ones(64, np.int8)
        save_file(tensors, published / "model.safetensors")
        with pytest.raises(WeightsError, match=f"model.safetensors: {name} is of type int8"):
            weights.load(published)
    finally:
        (published / "model.safetensors").write_bytes(content)
    assert kinds.of(published / "model.safetensors") == kinds.SAFETENSORS


def test_an_adapter_with_nan(tmp_path):
    backbone, params = worlds.make()
    config = lora.LoraConfig(r"text/.*/query/kernel", 2)
    adapter = lora.init(jax.random.key(0), params, config.pattern, config.rank)
    weights.save_adapter(tmp_path / "adapter", adapter, config, backbone)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = read_all(path, files.read_tensors)
    name = min(tensors)
    tensors[name][0] = np.inf
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=f"adapter: {name} holds 64 of 128 values that are NaN"):
        weights.load_adapter(tmp_path / "adapter", backbone)
