"""Checkpoints of a stage: Orbax, asynchronous, sharded, every file with a digest.

Damaged ones are passed over, not fatal. What cannot be read just now is never taken for damaged.
Orbax has no digests of arrays: OCDBT's checksums guard its index, a flipped bit of a value loads.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from cir_jax.errors import CheckpointError, CirError
from cir_jax.storage import digests, faults, lease
from cir_jax.storage.buckets import is_remote, place
from cir_jax.training.scores import Scores
from cir_jax.training.step import TrainState

ITEMS = ("params", "ema", "optimizer", "position")
COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE
WAITS = (0.5, 2.0, 6.0)
"""Seconds before a disk that did not answer is asked again."""

_Result = TypeVar("_Result")


class _WithDigests:
    """The directory of a checkpoint, which gets its digests before it counts as finished.

    Runs in Orbax's thread that writes, on process 0: the training loop does not wait for it.
    """

    async def finalize(self) -> None:
        if not self.get_final().name.isdigit():  # an item of a checkpoint
            await super().finalize()
            return
        digests.add(place(self.get()), leave_out=("_CHECKPOINT_METADATA",))
        lease.check(self.get_final())
        await super().finalize()
        digests.add(place(self.get_final()))  # of the two small files that finishing writes


class _Renamed(_WithDigests, ocp.path.atomicity.AtomicRenameTemporaryPath):
    """On a disk: the directory has its name when all is there."""


class _Committed(_WithDigests, ocp.path.atomicity.CommitFileTemporaryPath):
    """In a bucket, where directories cannot be renamed at once: `COMMITTED` comes last."""


class _NewestAndBest:
    """A preservation policy: the newest `keep`, and the best of those that have a score."""

    def __init__(self, keep: int, scores: Scores):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        scored = [step for step in steps if step in self._scores.values]
        kept = {*steps[-self._keep :], *self._scores.ranked(scored)[:1]}
        return [step in kept for step in steps]


class Checkpoints:
    """Checkpoints under one directory, each a Composite of params, ema, optimizer and position.

    params and ema are items of their own so that evaluation reads only what it needs. position is
    JSON: where the input pipeline stands (the next batch, and what it reads), restorable on any
    number of processes and workers. Kept are the newest `keep`, and the best one by `scores`.
    """

    def __init__(self, directory: Path, keep: int = 2, scores: Scores | None = None):
        self.directory = place(directory)
        self._open = contextlib.ExitStack()
        self._open.enter_context(_one_message())
        handlers = {
            name: ocp.JsonCheckpointHandler()
            if name == "position"
            else ocp.StandardCheckpointHandler()
            for name in ITEMS
        }
        with self._disk_errors():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None if scores else keep,
                    preservation_policy=_NewestAndBest(keep, scores) if scores else None,
                    create=True,
                    cleanup_tmp_directories=True,
                    temporary_path_class=_Committed if is_remote(directory) else _Renamed,
                ),
                item_names=ITEMS,
                item_handlers=handlers,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._open, self._disk_errors():
            self._manager.close()  # waits for the save in flight

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Starts writing `state` and returns before it is on disk. CheckpointError if refused."""
        lease.check(self.directory)
        step = int(jax.device_get(state.step))
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_rest(state)),
            "position": ocp.args.JsonSave(dict(position)),
        }
        if jax.tree.leaves(state.ema):
            items["ema"] = ocp.args.StandardSave(state.ema)
        with self._disk_errors():
            saved = self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if not saved:
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved (it exists already)."
            )

    def wait(self) -> None:
        """Until the checkpoint in flight is on disk."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full or failing disk is a CheckpointError; what was saved before is still there."""
        try:
            yield
        except Exception as error:  # Orbax and tensorstore wrap the system's errors as text
            if (reason := faults.reason(error)) is None:
                raise
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written: {reason}. The ones "
                "before it are whole. Make room and run the same command again."
            ) from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state and its position; None when there is no checkpoint.

        like: abstract state with shardings (another mesh than the one that saved is fine).
        A damaged checkpoint is named in a warning and renamed, and the one before is taken. Raises
        CheckpointError when all are damaged, and, with nothing renamed, when one cannot be read now
        or holds other parameters.
        """
        failed: list[int] = []
        for step in self.steps():
            path = self.directory / str(step)
            restored = _undamaged(path, None, lambda step=step: self._read(step, like))
            if restored is not None and (problem := _not_finite(restored["params"])):
                _warn_damaged(path, problem)
                restored = None
            if restored is None:
                failed.append(step)
                continue
            self._move_away(failed)
            if jax.process_index() == 0:
                with self._disk_errors():
                    digests.add(path)  # where an earlier version or a killed run left none
            rest = restored["optimizer"]
            state = TrainState(
                step=rest["step"],
                params=restored["params"],
                ema=restored["ema"] if jax.tree.leaves(like.ema) else {},
                opt_state=rest["opt_state"],
                rng=rest["rng"],
            )
            return state, restored["position"]
        if failed:
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints {sorted(failed)} is readable. "
                "Restore them from a copy, or start in a new --workdir."
            )
        return None

    def _read(self, step: int, like: TrainState) -> Any:
        stored, path = self._manager.item_metadata(step), self.directory / str(step)
        wanted = {"params": like.params, "optimizer": like.opt_state}
        if jax.tree.leaves(like.ema):
            wanted["ema"] = like.ema
        for item, tree in wanted.items():
            averaged = item != "ema" or (path / item).is_dir()
            metadata = stored.get(item) if averaged else {}
            if item == "optimizer" and metadata is not None:
                metadata = getattr(metadata, "item_metadata", metadata)["opt_state"]
            _refuse_other(metadata, tree, path / item)
        return self._manager.restore(step, args=ocp.args.Composite(**_restore(like)))

    def _move_away(self, steps: list[int]) -> None:
        """Renames damaged checkpoints: their steps will be saved again."""
        for step in steps:
            path = self.directory / str(step)
            if jax.process_index() == 0 and path.exists():
                with self._disk_errors():
                    if is_remote(path):  # file by file: none of them may count meanwhile
                        (path / COMMITTED).unlink(missing_ok=True)
                    path.rename(path.with_suffix(f".unreadable-{time.time_ns()}"))
        if steps:
            multihost_utils.sync_global_devices("unreadable checkpoints moved away")
            self._manager.reload()


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Drops what Orbax logs about errors that it also raises: hundreds of lines of traceback.

    And that an item has no metadata of its own, as the items of all our checkpoints.
    """

    def others(record: logging.LogRecord) -> bool:
        dropped = record.exc_info or "Metadata file does not exist" in str(record.msg)
        return not (dropped and "orbax" in Path(record.pathname).parts)

    logger = absl_logging.get_absl_logger()
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _undamaged(
    path: Path, below: Collection[str] | None, read: Callable[[], _Result]
) -> _Result | None:
    """read() of the checkpoint at `path`; None, with a warning, when it is damaged.

    below: the items that `read` looks at; None = all. Whether they are damaged is decided by their
    digests, by all processes together; without digests, by whether they can be read. Raises
    CheckpointError when the disk does not answer.
    """
    found = _verify(path, below)
    if found:
        _warn_damaged(path, found)
        return None
    if found is None:
        logging.warning(
            "%s: has no digests (of an earlier version, or of a killed run): read unverified.", path
        )
    try:
        return _patiently(read, path, verified=found is not None)
    except CirError:
        raise
    except Exception as error:  # Orbax, tensorstore and JSON raise many types
        _warn_damaged(path, faults.cause(error))
        return None


