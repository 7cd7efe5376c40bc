"""kill -9 while a folder is indexed: what was kept stays, and the end is the same."""

import random
import sqlite3
import sys
import time

import numpy as np
import pytest

from cir_jax.library import Library
from cir_jax.library.library import Busy
from tests.launch import forks
from tests.launch.binaries import environment
from tests.library.folders import fill
from tests.library.killed import BATCH, searcher

pytestmark = pytest.mark.slow
PHOTOS, KILLS = 80, 20


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "photos", PHOTOS)


@pytest.fixture
def start(tmp_path, folder):
    """Starts to index; returns when it has begun."""

    def begin(store, log, seconds=0.01):
        log.unlink(missing_ok=True)
        command = [sys.executable, "tests/library/killed.py", folder, store, log, seconds]
        output = tmp_path / "output"
        process = forks.Fork(list(map(str, command)), env=environment(tmp_path), log=output)
        while not log.exists():
            assert process.poll() is None, output.read_text()
            time.sleep(0.001)
        return process

    return begin


def vectors(store):
    """Name -> the bytes of its vector and its norm."""
    db = sqlite3.connect(store)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    query = "SELECT path, vector, norm FROM photos JOIN vectors_1 ON photo = photos.id"
    found = {path.decode(): (vector, norm) for path, vector, norm in db.execute(query)}
    assert db.execute("SELECT count(*) FROM photos").fetchone()[0] == len(found)
    db.close()
    return found


def test_kills_lose_at_most_a_batch_each(start, tmp_path):
    whole = tmp_path / "whole.sqlite"
    assert start(whole, tmp_path / "whole.log").wait(60) == 0
    expected = vectors(whole)
    assert len(expected) == PHOTOS
    draw = random.Random(0)
    store, log, kills, seen = tmp_path / "s.sqlite", tmp_path / "log", 0, set()
    while kills < KILLS:
        process = start(store, log)
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        status = process.wait(60)
        said = set(log.read_text().split())
        kept = vectors(store) if said else {}
        assert said <= set(kept)
        assert not said & seen  # what was kept is not computed again
        seen |= said
        assert len(set(kept) - seen) <= BATCH  # killed between keeping a batch and saying so
        seen |= set(kept)
        kills += status != 0
        if len(kept) == PHOTOS:
            same(kept, expected)
            for file in tmp_path.glob("s.sqlite*"):
                file.unlink()
            seen = set()
    assert start(store, log).wait(60) == 0
    same(vectors(store), expected)


def same(found, expected):
    """To half precision's last bit: other batches may be other programs."""
    assert found.keys() == expected.keys()
    for name, (vector, norm) in found.items():
        theirs, their_norm = expected[name]
        np.testing.assert_allclose(norm, their_norm, rtol=1e-5)
        ours, theirs = (np.frombuffer(x, "<f2").astype(np.float32) for x in (vector, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=2**-14, err_msg=name)


def test_a_search_while_another_process_indexes(start, folder, tmp_path):
    """Each finds the photos that were kept when it was asked."""
    store, log = tmp_path / "s.sqlite", tmp_path / "log"
    late = sorted(folder.iterdir())[BATCH:]
    for path in late:
        path.rename(tmp_path / path.name)
    with Library(folder, searcher(), store=store) as library:
        library.update()
        found = [len(library.search(text="red", k=PHOTOS))]  # compiled
        for path in late:
            (tmp_path / path.name).rename(path)
        process = start(store, log, seconds=0.05)
        with pytest.raises(Busy, match="another process is indexing it"):
            library.update()
        while process.poll() is None:
            found.append(len(library.search(text="red", k=PHOTOS)))
            time.sleep(0.02)
        assert process.wait(60) == 0
        found.append(len(library.search(text="red", k=PHOTOS)))
    assert found == sorted(found) and found[0] == BATCH and found[-1] == PHOTOS
    assert len(set(found)) > 2 and not {n % BATCH for n in found} - {0}
