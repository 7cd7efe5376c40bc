"""Checkpoints of a stage: Orbax, asynchronous, sharded; corrupt ones are passed over, not fatal."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cir_jax.errors import CheckpointError
from cir_jax.training.step import TrainState

ITEMS = ("params", "ema", "optimizer", "position")


class Checkpoints:
    """Checkpoints under one directory, each a Composite of params, ema, optimizer and position.

    params and ema are items of their own so that evaluation reads only what it needs. position is
    JSON: where the input pipeline stands (the next batch, and what it reads), restorable on any
    number of processes and workers.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        handlers = {
            name: ocp.JsonCheckpointHandler()
            if name == "position"
            else ocp.StandardCheckpointHandler()
            for name in ITEMS
        }
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
            item_names=ITEMS,
            item_handlers=handlers,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._disk_errors():
            self._manager.close()  # waits for the save in flight

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Starts writing `state` and returns before it is on disk. CheckpointError if refused."""
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
            text = str(error)
            known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
            reasons = [os.strerror(code) for code in known if os.strerror(code) in text]
            if not reasons:
                raise
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written: {reasons[0]}. The ones "
                "before it are whole. Make room and run the same command again."
            ) from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state and its position; None when there is no checkpoint.

        like: abstract state with shardings (another mesh than the one that saved is fine).
        A corrupt checkpoint is named in a warning and renamed, and the one before is taken; raises
        CheckpointError when none is readable.
        """
        failed = []
        for step in self.steps():
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**_restore(like)))
                _check_finite(restored["params"])
            except Exception as error:  # Orbax, tensorstore and JSON raise many types
                logging.warning(
                    "checkpoint %s is not readable (%s); trying the one before.",
                    self.directory / str(step),
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
                failed.append(step)
                continue
            for bad in failed:  # its step will be saved again
                bad_directory = self.directory / str(bad)
                if jax.process_index() == 0 and bad_directory.exists():
                    bad_directory.rename(bad_directory.with_suffix(f".unreadable-{time.time_ns()}"))
            if failed:
                multihost_utils.sync_global_devices("unreadable checkpoints moved away")
                self._manager.reload()
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


def load_scored(directory: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Evaluated parameters (averaged where there is averaging) as numpy, and their position.

    like: tree of shapes of the parameters. Works whatever mesh and number of processes saved them.
    Raises CheckpointError when there is no readable checkpoint.
    """
    directory = Path(directory).absolute()
    found = directory.is_dir()
    steps = (
        sorted(
            (int(path.name) for path in directory.iterdir() if path.name.isdigit()), reverse=True
        )
        if found
        else []
    )
    reasons = []
    for step in steps:
        path = directory / str(step)
        item = path / "ema" if (path / "ema").is_dir() else path / "params"
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                if problem := _mismatch(reader.metadata(item), like):
                    raise CheckpointError(
                        f"{item}: holds other parameters than this composer has: {problem}. "
                        "Give the --config that it was trained with."
                    )
                arrays = ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
                tree = reader.restore(item, args=arrays)
            _check_finite(tree)
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                return tree, reader.restore(path / "position", args=ocp.args.JsonRestore())
        except CheckpointError:
            raise
        except Exception as error:
            said = str(error).splitlines()[0][:200] if str(error) else repr(error)
            reasons.append(f"{item}: {said}")
            logging.warning("checkpoint not readable, trying the one before: %s", reasons[-1])
    raise CheckpointError(
        f"{directory}: no readable checkpoint. "
        + (" ".join(reasons) + " " if reasons else "")
        + "Train first (`python launch/main.py` with the same --config and --workdir)."
    )


def _check_finite(params: Any) -> None:
    """Raises ValueError naming the first parameters that hold NaN or infinity.

    A step whose loss was the last finite one may have been saved.
    """
    leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    floats = {name: x for name, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    if all(isinstance(x, np.ndarray) for x in floats.values()):
        good = {name: np.isfinite(x).all() for name, x in floats.items()}
    else:
        good = jax.device_get(_are_finite(floats))
    if bad := [name for name, fine in good.items() if not fine]:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"not finite: {', '.join(bad[:3])}{more}")


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in leaves.items()}


def _mismatch(metadata: Any, like: Any) -> str:
    """ "name (stored, expected)" of the first parameters whose shapes differ, "" if none do."""
    tree = getattr(metadata, "item_metadata", metadata)
    stored = {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(like)}
    differ = [
        f"{name} (stored {stored.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')})"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