def _warn_damaged(path: Path, what: str) -> None:
    logging.warning("checkpoint %s is not readable (%s); trying another one.", path, what)


def _verify(path: Path, below: Collection[str] | None) -> str | None:
    """What is damaged, "" for nothing, None without digests: the same on all processes.

    Each process looks at its part of the files. All raise CheckpointError if one cannot read.
    """
    here, count = jax.process_index(), jax.process_count()
    found, problem = None, None
    try:
        found = _patiently(lambda: digests.damage(path, below, (here, count)), path, verified=True)
    except CheckpointError as error:
        problem = error
    if found is not None:
        more = f" and {len(found) - 1} more file(s)" if len(found) > 1 else ""
        found = f"damaged: {found[0][0]} {found[0][1]}{more}" if found else ""
    if count > 1:
        verdict = 3 if problem else 0 if found is None else 2 if found else 1
        verdicts = np.asarray(multihost_utils.process_allgather(np.int32(verdict))).ravel()
        worst, where = int(verdicts.max()), int(verdicts.argmax())
        if worst == 3 and problem is None:
            problem = CheckpointError(f"{path}: cannot be read now on process {where}.")
        found = (None, "", found or f"damaged, as process {where} found", "")[worst]
    if problem:
        raise problem
    return found


def _patiently(read: Callable[[], _Result], path: Path, verified: bool) -> _Result:
    """read(), once more after each of `WAITS` while the disk does not answer, then CheckpointError.

    verified: the files are as they were written, so whatever is raised speaks of the moment; else
    errors that do not come from the system may mean damage, and are raised as they are.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except CirError:
            raise
        except Exception as error:
            if not verified and not _of_the_moment(error):
                raise
            if wait is None:
                raise CheckpointError(
                    f"{path}: cannot be read now ({faults.cause(error)}). Nothing is known to be "
                    "damaged, nothing was moved. Look after the disk, then run the same command "
                    "again; to do without this checkpoint, move it away."
                ) from error
            logging.warning(
                "%s: cannot be read (%s); trying again in %g s.", path, faults.cause(error), wait
            )
            time.sleep(wait)
    raise AssertionError


def _of_the_moment(error: Exception) -> bool:
    """Whether an error says nothing about the file that was being read."""
    no_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return no_memory or faults.reason(error) is not None


def _refuse_other(metadata: Any, like: Any, where: Path) -> None:
    """CheckpointError naming the parameters in which a stored item is not what is wanted.

    ValueError when it does not say what it holds.
    """
    if getattr(metadata, "item_metadata", metadata) is None:
        raise ValueError(f"{where}: no metadata")
    if problem := _mismatch(metadata, like):
        raise CheckpointError(
            f"{where}: holds other parameters than this composer has: {problem}. "
            "Give the --config that it was trained with."
        )


def _rest(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}


def _restore(like: TrainState) -> dict[str, Any]:
    items = {
        "params": ocp.args.StandardRestore(like.params),
        "optimizer": ocp.args.StandardRestore(_rest(like)),
        "position": ocp.args.JsonRestore(),
    }
    if jax.tree.leaves(like.ema):
        items["ema"] = ocp.args.StandardRestore(like.ema)
    return items


@_one_message()
def load_scored(
    directory: Path, like: Any, scores: Scores | None = None
) -> tuple[Any, dict[str, Any]]:
    """Evaluated parameters (averaged where there is averaging) as numpy, and their position.

    Those of the best checkpoint where they were scored, else of the newest. scores: None = as on
    disk, which process 0 may still be writing in the run itself.
    like: tree of shapes of the parameters. Works whatever mesh and number of processes saved them.
    The position's "reached" is the step that training came to.
    A damaged checkpoint is named in a warning and left where it is. Raises CheckpointError when all
    are damaged, when one cannot be read now, and when it holds other parameters.
    """
    directory = place(directory)
    steps = _patiently(lambda: finished(directory), directory, verified=True)
    scores = Scores(directory.parent) if scores is None else scores
    for step in scores.ranked(steps):
        path = directory / str(step)
        item = "ema" if (path / "ema").is_dir() else "params"
        found = _undamaged(
            path, (item, "position"), lambda path=path, item=item: _read_scored(path, item, like)
        )
        if found is None:
            continue
        if not (problem := _not_finite(found[0])):
            reached = steps[0] if step in scores.values else found[1].get("next_batch", step)
            return found[0], found[1] | {"reached": reached}
        _warn_damaged(path / item, problem)
    raise CheckpointError(
        f"{directory}: no readable checkpoint"
        + (f", {', '.join(map(str, steps))} are damaged. " if steps else ". ")
        + "Train first (`python launch/main.py` with the same --config and --workdir)."
    )


def finished(directory: Path) -> list[int]:
    """Steps with a finished checkpoint, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    found = (path for path in found if path.name.isdigit())
    if is_remote(directory):
        found = (path for path in found if (path / COMMITTED).exists())
    return sorted((int(path.name) for path in found), reverse=True)


