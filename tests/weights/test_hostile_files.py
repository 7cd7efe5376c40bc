"""Files that are damaged or made to do harm: a message that names them, or the right numbers.

Memory is measured, as none may take more than its size on disk explains.
"""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cir_jax.errors import WeightsError
from cir_jax.weights import files, torch_archives, torch_files
from tests.weights.hostile import (
    LITTLE,
    MB,
    SIX,
    archive,
    doubled,
    memory,
    read_all,
    state,
    tensor,
    text,
)

# --- PyTorch archives that declare more than they hold


def views(count, values=MB):
    """Tensors that share one storage."""
    return {f"x{i}": tensor(values, (values,), (1,)) for i in range(count)}


MEGABYTES = {"0": bytes(4 * MB)}
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
    "unknown": (b"\x80\x02(" + text("thing") + b"NNNNtQ.", {}, "unknown reference to 'thing'"),
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
