"""Tables that another process builds, beside those of this one."""

import subprocess
import sys
import time

import pytest

from cir_jax.input.tables import Table
from data import apart, build, claims
from data.shapes.shapes_dataset_builder import ShapesTiny

NEEDED = {"shapes_tiny": ["captions", "circo"]}


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found = []

    def start(*args, **options):
        found.append(popen(*args, **options))
        return found[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(apart.subprocess, "Popen", start)
    monkeypatch.setattr(ShapesTiny, "APART", ("captions", "triplets"))
    monkeypatch.setattr(build, "cores", lambda: 2)
    return found


def test_the_tables_are_the_same(started, tmp_path, monkeypatch, capsys):
    build.prepare_needed(NEEDED, data_dir=tmp_path / "two")
    assert [process.returncode for process in started] == [0]
    said = capsys.readouterr().err
    assert "building shapes_tiny/captions in another process meanwhile" in said
    assert "building shapes_tiny/captions in /" not in said
    build.prepare_needed(NEEDED, data_dir=tmp_path / "two")  # nothing is left to do
    monkeypatch.setattr(build, "cores", lambda: 1)
    build.prepare_needed(NEEDED, data_dir=tmp_path / "one")
    assert len(started) == 1
    one, two = (
        Table(tmp_path / name, "shapes_tiny", "captions", "train") for name in ("one", "two")
    )
    assert len(one) == len(two) == 256
    assert all(one[i]["image"] == two[i]["image"] for i in range(256))


def test_what_it_could_not_build_is_built_here(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    build.prepare_needed(NEEDED, data_dir=tmp_path)
    assert [process.returncode for process in started] == [1]
    assert "building shapes_tiny/captions in /" in capsys.readouterr().err
    assert claims.is_built(build.table_dir("shapes_tiny", "captions", tmp_path))


def test_it_is_stopped_where_this_one_fails(started, tmp_path):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), apart.building("shapes", ["pretrain"], tmp_path):
        raise KeyboardInterrupt
    assert started[0].returncode < 0 and time.monotonic() - began < 60
