"""Files that are damaged, made to do harm, or not what they seem: a message that names them.

Memory is measured, as none may take more than its size on disk explains.
"""

import contextlib
import json
import pickle
import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models import lora
from cir_jax.weights import convert, files, kinds, shards, torch_archives, torch_files
from tests.weights import worlds

MB = 2**20
LITTLE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def piece(value):
    """The opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(count, shape, strides, offset=0, key="0", kind="FloatStorage"):
    """The opcodes of a tensor, as `torch.save` writes it."""
    about = piece("storage") + f"ctorch\n{kind}\n".encode() + piece(key) + piece("cpu")
    storage = b"(" + about + piece(count) + b"tQ"
    where = piece(offset) + piece(shape) + piece(strides) + piece(False) + b"}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + where + b"tR"


def text(value):
    """The opcodes of a string that is not to be remembered."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubled(i):
    """A dictionary of the i-th dictionary, twice: two to the power of i paths."""
    last = b"h" + bytes([i])
    return b"}q" + bytes([i + 1]) + b"(" + text("a") + last + text("b") + last + b"u"


def state(tensors):
    return b"\x80\x02}(" + b"".join(piece(name) + data for name, data in tensors.items()) + b"u."


def archive(path, tensors, storages, compress=zipfile.ZIP_STORED):
    """A zip archive in PyTorch's layout; tensors: their opcodes by name, or the whole pickle."""
    data = tensors if isinstance(tensors, bytes) else state(tensors)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"model/data/{key}", content, compress)
    return path


@contextlib.contextmanager
def memory(limit):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes"


def read_all(path, read=torch_files.read):
    tensors = read(path)
    return {name: np.asarray(tensors[name]) for name in tensors}


# --- PyTorch archives that declare more than they hold


def views(count, values=MB):
    """Tensors that share one storage."""
    return {f"x{i}": tensor(values, (values,), (1,)) for i in range(count)}


