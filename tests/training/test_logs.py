"""metrics.jsonl and TensorBoard: damaged lines, full disks, resumes."""

import builtins
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cir_jax.errors import DataError
from cir_jax.training import logs
from tests.training.line import trainer

ROOT = pathlib.Path(__file__).resolve().parents[2]

FULL = os.strerror(errno.ENOSPC)


def line(step):
    return json.dumps({"step": step, "loss": 1 / step, "speed": {}}).encode()


def steps(path):
    return [row["step"] for row in logs.read(path)]


@pytest.mark.parametrize(
    "damaged",
    [
        b"5",
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"loss": 1.0}',
        b'{"step": "3"}',
        b"\xff\xfe\x00{",
        b"{",
    ],
    ids=repr,
)
def test_lines_that_are_no_records_are_moved_aside_and_the_others_kept(tmp_path, damaged, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1), damaged, line(2), line(3)]) + b"\n")
    assert steps(path) == [1, 2, 3]
    logs.MetricsLog(tmp_path, start=2).close()
    assert path.read_bytes() == line(1) + b"\n" + line(2) + b"\n"
    assert (tmp_path / "metrics.jsonl.unreadable").read_bytes() == damaged + b"\n"
    assert "metrics.jsonl: 1 damaged line(s) are no records" in caplog.text
    caplog.clear()
    logs.MetricsLog(tmp_path, start=2).close()
    assert not caplog.text


def test_a_line_cut_by_a_kill_is_dropped_in_silence(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2)[:9])
    log = logs.MetricsLog(tmp_path, start=1)
    log.write(2, {"loss": 0.5}, {})
    log.close()
    assert steps(path) == [1, 2] and path.read_bytes().startswith(line(1) + b"\n")
    assert not caplog.text and not (tmp_path / "metrics.jsonl.unreadable").exists()


@pytest.fixture
def disk(monkeypatch):
    """disk.full = True: nothing more goes into metrics.jsonl or TensorBoard's file, but half."""

    class Disk:
        full = False

    class File:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if Disk.full:
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, FULL)
            return self.file.write(data)

    opened, built_in = pathlib.Path.open, builtins.open

    def path_open(self, *args, **kwargs):
        file = opened(self, *args, **kwargs)
        return File(file) if self.name == "metrics.jsonl" else file

    def plain_open(path, *args, **kwargs):
        file = built_in(path, *args, **kwargs)
        return File(file) if "tfevents" in str(path) else file

    monkeypatch.setattr(pathlib.Path, "open", path_open)
    monkeypatch.setattr("tensorboardX.record_writer.open", plain_open, raising=False)
    return Disk


def test_lines_wait_while_the_disk_is_full(tmp_path, disk, caplog):
    log, path = logs.MetricsLog(tmp_path, start=0), tmp_path / "metrics.jsonl"
    log.write(1, {"loss": 1.0}, {"speed": 2.0})
    disk.full = True
    log.write(2, {"loss": 1.0}, {"speed": 2.0})
    log.write(3, {"loss": 1.0}, {"speed": 2.0})
    assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().endswith(b"\n")
    assert caplog.text.count(f"metrics.jsonl: cannot be written ({FULL}): lines wait") == 1
    assert caplog.text.count(f"tensorboard: not written on ({FULL})") == 1
    disk.full = False
    log.write(4, {"loss": 1.0}, {"speed": 2.0})
    log.close()
    assert steps(path) == [1, 2, 3, 4]


def test_what_never_found_room_is_said(tmp_path, disk, caplog):
    log = logs.MetricsLog(tmp_path, start=0)
    disk.full = True
    log.write(1, {"loss": 1.0}, {})
    log.write(2, {"loss": 1.0}, {})
    log.close()
    assert "there was no room for the last 2 line(s)" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_training_goes_on_without_room_for_its_log(tmp_path, disk, caplog):
    def fill(step):
        disk.full = 2 <= step <= 3

    trainer(before=fill).run(tmp_path)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "4").is_dir() and "lines wait" in caplog.text


def test_a_log_that_cannot_be_begun_or_read_is_one_message(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2) + b"\n")

    def fails(*_):
        raise OSError(errno.ENOSPC, FULL)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(DataError, match="metrics.jsonl: cannot be written .No space left"):
            logs.MetricsLog(tmp_path, start=1)
    assert path.read_bytes() == line(1) + b"\n" + line(2) + b"\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", fails)
        with pytest.raises(DataError, match="metrics.jsonl: cannot be read .*Nothing was changed"):
            logs.MetricsLog(tmp_path, start=1)


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = logs.MetricsLog(tmp_path, start=6)
    log.write(7, {"loss": 0.5}, {"rate": 3.0})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert [event.step for event in events] == [0, 7, 7, 7, 7]
    assert events[2].session_log.status == 1  # START: hides what a killed run wrote from step 7 on
    found = [(v.tag, v.simple_value) for event in events[3:] for v in event.summary.value]
    assert found == [("loss", 0.5), ("rate", 3.0)]


def test_pytorch_is_not_imported_for_it(tmp_path):
    """tensorboardX would; afterwards it may be imported as ever."""
    pytest.importorskip("torch")
    program = (
        "import pathlib, sys; from cir_jax.training import logs; "
        f"logs.MetricsLog(pathlib.Path({str(tmp_path)!r}), 0).close(); "
        "assert 'torch' not in sys.modules; import torch.nn"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert list((tmp_path / "tensorboard").iterdir())
