"""Digests notice every change; a disk that does not answer is no change."""

import errno
import os

import pytest

from cir_jax.errors import DataError
from cir_jax.storage import digests, faults


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "large").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "params" / "small").write_bytes(b"abc")
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "other").write_bytes(b"defg")
    (tmp_path / "top").write_bytes(b"!")
    (tmp_path / "empty").write_bytes(b"")
    digests.add(tmp_path)
    return tmp_path


def test_nothing_changed(folder):
    assert digests.damage(folder) == []
    (folder / "later").write_bytes(b"not of the checkpoint")
    assert digests.damage(folder) == []
    os.remove(folder / digests.NAME)
    assert digests.damage(folder) is None


def test_every_bit_of_small_files_and_of_the_digests_counts(folder):
    for name in ("params/small", "top", digests.NAME):
        file = folder / name
        content = file.read_bytes()
        for bit in range(0, 8 * len(content), 7 if name == digests.NAME else 1):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert [file for file, _ in digests.damage(folder)] == [name], bit
        file.write_bytes(content)
    assert digests.damage(folder) == []


def test_the_damage_is_named(folder):
    (folder / "params" / "small").write_bytes(b"abX")
    (folder / "params" / "d" / "large").write_bytes(b"cut")
    (folder / "top").unlink()
    (folder / "empty").write_bytes(b"filled")
    assert digests.damage(folder) == [
        ("params/d/large", "has 3 bytes instead of 10240"),
        ("params/small", "its content has changed"),
        ("top", "is missing"),
        ("empty", "has 6 bytes instead of 0"),
    ]
    (folder / digests.NAME).write_bytes(b"")
    assert digests.damage(folder)[0][0] == digests.NAME


def test_only_what_is_read_is_looked_at_and_shared(folder):
    (folder / "optimizer" / "other").write_bytes(b"XXXX")
    assert digests.damage(folder, below=("params",)) == []
    assert digests.damage(folder, below=("optimizer",)) != []
    parts = [digests.damage(folder, part=(i, 3)) for i in range(3)]
    assert sorted(map(len, parts)) == [0, 0, 1]
    (folder / "top").write_bytes(b"?")
    assert digests.damage(folder, below=("params",)) == [("top", "its content has changed")]


def test_known_digests_are_kept_and_new_files_added(folder):
    (folder / "top").write_bytes(b"X")
    (folder / "late").write_bytes(b"late")
    digests.add(folder, leave_out=("late",))
    assert digests.damage(folder) == [("top", "its content has changed")]
    before = (folder / digests.NAME).stat().st_ino
    digests.add(folder, leave_out=("late",))
    assert (folder / digests.NAME).stat().st_ino == before  # nothing to write
    digests.add(folder)
    (folder / "late").write_bytes(b"LATE")
    assert ("late", "its content has changed") in digests.damage(folder)


def test_an_error_of_the_disk_is_not_damage(folder, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(digests, "_digest", fails)
    with pytest.raises(OSError, match="Input/output"):
        digests.damage(folder)


def test_a_full_disk_leaves_the_digests_of_before(folder, monkeypatch):
    before = (folder / digests.NAME).read_bytes()
    (folder / "late").write_bytes(b"late")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="digests.json: cannot be written .No space left"):
            digests.add(folder)
    assert (folder / digests.NAME).read_bytes() == before
    assert not list(folder.glob(".*"))


def wrapped(inner, outer):
    try:
        raise outer from inner
    except type(outer) as error:
        return error


def test_what_the_system_said_is_found_behind_what_libraries_say():
    full = os.strerror(errno.ENOSPC)
    assert faults.reason(OSError(errno.ENOSPC, full)) == full
    text = ValueError(f"INTERNAL: Error writing 'x': [OS error 28: {full}]\nmany\nlines")
    assert faults.reason(text) == full == faults.cause(text)
    assert faults.reason(wrapped(text, RuntimeError("commit failed"))) == full
    assert faults.reason(ExceptionGroup("two", [KeyError("x"), text])) == full
    for other in (FileNotFoundError(errno.ENOENT, "No such file"), ValueError("cut off")):
        assert faults.reason(other) is None


def test_the_cause_is_one_line():
    error = wrapped(ValueError("\n\n  the cause\nmore"), RuntimeError("outer\n" * 700))
    assert faults.cause(error) == "the cause"
    assert faults.cause(KeyError()) == "KeyError"
    assert len(faults.cause(ValueError("x" * 9999))) == faults.LIMIT
