"""Files that stay open between reads, of many threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cir_jax.storage import kept_open
from cir_jax.storage.kept_open import KeptOpen


def test_two_that_open_one_file_at_once_have_the_same(tmp_path):
    both, opened = threading.Barrier(2), []

    def slowly(number):
        both.wait(timeout=30)  # neither knows of the other's
        opened.append(number)
        return object()

    files = KeptOpen(slowly)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(files.get, (7, 7))
    assert opened == [7, 7] and one is two is files.get(7)


def test_those_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(kept_open, "OPEN", 2)
    opened = []
    files = KeptOpen(lambda number: opened.append(number) or number)
    for number in (0, 1, 0, 2, 0, 1):
        assert files.get(number) == number and len(files) <= 2
    assert opened == [0, 1, 2, 1]


def test_what_cannot_be_opened_is_not_kept():
    def fails(number):
        raise FileNotFoundError(number)

    files = KeptOpen(fails)
    with pytest.raises(FileNotFoundError):
        files.get(3)
    assert not len(files)
