"""Files, logs and leases in a bucket, which knows no rename, no append and no lock."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cir_jax.errors import CheckpointError, ConfigError, DataError
from cir_jax.storage import atomic, buckets, digests, faults, lease, locks, places
from cir_jax.training import logs, workdir
from tests.storage.bucket import Bucket, in_memory


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    with in_memory(monkeypatch):
        yield buckets.place("gs://bucket/run")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "SILENCE", 0.6)


def full(name):
    raise OSError(errno.EREMOTEIO, "Quota exceeded")


def test_a_place_is_a_path_of_this_machine_or_one_in_a_bucket(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    assert buckets.place("runs/a") == tmp_path / "runs" / "a"
    assert str(buckets.place("~/a")) == os.path.expanduser("~/a")
    assert str(bucket / "stage" / "x.json") == "gs://bucket/run/stage/x.json"
    assert buckets.place(bucket) == bucket and buckets.is_remote(bucket)


def test_addresses_that_nothing_can_be_read_from(monkeypatch):
    with pytest.raises(ConfigError, match="s4://bucket/x: unknown kind of address 's4'.*Valid: gs"):
        buckets.place("s4://bucket/x")
    with pytest.raises(ConfigError, match="gs:// names no bucket: gs://BUCKET/FOLDER"):
        buckets.place("gs://")
    monkeypatch.setattr(buckets, "CLIENTS", {"gs": "no_such_client"})
    with pytest.raises(ConfigError, match=r"no_such_client is not .*pip install 'cir_jax\[gs\]'"):
        buckets.place("gs://bucket/x")


def test_a_file_is_written_whole_or_not_at_all(bucket, monkeypatch):
    file = bucket / "deep" / "x.json"
    atomic.write_atomically(file, lambda out: out.write(b"old"))

    def half(out):
        out.write(b"ne")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        atomic.write_atomically(file, half)
    assert file.read_bytes() == b"old"
    monkeypatch.setattr(Bucket, "fails", full)
    with pytest.raises(DataError, match="x.json: cannot be written .Quota exceeded.. Free"):
        atomic.write_atomically(file, lambda out: out.write(b"new"))
    with pytest.raises(OSError, match="Quota exceeded"):
        atomic.check_writable(bucket)
    monkeypatch.setattr(Bucket, "fails", None)
    atomic.check_writable(bucket)
    assert list(buckets.files_below(bucket)) == ["deep/x.json"]


def test_what_a_client_raises_becomes_one_error_with_its_words(bucket, monkeypatch):
    class HttpError(Exception):
        pass

    def forbidden(name):
        raise HttpError("no access\n  for you, 403")

    monkeypatch.setattr(Bucket, "fails", forbidden)
    with pytest.raises(DataError, match="cannot be written .no access for you, 403"):
        atomic.write_atomically(bucket / "x", lambda out: out.write(b"new"))


def test_what_tensorstore_says_of_a_bucket_is_a_reason():
    said = "ABORTED: All 2 retry attempts failed: CURL error Could not connect to server"
    assert faults.reason(ValueError(said)) == said
    assert faults.reason(ValueError("NOT_FOUND: key a")) is None  # of the file, not of the store
    assert faults.reason(OSError(None, "Forbidden", "gs://bucket/x")) == "Forbidden"
    assert faults.reason(OSError(None, "Forbidden", "/x")) is None


def test_digests_see_what_has_changed_in_a_bucket(bucket):
    for name in ("a", "deep/b"):
        atomic.write_atomically(bucket / name, lambda out, name=name: out.write(name.encode()))
    digests.add(bucket)
    assert digests.damage(bucket) == []
    (bucket / "deep" / "b").write_bytes(b"deep/x")
    (bucket / "a").unlink()
    damaged = digests.damage(bucket)
    assert sorted(damaged) == [("a", "is missing"), ("deep/b", "its content has changed")]


def test_the_version_of_a_file_changes_when_it_is_written_again(bucket, tmp_path):
    for directory in (bucket, tmp_path):
        atomic.write_atomically(directory / "a", lambda out: out.write(b"1"))
        before = buckets.files_below(directory)
        time.sleep(0.01)
        atomic.write_atomically(directory / "a", lambda out: out.write(b"2"))
        after = buckets.files_below(directory)
        assert before["a"][0] == after["a"][0] == 1 and before != after
        assert buckets.files_below(directory / "absent") == {}


def row(step):
    return {"loss": 1 / step}


def test_a_log_is_uploaded_at_checkpoints_and_continued(bucket):
    log = logs.MetricsLog(bucket, start=0)
    log.write(1, row(1), {})
    log.upload()
    log.write(2, row(2), {})
    assert [r["step"] for r in logs.read(bucket / "metrics.jsonl")] == [1]
    # killed here; the next run goes on behind the checkpoint
    log = logs.MetricsLog(bucket, start=1)
    log.write(2, row(2), {})
    log.close()
    assert [r["step"] for r in logs.read(bucket / "metrics.jsonl")] == [1, 2]
    boards = [name for name in buckets.files_below(bucket) if "tfevents" in name]
    assert boards and all(buckets.files_below(bucket)[name][0] > 50 for name in boards)


def test_a_log_that_cannot_be_uploaded_is_so_later(bucket, monkeypatch, caplog):
    log = logs.MetricsLog(bucket, start=0)
    log.write(1, row(1), {})
    monkeypatch.setattr(Bucket, "fails", full)
    log.upload()
    assert "gs://bucket/run/metrics.jsonl: cannot be written (Quota exceeded)" in caplog.text
    assert logs.read(bucket / "metrics.jsonl") == []
    monkeypatch.setattr(Bucket, "fails", None)
    log.close()
    assert [r["step"] for r in logs.read(bucket / "metrics.jsonl")] == [1]


def test_only_one_run_at_a_time_in_a_bucket(bucket, quick):
    with workdir.only_run(bucket):
        with pytest.raises(CheckpointError, match=f"another run .*process {os.getpid()} of .*new"):
            with workdir.only_run(bucket):
                pass
    began = time.monotonic()
    with workdir.only_run(bucket):  # given back: nobody waits
        assert time.monotonic() - began < lease.SILENCE / 2
    assert len(list((bucket / lease.FOLDER).iterdir())) == 1


def holder(bucket, **entry):
    """The object of a holder elsewhere, which says nothing more."""
    entry = {"owner": "x", "host": "elsewhere", "pid": 7, "machine": "", "started": "1", **entry}
    file = bucket / lease.FOLDER / "00000003.json"
    file.write_bytes(json.dumps(entry).encode())
    return file


def test_a_lease_of_a_dead_machine_is_taken_after_a_while(bucket, quick, caplog):
    holder(bucket)
    began = time.monotonic()
    with locks.holding(bucket):
        assert time.monotonic() - began > lease.SILENCE
        assert [file.name for file in (bucket / lease.FOLDER).iterdir()] == ["00000004.json"]
    assert "waiting whether process 7 of elsewhere is alive" in caplog.text


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(bucket):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder(bucket, pid=child.pid, machine=lease._machine(), started=lease._started(child.pid))
    assert not lease._has_ended(json.loads((bucket / lease.FOLDER / "00000003.json").read_bytes()))
    child.kill()
    child.communicate()
    began = time.monotonic()
    with locks.holding(bucket):
        assert time.monotonic() - began < lease.BEAT


def test_of_many_that_want_a_dead_lease_one_gets_it(bucket, quick):
    holder(bucket)
    together, got = threading.Barrier(8), []

    def want():
        together.wait()
        try:
            with locks.holding(bucket):
                got.append(True)
                done.wait()
        except lease.Taken:
            got.append(False)

    done = threading.Event()
    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(got) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_a_run_that_lost_its_lease_writes_no_more(bucket, quick):
    with locks.holding(bucket):
        (bucket / lease.FOLDER / "00000002.json").write_bytes(b'{"pid": 9, "host": "other"}')
        time.sleep(4 * lease.BEAT)
        with pytest.raises(CheckpointError, match="another run .*process 9 of other.*has lost its"):
            atomic.write_atomically(bucket / "stage" / "scores.json", lambda out: None)
        atomic.write_atomically(buckets.place("gs://bucket/results.json"), lambda out: None)
    # what is not its own stays as it is
    assert (bucket / lease.FOLDER / "00000002.json").read_bytes() == b'{"pid": 9, "host": "other"}'


def test_a_run_that_cannot_renew_its_lease_stops_before_another_may_begin(
    bucket, quick, monkeypatch, caplog
):
    with locks.holding(bucket):
        monkeypatch.setattr(Bucket, "fails", full)
        time.sleep(lease.SILENCE + 4 * lease.BEAT)
        with pytest.raises(CheckpointError, match="lease could not be renewed for . s, so another"):
            lease.check(bucket / "stage" / "checkpoints")
    assert "the lease was not renewed" in caplog.text
    assert "the lease was not given back" in caplog.text


def test_what_must_lie_on_a_disk(monkeypatch, tmp_path):
    assert buckets.local(tmp_path / "x", "--output") == tmp_path / "x"
    with pytest.raises(ConfigError, match="--output=gs://bucket/x: this must lie on a disk"):
        buckets.local("gs://bucket/x", "--output")
    monkeypatch.setenv(places.CACHE_VARIABLE, "gs://bucket/features")
    with pytest.raises(ConfigError, match="CIR_JAX_CACHE=gs://bucket/features: this must lie on a"):
        places.default_cache_dir()
    monkeypatch.setenv(places.DATA_VARIABLE, "gs://bucket/data")
    assert str(places.default_data_dir()) == "gs://bucket/data"
