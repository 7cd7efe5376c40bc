"""Checkpoints that are damaged, cut, half-written, or cannot be read just now."""

import errno
import logging
import os
import random
import shutil
import time

import jax
import numpy as np
import optax
import pytest

from cir_jax.errors import CheckpointError
from cir_jax.storage import digests
from cir_jax.training import checkpoints, logs
from cir_jax.training.checkpoints import Checkpoints, load_scored
from tests.training.line import trainer

EIO = os.strerror(errno.EIO)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2 and 4, with averages, and the parameters of both."""
    directory = tmp_path_factory.mktemp("saved")
    trainer(ema=0.5).run(directory)
    found = directory / "checkpoints"
    return found, {step: restore(found, only=step)[0] for step in (2, 4)}


def restore(directory, only=None, **kwargs):
    like = trainer(**({"ema": 0.5} | kwargs)).abstract_state()
    with Checkpoints(directory) as store:
        if only:
            store.steps = lambda: [only]
        return store.restore(like)


def scored(directory, width=8):
    return load_scored(directory, trainer(width=width).abstract_state().params)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name[0] != ".")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


@pytest.fixture
def no_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(checkpoints.time, "sleep", waits.append)
    return waits


def same(found, state):
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    for a, b in leaves:
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def losses(directory):
    return [row["loss"] for row in logs.read(directory / "metrics.jsonl")]


def files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]


def test_every_finished_checkpoint_has_digests_of_all_its_files(saved):
    for step in ("2", "4"):
        folder = saved[0] / step
        listed = set(digests._stored(folder))
        assert listed == {str(p.relative_to(folder)) for p in files(folder)} - {digests.NAME}
        assert digests.damage(folder) == []


def test_a_flipped_bit_anywhere_is_noticed_and_the_one_before_taken(saved, tmp_path, caplog):
    rng = random.Random(0)
    choice = rng.sample(files(saved[0] / "4"), 20)
    sizes = [path.stat().st_size for path in choice]
    assert max(sizes) > 500  # arrays are among them
    for number, (path, size) in enumerate(zip(choice, sizes, strict=True)):
        copy = shutil.copytree(saved[0], tmp_path / str(number))
        file = copy / path.relative_to(saved[0])
        content = bytearray(file.read_bytes())
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        caplog.clear()
        state, position = restore(copy)
        assert position["next_batch"] == 2, file
        same(state, saved[1][2])
        said = "".join(r.getMessage() for r in caplog.records if "not readable" in r.getMessage())
        name = file.relative_to(copy / "4").as_posix()
        assert f"{copy / '4'} is not readable (damaged: {name} " in said
        assert names(copy)[0] == "2" and names(copy)[1].startswith("4.unreadable-")


@pytest.mark.parametrize("item", ["ema", "position", "_CHECKPOINT_METADATA"])
def test_evaluation_notices_it_too_and_moves_nothing(saved, copy, item, caplog):
    file = max(files(copy / "4" / item) or [copy / "4" / item], key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    params, position = scored(copy)
    assert position["next_batch"] == 2 and "4 is not readable (damaged" in caplog.text
    assert "Metadata file" not in caplog.text  # of an item, which has none
    same(params, saved[1][2].ema)
    assert names(copy) == ["2", "4"]


def test_evaluation_takes_what_is_whole_of_a_checkpoint(saved, copy):
    for file in files(copy / "4" / "optimizer"):
        file.write_bytes(b"")
    params, position = scored(copy)
    assert position["next_batch"] == 4
    same(params, saved[1][4].ema)


def cut(directory):
    for file in files(directory):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(directory):
    for file in files(directory):
        file.write_bytes(b"")


def without_arrays(directory):
    shutil.rmtree(directory / "params")


@pytest.mark.parametrize("damage", [cut, emptied, without_arrays])
@pytest.mark.parametrize("verified", [True, False])
def test_damage_falls_back_with_digests_and_without(saved, copy, damage, verified, caplog):
    if not verified:
        for step in ("2", "4"):
            (copy / step / digests.NAME).unlink()
    damage(copy / "4")
    if not verified:
        (copy / "4" / digests.NAME).unlink(missing_ok=True)
    assert scored(copy)[1]["next_batch"] == (4 if damage is without_arrays else 2)  # reads ema
    state, _ = restore(copy)
    same(state, saved[1][2])
    assert "4 is not readable" in caplog.text and "Traceback" not in caplog.text
    assert names(copy)[1].startswith("4.unreadable-")


def test_a_run_goes_on_from_the_one_before_to_the_same_numbers(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        trainer().run(directory)
    cut(broken / "checkpoints" / "4" / "params")
    params = trainer(steps=6).run(broken)
    same(jax.device_get(params), jax.device_get(trainer(steps=6).run(whole)))
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6


def test_all_damaged_is_an_error_and_nothing_moves(copy):
    for step in ("2", "4"):
        cut(copy / step / "params")
        cut(copy / step / "ema")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 4\] is readable"):
        restore(copy)
    with pytest.raises(CheckpointError, match="no readable checkpoint, 4, 2 are damaged"):
        scored(copy)
    assert names(copy) == ["2", "4"]


def test_what_a_kill_left_half_written_is_passed_over_and_cleared(saved, copy):
    half = shutil.copytree(copy / "4", copy / "6.orbax-checkpoint-tmp")
    emptied(half / "params")
    shutil.rmtree(half / "position")
    assert scored(copy)[1]["next_batch"] == 4
    state, _ = restore(copy)
    same(state, saved[1][4])
    deadline = time.monotonic() + 20
    while names(copy) != ["2", "4"]:  # Orbax clears it in a thread
        assert time.monotonic() < deadline, names(copy)
        time.sleep(0.01)


def test_of_an_earlier_version_is_read_said_to_be_unverified_and_gets_digests(saved, copy, caplog):
    (copy / "4" / digests.NAME).unlink()
    assert scored(copy)[1]["next_batch"] == 4
    assert "4: has no digests" in caplog.text and "read unverified" in caplog.text
    assert digests.damage(copy / "4") is None  # an evaluation writes nothing there
    state, _ = restore(copy)
    same(state, saved[1][4])
    assert digests.damage(copy / "4") == []
    caplog.clear()
    restore(copy)
    assert "unverified" not in caplog.text


def test_killed_between_finishing_and_its_last_digests(saved, copy):
    file = copy / "4" / digests.NAME
    file.unlink()
    digests.add(copy / "4", leave_out=("_CHECKPOINT_METADATA", "commit_success.txt"))
    restore(copy)
    assert set(digests._stored(copy / "4")) == set(digests._stored(saved[0] / "4"))


@pytest.fixture(params=["digests", "orbax"])
def failing(request, monkeypatch):
    """Makes reading fail a number of times, where files are verified or where arrays are read."""

    def install(times, error):
        left = [times]

        def sometimes(function):
            def called(*args, **kwargs):
                if left[0]:
                    left[0] -= 1
                    raise error
                return function(*args, **kwargs)

            return called

        if request.param == "digests":
            monkeypatch.setattr(digests, "_digest", sometimes(digests._digest))
        else:
            manager, reader = checkpoints.ocp.CheckpointManager, checkpoints.ocp.PyTreeCheckpointer
            monkeypatch.setattr(manager, "restore", sometimes(manager.restore))
            monkeypatch.setattr(reader, "restore", sometimes(reader.restore))

    return install


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_error_that_passes_is_waited_for(saved, copy, failing, no_waits, code, caplog):
    failing(2, OSError(code, os.strerror(code)))
    state, _ = restore(copy)
    same(state, saved[1][4])
    assert no_waits == list(checkpoints.WAITS[:2]) == sorted(no_waits)
    assert f"cannot be read ({os.strerror(code)}); trying again in 0.5 s" in caplog.text
    assert names(copy) == ["2", "4"] and "not readable" not in caplog.text


@pytest.mark.parametrize("read", [restore, scored])
def test_a_read_error_that_stays_condemns_nothing(copy, failing, no_waits, read):
    failing(10**6, OSError(errno.EIO, EIO))
    with pytest.raises(
        CheckpointError, match=f"4: cannot be read now .{EIO}.*nothing was moved.*same command"
    ):
        read(copy)
    assert names(copy) == ["2", "4"] and no_waits == list(checkpoints.WAITS)


def test_what_orbax_raises_on_good_files_condemns_nothing(copy, monkeypatch, no_waits):
    def fails(*_, **__):
        raise ValueError("first line\n" + "of a traceback\n" * 700)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", fails)
    with pytest.raises(CheckpointError, match="4: cannot be read now .first line.") as caught:
        restore(copy)
    assert len(str(caught.value).splitlines()) == 1
    assert names(copy) == ["2", "4"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, EIO), MemoryError("too large")])
def test_without_digests_errors_of_the_moment_condemn_nothing(copy, monkeypatch, no_waits, error):
    def fails(*_, **__):
        raise error

    for step in ("2", "4"):
        (copy / step / digests.NAME).unlink()
    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", fails)
    with pytest.raises(CheckpointError, match="4: cannot be read now"):
        restore(copy)
    assert names(copy) == ["2", "4"]


@pytest.mark.parametrize("verified", [True, False])
def test_another_composer_condemns_nothing(copy, no_waits, verified):
    if not verified:
        for step in ("2", "4"):
            (copy / step / digests.NAME).unlink()
    message = r"holds other parameters .* slope \(stored \(8, 8\), expected \(4, 8\)\)"
    for read in (restore, scored):
        with pytest.raises(CheckpointError, match=message):
            read(copy, width=4)
    with pytest.raises(CheckpointError, match=r"optimizer: holds other parameters"):
        restore(copy, optimizer=optax.sgd(1e-2))
    assert names(copy) == ["2", "4"] and not no_waits


def test_processes_agree_on_what_one_of_them_found(copy, monkeypatch):
    """Process 1 of 2, whose part of the files is good."""
    monkeypatch.setattr(checkpoints.jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoints.jax, "process_index", lambda: 1)
    for theirs, expected in ((1, ""), (2, "damaged, as process 0 found"), (0, "")):
        gather = lambda mine, theirs=theirs: np.asarray([theirs, mine])  # noqa: E731
        monkeypatch.setattr(checkpoints.multihost_utils, "process_allgather", gather)
        assert checkpoints._verify(copy / "4", None) == expected
    monkeypatch.setattr(
        checkpoints.multihost_utils, "process_allgather", lambda x: np.int32([3, x])
    )
    with pytest.raises(CheckpointError, match="4: cannot be read now on process 0"):
        checkpoints._verify(copy / "4", None)


class FullDisk:
    """No room for a file's bytes, wherever Orbax writes."""

    def __init__(self, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.finalize", full)


def test_a_full_disk_is_one_message_and_keeps_what_was_there(tmp_path, monkeypatch, caplog, capfd):
    trainer(steps=2).run(tmp_path)
    before = files(tmp_path / "checkpoints" / "2")
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        FullDisk(patch)
        with pytest.raises(CheckpointError) as caught:
            trainer(steps=8).run(tmp_path)
    message = str(caught.value)
    assert os.strerror(errno.ENOSPC) in message and "The ones before it are whole" in message
    assert len(message.splitlines()) == 1
    said = caplog.text + "".join(capfd.readouterr())
    assert "Traceback" not in said, said
    assert files(tmp_path / "checkpoints" / "2") == before
    assert digests.damage(tmp_path / "checkpoints" / "2") == []
    assert not (tmp_path / "checkpoints" / "4").exists()
    trainer(steps=4).run(tmp_path)
    assert names(tmp_path / "checkpoints") == ["2", "4"]