MEGABYTES = {"0": bytes(4 * MB)}
SIX = {"0": bytes(24)}
DECLARED = {
    "a bomb": ({"x": tensor(2**24, (2**24,), (1,))}, {"0": bytes(2**26)}, "data/0 is compressed"),
    "more": ({"x": tensor(2**31, (2,), (1,))}, SIX, "declared as 8589934592 bytes, but has 24"),
    "fewer": ({"x": tensor(1, (1,), (1,))}, SIX, "declared as 4 bytes, but has 24"),
    "absent": ({"x": tensor(6, (6,), (1,), key="1")}, SIX, "model/data/1 is missing. Download or"),
    "repeated": (
        {"x": tensor(6, (10**5, 10**5), (0, 0))},
        SIX,
        "would take 40000000000 bytes, more than 4 times .* x, .100000, 100000.. Views that repeat",
    ),
    "shared": (views(6), MEGABYTES, "would take 25165824 bytes, more than 4 times the file's 41"),
    "outside": ({"x": tensor(6, (2, 2), (5, 1))}, SIX, r"shape \(2, 2\) reaches out of"),
    "offset": ({"x": tensor(6, (2,), (1,), 5)}, SIX, r"shape \(2,\) reaches out of"),
    "negative": ({"x": tensor(6, (2,), (-1,), 5)}, SIX, r"strides \(-1,\)"),
    "overflow": ({"x": tensor(6, (2,), (2**62,))}, SIX, "reaches out of its storage"),
    "no numbers": ({"x": tensor(6, ("2",), (1,))}, SIX, r"shape \('2',\)"),
    "axes": ({"x": tensor(6, (1,) * 40, (1,) * 40)}, SIX, "40 axes"),
    "strides": ({"x": tensor(6, (1, 1), (1,))}, SIX, "2 axes, 1 strides"),
    "elements": ({"x": tensor("6", (6,), (1,))}, SIX, "a storage of '6' elements"),
    "itself": (b"\x80\x02}q\x00" + text("x") + b"h\x00s.", {}, "more than 100 levels"),
    "wide": (b"\x80\x02}q\x00" + b"".join(map(doubled, range(30))) + b".", {}, "1000 entries"),
    "long": (state({"a" * 2000: tensor(6, (6,), (1,))}), SIX, "1000 characters of a name"),
    "eight bytes": (b"\x8d" + struct.pack("<Q", 2**33), {}, "not a readable PyTorch file .*expec"),
    "unknown": (b"\x80\x02(" + piece("thing") + b"NNNNtQ.", {}, "unknown reference to 'thing'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
def test_what_an_archive_declares_takes_no_memory(tmp_path, monkeypatch, case):
    monkeypatch.setattr(torch_files, "_NODES", 1000)
    tensors, storages, message = DECLARED[case]
    method = zipfile.ZIP_DEFLATED if case == "a bomb" else zipfile.ZIP_STORED
    path = archive(tmp_path / "x.pt", tensors, storages, method)
    storages = None
    with memory(path.stat().st_size * torch_files.VIEWS + 4 * MB):
        with pytest.raises(WeightsError, match=f"x.pt: .*{message}"):
            read_all(path)


def test_tied_weights_and_small_repetitions_are_read(tmp_path):
    tensors = views(4, MB // 4) | {"ones": tensor(MB // 4, (100, 10), (0, 0), 1)}
    path = archive(tmp_path / "x.pt", tensors, {"0": np.arange(MB // 4, dtype="<f4").tobytes()})
    with memory(16 * MB):
        got = read_all(path)
    assert got["x3"][-1] == MB // 4 - 1
    np.testing.assert_array_equal(got["ones"], np.ones((100, 10)))


def test_a_pickle_larger_than_any_state_dict(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_archives, "PICKLE", 100)
    path = archive(tmp_path / "x.pt", {"a" * 100: tensor(6, (6,), (1,))}, SIX)
    with pytest.raises(WeightsError, match="x.pt: model/data.pkl has .* more than 100. Save the w"):
        torch_files.read(path)


def test_members_that_lie_on_top_of_each_other(tmp_path):
    path = tmp_path / "x.pt"
    names = range(1, 40)
    with zipfile.ZipFile(path, "w") as file:
        pickled = {f"x{i}": tensor(MB // 4, (MB // 4,), (1,), key=str(i)) for i in (0, *names)}
        file.writestr("model/data.pkl", state(pickled))
        file.writestr("model/data/0", bytes(MB))
        for i in names:
            info = zipfile.ZipInfo("model/data/0")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(info, field, getattr(file.getinfo("model/data/0"), field))
            info.filename = f"model/data/{i}"
            file.filelist.append(info)
    with pytest.raises(WeightsError, match="x.pt: its tensors declare 41943040 bytes, but the fi"):
        torch_files.read(path)


def test_two_members_of_one_name_and_two_models(tmp_path):
    path = tmp_path / "x.pt"
    archive(path, {"x": tensor(6, (6,), (1,))}, SIX)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("model/data/0", bytes(24))
    with pytest.raises(WeightsError, match="x.pt: two members have one name. Save the weights"):
        torch_files.read(path)
    archive(path, {"x": tensor(6, (6,), (1,))}, SIX)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", state({}))
    with pytest.raises(WeightsError, match="x.pt: several models in one archive: model/data.pkl,"):
        torch_files.read(path)


def test_an_encrypted_member(tmp_path):
    path = archive(tmp_path / "x.pt", {"x": tensor(6, (6,), (1,))}, SIX)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="x.pt: x: model/data/0 cannot be read .*encrypted"):
        read_all(path)


def test_an_archive_whose_directory_lies(tmp_path):
    path = archive(tmp_path / "x.pt", {"x": tensor(60, (60,), (1,))}, SIX)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    for sizes, message in (
        ((24, 240), "model/data/0 has 24 bytes of 240"),
        ((240, 240), "x: model/data/0 cannot be read"),
        ((2**31, 2**31), "its tensors declare 2147483648 bytes, but the file has"),
    ):
        struct.pack_into("<II", data, at + 20, *sizes)
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=f"x.pt: {message}"), memory(4 * MB):
            read_all(path)


def test_numbers_written_by_a_big_endian_machine(tmp_path):
    tensors = {
        "f4": tensor(3, (3,), (1,), key="0"),
        "bf": tensor(3, (3,), (1,), key="1", kind="BFloat16Storage"),
        "c8": tensor(3, (3,), (1,), key="2", kind="ComplexFloatStorage"),
    }
    values = np.array([1, 2.5, -3])
    bf16 = values.astype(ml_dtypes.bfloat16)
    storages = {"0": values.astype(">f4"), "1": bf16.byteswap(), "2": values.astype(">c8")}
    path = archive(tmp_path / "x.pt", tensors, {k: v.tobytes() for k, v in storages.items()})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model/byteorder", "big")
    got = read_all(path)
    assert [array.dtype.name for array in got.values()] == ["float32", "bfloat16", "complex64"]
    for array in got.values():
        np.testing.assert_array_equal(array.astype(complex), values)


def old_file(path, tensors, keys=("0",), count=6, data=bytes(24), version=1001, little=True):
    """A file in the layout of PyTorch before 1.6."""
    parts = [0x1950A86A20F9469CFC6C, version, {"little_endian": little}]
    pickles = b"".join(pickle.dumps(part, 2) for part in parts)
    pickles += state(tensors) + pickle.dumps(list(keys), 2)
    path.write_bytes(pickles + count.to_bytes(8, "little" if little else "big") + data)
    return path


GOOD_OLD = {"x": tensor(6, (6,), (1,))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2**40}, "declared as 24 bytes, but says 4398046511104, and ends at"),
        ({"data": bytes(23)}, "declared as 24 bytes, but says 24, and ends at .* of "),
        ({"data": bytes(25)}, "bytes; its tensors end at .*Download or copy it again"),
        ({"keys": ["1"]}, "storage 0 is missing"),
        ({"keys": ["0", "1"], "data": bytes(32)}, "storage 1 is declared as 0 bytes"),
        ({"keys": [1]}, "no list of tensor storages"),
        ({"version": 1000}, "unknown version 1000 of old PyTorch files"),
        ({"tensors": {"x": tensor(2**40, (6,), (1,))}}, "declared as 4398046511104 bytes, but"),
        (
            {"tensors": {"x": tensor(6, (6,), (1,)), "y": tensor(5, (5,), (1,))}},
            "storage 0 has two sizes",
        ),
        ({"tensors": {"x": tensor(6, (6,), (1,), kind="QInt8Storage")}}, "tensors of QInt8Storage"),
        ({"tensors": {"x": tensor(6, (10**5, 10**5), (0, 0))}}, "would take 40000000000 bytes"),
        ({"tensors": {"x" * 2000: tensor(6, (6,), (1,))}}, "1000 characters of a name"),
    ],
)
def test_what_an_old_file_declares_takes_no_memory(tmp_path, change, message):
    path = old_file(tmp_path / "x.pth", **{"tensors": GOOD_OLD} | change)
    with pytest.raises(WeightsError, match=f"x.pth: .*{message}"), memory(4 * MB):
        read_all(path)


def test_an_old_file_of_a_big_endian_machine(tmp_path):
    values = np.arange(6, dtype=">f4")
    path = old_file(tmp_path / "x.pth", GOOD_OLD, data=values.tobytes(), little=False)
    np.testing.assert_array_equal(read_all(path)["x"], np.arange(6))


# --- damage


def damaged(data, every):
    """Each n-th byte changed, and the file cut off at some places."""
    for at in range(0, len(data), every):
        for bits in (0xFF, 1):
            yield data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]
    for at in range(0, len(data), every * 7):
        yield data[:at]


def outcome(path, read):
    try:
        got = read_all(path, read)
    except WeightsError as error:
        assert path.name in str(error) and "weights_only" not in str(error)
        return "error"
    same = got.keys() == LITTLE.keys() and all(
        got[name].dtype == LITTLE[name].dtype and np.array_equal(got[name], LITTLE[name])
        for name in LITTLE
    )
    return "same" if same else "other"


@pytest.mark.peer
def test_a_damaged_archive_gives_the_same_numbers_or_an_error(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({name: torch.from_numpy(array) for name, array in LITTLE.items()}, path)
    outcomes = []
    for data in damaged(path.read_bytes(), 7):
        path.write_bytes(data)
        outcomes.append(outcome(path, torch_files.read))
    assert set(outcomes) == {"same", "error"}  # padding may change
    assert outcomes.count("error") > 100


@pytest.mark.peer
def test_other_damaged_files_raise_nothing_else(tmp_path):
    """They have no checksums, so other numbers cannot be told apart, but nothing else happens."""
    torch = pytest.importorskip("torch")
    old, new = tmp_path / "x.pt", tmp_path / "x.safetensors"
    tensors = {name: torch.from_numpy(array) for name, array in LITTLE.items()}
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    save_file(LITTLE, new)
    for path, read in ((old, torch_files.read), (new, files.read_tensors)):
        outcomes = []
        for data in damaged(path.read_bytes(), 3):
            path.write_bytes(data)
            outcomes.append(outcome(path, read))
        assert outcomes.count("error") > len(outcomes) / 2


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": ', "unreadable .*Download or copy it again"),
        (b"{" * 3000, "unreadable"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "unreadable"),
        (b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 8]}}', "unreadable"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            "unreadable",
        ),
        (b'{"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}', "a: unreadable|unread"),
        (b'{"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}', "unreadable"),
    ],
)
def test_safetensors_with_a_wrong_header(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match=f"x.safetensors: {message}"), memory(4 * MB):
        read_all(path, files.read_tensors)
    path.write_bytes(struct.pack("<Q", 2**40) + header + bytes(8))
    with pytest.raises(WeightsError, match="x.safetensors: unreadable"), memory(4 * MB):
        read_all(path, files.read_tensors)