def _read_scored(path: Path, item: str, like: Any) -> tuple[Any, dict[str, Any]]:
    abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    with ocp.PyTreeCheckpointer() as reader:
        _refuse_other(reader.metadata(path / item), like, path / item)
        arrays = ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
        tree = reader.restore(path / item, args=arrays)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return tree, reader.restore(path / "position", args=ocp.args.JsonRestore())


def _not_finite(params: Any) -> str:
    """The first parameters that hold NaN or infinity, "" if none do.

    A step whose loss was the last finite one may have been saved.
    """
    leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    floats = {name: x for name, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    if all(isinstance(x, np.ndarray) for x in floats.values()):
        good = {name: np.isfinite(x).all() for name, x in floats.items()}
    else:
        good = jax.device_get(_are_finite(floats))
    bad = [name for name, fine in good.items() if not fine]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"not finite: {', '.join(bad[:3])}{more}" if bad else ""


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in leaves.items()}


def _mismatch(metadata: Any, like: Any) -> str:
    """ "name (stored, expected)" of the first parameters whose shapes differ, "" if none do."""
    tree = getattr(metadata, "item_metadata", metadata)
    stored, wanted = (
        {
            _name(path): tuple(x.shape)
            for path, x in jax.tree_util.tree_leaves_with_path(leaves)
            if hasattr(x, "shape")
        }
        for leaves in (tree, like)
    )
    differ = [
        f"{name} (stored {stored.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')})"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
