"""Progress: a bar on a terminal, a few lines in a log."""

import itertools
import re
from pathlib import Path

import pytest

import cir_jax
import data
from cir_jax import progress
from cir_jax.progress import Progress


@pytest.fixture
def seconds(monkeypatch):
    """Eleven pass between two looks at the clock; nobody watches."""
    clock = itertools.count(0.0, 11.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)


def test_where_nobody_watches_there_is_a_line_now_and_then(seconds, capsys):
    with Progress(total=70, initial=10, desc="images", unit="image", mininterval=0) as bar:
        for _ in range(6):
            bar.update(10)
    lines = capsys.readouterr().err.splitlines()
    said = [line.partition(" [")[0] for line in lines]
    assert said == ["images: 30/70", "images: 60/70", "images: 70/70"]
    assert all("image/s" in line and "\r" not in line for line in lines)


def test_the_end_is_said_once(seconds, capsys):
    assert list(data.progress(iter("abcdefgh"), 8, "letters")) == list("abcdefgh")
    assert capsys.readouterr().err == ""  # it took no time
    with Progress(total=2, desc="letters", mininterval=0) as bar:
        bar.update(0)
        bar.update(2)  # as late as the end of all
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("letters: 2/2 [")


def test_someone_who_watches_sees_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(Progress("abc", desc="letters")) == list("abc")
    assert re.search(r"\rletters: 100%\|.*\| 3/3 \[", capsys.readouterr().err)


def test_who_is_not_to_be_told_is_not(seconds, capsys):
    assert list(Progress(range(99), disable=True, mininterval=0)) == list(range(99))
    assert capsys.readouterr().err == ""


def test_nothing_else_draws_a_bar():
    """Each in the way of tqdm fills a job's log."""
    for package in (cir_jax, data):
        for file in Path(package.__file__).parent.rglob("*.py"):
            if file.name != "progress.py":
                assert not re.search(r"^\s*(from|import) tqdm", file.read_text(), re.M), file