# --- what PyTorch saves


@pytest.mark.peer
def test_tensors_that_are_no_arrays_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    plain = torch.ones(3)
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "negated": torch.complex(plain, plain).conj().imag,
        "nested": torch.nested.nested_tensor([plain, plain[:2]]),
    }
    path = tmp_path / "x.pt"
    for name, value in odd.items():
        torch.save({"plain": plain, name: value}, path)
        got = torch_files.read(path)
        np.testing.assert_array_equal(got["plain"], plain)
        with pytest.raises(WeightsError, match=f"x.pt: {name}: is .*expected a dense tensor"):
            got[name]


@pytest.mark.peer
@pytest.mark.parametrize("zipped", [True, False])
def test_types_and_protocols(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.0, -2.0, 0.5])
    types = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.uint16, torch.complex64]
    tensors = {str(kind): values.abs().to(kind) for kind in types}
    tensors["tagged"] = torch.nn.Parameter(values)
    tensors["tagged"].tag = values.clone()
    tensors["tagged"].tag.about = "x"
    tensors["view"] = torch.arange(10.0)[1::3]
    for protocol in (2, 3, 4, 5):
        path = tmp_path / "x.pth"
        torch.save(
            {"model": tensors, "epoch": 3, "time": slice(1, 2)}, path,
            pickle_protocol=protocol, _use_new_zipfile_serialization=zipped,
        )  # fmt: skip
        got = read_all(path)
        assert list(got) == list(tensors)
        for name, value in tensors.items():
            assert got[name].dtype.name == str(value.dtype).removeprefix("torch.")
            expected = value.detach().to(torch.complex64).numpy()
            np.testing.assert_array_equal(got[name].astype(np.complex64), expected)


@pytest.mark.peer
@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_not_its_weights(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model, path = torch.nn.Linear(2, 2), tmp_path / "x.pt"
    for content in (model, {"model": model, "epoch": 1}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            WeightsError, match=r"x.pt: holds a whole model \(Linear\), not its wei"
        ):
            torch_files.read(path)


@pytest.mark.peer
def test_without_checksums_damage_could_not_be_noticed(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(WeightsError, match="x.pt: .*cannot be read .*set_crc32_options.False., sa"):
        read_all(path)


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
