"""Records made by processes: the same bytes as made by threads, whoever is killed."""

import os
import signal

import pytest

from cir_jax.errors import DataError
from data import build, processes, shards
from tests.data.corpora import jpeg

COUNT = 40


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Builds the same pairs with so many processes: {file of the table: its bytes}."""
    (source := tmp_path / "source").mkdir()
    for i in range(COUNT):
        (source / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [f"{i}.jpg\tnumber {i}" for i in range(COUNT)]
    (source / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    monkeypatch.setattr(shards, "SHARD_BYTES", 8 * len(jpeg()))

    def prepare(number, into):
        monkeypatch.setattr(processes, "count", lambda records: number)
        folders = build.prepare("pairs", None, tmp_path / into, source=source, name="own")
        return {f.name: f.read_bytes() for f in folders["captions"].iterdir()}

    prepare.source, prepare.folder = source, lambda into: tmp_path / into / "own" / "captions"
    return prepare


def test_shards_do_not_depend_on_who_made_the_records(prepare, monkeypatch):
    expected = prepare(0, "threads")
    assert sum(".array_record-" in name for name in expected) > 3
    # a build that processes begin, and threads end after an interruption
    add, left = shards._Journal.add, [2]

    def stopping(self, *shard):
        add(self, *shard)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards._Journal, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(2, "resumed")
    assert shards.finished_shards(prepare.folder("resumed") / ".building") == 2
    assert not processes.multiprocessing.active_children()
    assert prepare(0, "resumed") == expected


def test_what_a_process_finds_or_what_ends_it_is_told(prepare, monkeypatch):
    image = prepare.source / "30.jpg"
    image.write_bytes(jpeg(30)[:200])
    with pytest.raises(DataError, match="line 32: image is no readable image.*--allow_partial"):
        prepare(1, "damaged")
    assert shards.finished_shards(prepare.folder("damaged") / ".building") > 1  # those before it
    image.write_bytes(jpeg(30))

    def killing(self, *shard):
        (process,) = processes.multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(shards._Journal, "add", killing)
    with pytest.raises(DataError, match="a process that reads images was killed.*finished shards"):
        prepare(1, "killed")


def test_processes_are_started_where_they_are_worth_it(monkeypatch):
    for cores, records, expected in (
        (2, 10**6, 0), (4, 10**6, 3), (64, 10**6, 16), (64, 100, 0), (64, None, 0),
    ):  # fmt: skip
        monkeypatch.setattr(processes, "cores", lambda cores=cores: cores)
        assert processes.count(records) == expected
