"""Files and directories appear whole or not at all, whenever a signal comes."""

import os

import pytest

from cir_jax.storage.atomic import appearing, new_directory


def test_a_scratch_file_is_a_name_of_nothing_yet(tmp_path):
    with appearing(tmp_path / "a.json") as scratch:
        assert not list(tmp_path.iterdir())
        scratch.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "b.json") as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_directory_takes_the_place_of_the_old_one(whole, tmp_path):
    path = tmp_path / "export"
    path.mkdir()
    (path / "theirs").write_text("old")
    with new_directory(path, whole) as scratch:
        (scratch / "ours").write_text("new")
    assert {file.name for file in path.iterdir()} == ({"ours"} if whole else {"ours", "theirs"})
    assert [file.name for file in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(("renamed", "left"), [(1, "old"), (2, "new")])
def test_stopped_at_any_moment_there_is_the_old_one_or_the_new(
    renamed, left, tmp_path, monkeypatch
):
    """A signal comes after so many renames."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "it").write_text("old")
    replace, calls = os.replace, []

    def stopped(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) == renamed:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), new_directory(path, whole=True) as scratch:
        (scratch / "it").write_text("new")
    assert (path / "it").read_text() == left
    assert [file.name for file in tmp_path.iterdir()] == ["export"]
