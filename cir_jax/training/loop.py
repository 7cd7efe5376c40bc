"""The training loop of a stage: batches in, checkpoints and logs out, whatever the composer."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cir_jax.composers.base import Composer
from cir_jax.errors import CheckpointError, CirError, ConfigError
from cir_jax.input.pipeline import Pipeline
from cir_jax.progress import Progress
from cir_jax.sharding import joining, placement
from cir_jax.sharding import mesh as meshes
from cir_jax.training import logs
from cir_jax.training.checkpoints import Checkpoints, load_scored
from cir_jax.training.differences import differing_fields
from cir_jax.training.logs import MetricsLog
from cir_jax.training.scores import Scorer, Scores
from cir_jax.training.step import Step, TrainState, init_state, sharded

AHEAD = 2
"""Steps that are dispatched before the first of them is done: one runs, one waits. More would hold
a batch each, on the host and on the devices."""


class NanLoss(CirError):
    """The loss is not finite; the last good checkpoint is kept."""


class Preempted(Exception):
    """SIGTERM or Ctrl-C came; the state is saved, the same command continues.

    signal: which one; SIGTERM where it came to another process.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.signal = signal.Signals(number)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training stage is, resolved from the config: everything in steps.

    microbatches: parts a batch is encoded in, to save memory (same gradients). only: paths of the
    parameters that the optimizer trains. scan: equal layers are a loop (`models.layers`).
    """

    name: str
    steps: int
    seed: int
    optimizer: optax.GradientTransformation
    ema: float = 0.0
    microbatches: int = 1
    only: str = ".*"
    scan: bool = False
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2

    def regular(self, step: int) -> bool:
        """Whether an unbroken run saves this step; such checkpoints are scored."""
        return step > 0 and (step % self.checkpoint_every == 0 or step == self.steps)


@dataclasses.dataclass
class Trainer:
    """One stage bound to its composer, frozen parameters, data and mesh.

    initial: parameters to start from (another stage's or checkpoint's); None = composer.start.
    scorer: scores each checkpoint, so that the best one is the result; None = the last one is.
    """

    stage: Stage
    composer: Composer
    frozen: Any
    pipeline: Pipeline
    mesh: Mesh
    initial: Any = None
    scorer: Scorer | None = None

    def __post_init__(self) -> None:
        field = f"stage.{self.stage.name}.batch_size"
        meshes.check_batch(self.mesh, self.pipeline.batch_size, field)
        part = self.pipeline.batch_size // self.stage.microbatches
        if self.pipeline.batch_size % self.stage.microbatches:
            raise ConfigError(
                f"config.{field}={self.pipeline.batch_size} is not divisible by "
                f"microbatches={self.stage.microbatches}."
            )
        meshes.check_batch(self.mesh, part, f"{field} / microbatches")
        self.abstract = jax.eval_shape(self._init, self.initial, self.frozen)
        self.step = Step(
            self.mesh,
            self.abstract,
            self.frozen,
            composer=self.composer,
            optimizer=self.stage.optimizer,
            ema_decay=self.stage.ema,
            microbatches=self.stage.microbatches,
            only=self.stage.only,
            scan=self.stage.scan,
        )

    def _init(self, initial: Any, frozen: Any) -> TrainState:
        return init_state(
            self.composer,
            self.stage.optimizer,
            seed=self.stage.seed,
            ema=self.stage.ema > 0,
            params=initial,
            frozen=frozen,
        )

    def abstract_state(self) -> TrainState:
        """Shapes with shardings, to restore into or to lower from."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.step.state_shardings,
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch, its texts as long as they can be."""
        sharding = meshes.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in self.pipeline.shapes().items()
        }

    def run(self, directory: Path) -> Any:
        """Trains to the end, or from the newest checkpoint under `directory` to the end.

        Returns the scored parameters (averaged where the stage averages) of the last step, or of
        the best checkpoint. Raises NanLoss, Preempted, CheckpointError.
        """
        stage, scores = self.stage, Scores(directory) if self.scorer else None
        with Checkpoints(directory / "checkpoints", stage.keep, scores) as checkpoints:
            state = self._restore(checkpoints)
            start = int(jax.device_get(state.step))
            unscored = False
            if scores is not None:
                scores.continue_from(start, self.scorer.metric)
                done = start in scores.values and self._logged(directory, start)
                unscored = stage.regular(start) and not done
            if start < stage.steps or unscored:
                if scores is not None:
                    scores.compare_with(self.scorer.settings)
                log = MetricsLog(directory, start) if jax.process_index() == 0 else None
                try:
                    if unscored:
                        self._score(state, start, scores, log)
                    if start < stage.steps:
                        state = self._train(state, start, checkpoints, scores, log)
                finally:
                    if log:
                        log.close()
        if scores is None:
            return state.scored
        best, _ = load_scored(directory / "checkpoints", self.abstract.params, scores)
        return placement.place(self.mesh, best)

    def _logged(self, directory: Path, step: int) -> bool:
        """Whether the score of a step is in the log, where it comes last."""
        rows = logs.read(directory / "metrics.jsonl")
        return any(row["step"] == step and self.scorer.metric in row for row in rows)

    def _score(self, state: TrainState, step: int, scores: Scores, log: MetricsLog | None) -> None:
        """Scores the parameters of a checkpoint, unless a run that was killed then has done so."""
        if step not in scores.values:
            with jax.transfer_guard("allow"):
                scores.add(step, self.scorer.measure(state.scored))
        if log:
            best = scores.ranked(scores.values)[0]
            log.write(step, {scores.metric: scores.values[step], "best_step": best}, {})

    def _restore(self, checkpoints: Checkpoints) -> TrainState:
        contents = self._contents
        restored = checkpoints.restore(self.abstract_state())
        if restored is None:
            return sharded(self.mesh, self._init, self.initial, self.frozen)
        state, position = restored
        check_weights(position, self.composer, checkpoints.directory)
        if position["data"] != repr(self.pipeline):
            raise CheckpointError(
                f"{checkpoints.directory}: was trained on other data. It read\n"
                f"  {position['data']}\n"
                f"this run reads\n  {self.pipeline!r}\nUse a new --workdir, or the old data."
            )
        # not in checkpoints of earlier versions
        if differ := differing_fields(position.get("tables", contents), contents):
            more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
            raise CheckpointError(
                f"{checkpoints.directory}: was trained on other data of the same name; a table was "
                f"built again from other files. These differ: {'; '.join(differ[:4])}{more}. Use a "
                "new --workdir, or bring the old table back into config.data_dir."
            )
        read = self.composer.contents()
        if differ := differing_fields(position.get("composer", read), read):
            raise CheckpointError(
                f"{checkpoints.directory}: was trained with other contents of the composer's "
                f"files: {', '.join(differ)}. Use a new --workdir, or bring the old files back."
            )
        step = int(jax.device_get(state.step))
        print(f"{self.stage.name}: resuming after step {step}", flush=True)
        return state

    @functools.cached_property
    def _contents(self) -> dict[str, Any]:
        """Of the tables, as they are when the stage begins."""
        return self.pipeline.contents()

    def _position(self, number: int) -> dict[str, Any]:
        """What a checkpoint says beside arrays: where it stands, and what it belongs to."""
        return {
            "next_batch": number,
            "steps": self.stage.steps,
            "data": repr(self.pipeline),
            "tables": self._contents,
            "composer": self.composer.contents(),
            "weights_id": self.composer.backbone.weights_id,
        }

    def _train(
        self,
        state: TrainState,
        start: int,
        checkpoints: Checkpoints,
        scores: Scores | None,
        log: MetricsLog | None,
    ) -> TrainState:
        stage, last_saved = self.stage, start
        pending: list[tuple[int, Any]] = []
        running: collections.deque[Any] = collections.deque()
        window_start = time.perf_counter()
        bar = Progress(
            total=stage.steps,
            initial=start,
            desc=stage.name,
            unit="step",
            disable=jax.process_index() > 0,
            mininterval=1.0,
        )
        batches = self.pipeline.batches(start, stage.steps)
        # whatever the loop moves to or from a device, it moves explicitly
        guard = jax.transfer_guard("disallow")
        with bar, contextlib.closing(batches), _preemption() as preempted, guard:
            for number, local in enumerate(batches, start + 1):
                if len(running) == AHEAD:
                    jax.block_until_ready(running.popleft())
                batch = placement.global_batch(self.mesh, local)
                state, metrics = self.step(state, self.frozen, batch)
                running.append(metrics["loss"])
                pending.append((number, metrics))
                bar.update()
                leaving = preempted(number)
                save = stage.regular(number) or leaving
                if save or number % stage.log_every == 0:
                    values = self._check(pending, checkpoints.directory, last_saved)
                    seconds = time.perf_counter() - window_start
                    rate = len(pending) * self.pipeline.batch_size / seconds
                    if log and (number % stage.log_every == 0 or number == stage.steps):
                        log.write(number, values, {"samples_per_second": rate})
                    bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} samples/s")
                    pending, window_start = [], time.perf_counter()
                if save:
                    if log:
                        log.upload()
                    checkpoints.save(state, self._position(number))
                    last_saved = number
                if leaving:
                    checkpoints.wait()
                    raise Preempted(
                        f"{stage.name}: stopped and saved after step {number}.", leaving
                    )
                if save and scores is not None:
                    self._score(state, number, scores, log)
                    window_start = time.perf_counter()
            checkpoints.wait()  # while a signal still lets the last one become whole
        return state

    def _check(
        self, pending: list[tuple[int, Any]], directory: Path, last_saved: int
    ) -> dict[str, float]:
        """The newest metrics as floats; raises NanLoss if any loss since the last look is not."""
        rows = jax.device_get(pending)
        for number, metrics in rows:
            # a finite loss with an infinite gradient has just spoilt the parameters
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                kept = f"step {last_saved} in {directory}" if last_saved else "none was saved yet"
                raise NanLoss(
                    f"{self.stage.name}: at step {number} the loss is {metrics['loss']} and the "
                    f"gradient's norm {metrics['grad_norm']}; stopped. "
                    f"Last good checkpoint: {kept}. Lower the learning rate, set "
                    "optimizer.clip_norm, or look at the batch."
                )
        return {name: float(np.asarray(value)) for name, value in rows[-1][1].items()}


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], int]]:
    """Yields preempted(step): the signal for which all processes stop at this step, 0 for none.

    SIGTERM and Ctrl-C ask for it, on whatever process; a second Ctrl-C ends this one at once. One
    that nobody asked about before the end is passed on to whoever handles it outside.
    """
    several, came = jax.process_count() > 1, []

    def note(number: int, _: Any) -> None:
        came.append(number)
        if several:
            joining.give_notice()
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nsaving before leaving; Ctrl-C once more leaves at once.\n")

    def preempted(step: int) -> int:
        if several and not multihost_utils.reached_preemption_sync_point(step):
            return 0
        return came[0] if came else signal.SIGTERM if several else 0

    numbers = [signal.SIGINT, signal.SIGTERM]
    if several and not joining.owns_sigterm():
        numbers.remove(signal.SIGTERM)  # jax listens to it
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # signals are delivered to the main thread only
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield preempted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def check_weights(position: Mapping[str, Any], composer: Composer, where: Path) -> None:
    """Raises CheckpointError when a checkpoint was trained on other backbone weights."""
    theirs, ours = position["weights_id"], composer.backbone.weights_id
    if theirs != ours:
        raise CheckpointError(
            f"{where}: was trained on the backbone {theirs}, this run has {ours}. "
            "Set --config.backbone to those weights, or train again in a new --workdir."
        )


def describe(trainer: Trainer) -> str:
    """Shapes, shardings and bytes per device of a stage, without computing (--dry_run)."""
    lines = [
        f"stage {trainer.stage.name}: {trainer.stage.steps} steps, mesh {dict(trainer.mesh.shape)}"
    ]
    groups = {
        "trainable": (trainer.abstract.params, trainer.step.state_shardings.params),
        "average": (trainer.abstract.ema, trainer.step.state_shardings.ema),
        "optimizer": (trainer.abstract.opt_state, trainer.step.state_shardings.opt_state),
        "frozen": (trainer.frozen, trainer.step.frozen_shardings),
    }
    batch = trainer.abstract_batch()
    groups["batch"] = (batch, {name: x.sharding for name, x in batch.items()})
    for group, (tree, shardings) in groups.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        specs = jax.tree.leaves(shardings)
        count = sum(math.prod(leaf.shape) for _, leaf in leaves)
        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in leaves)
        line = f"  {group}: {count:,} values, {_size(total)}"
        line += f", {_size(_per_device(tree, shardings))} per device"
        if group == "frozen" and leaves:
            ways = []
            for name, rules in placement.FROZEN.items():
                where = placement.parameter_shardings(trainer.mesh, tree, rules)
                ways.append(f"config.frozen={name}: {_size(_per_device(tree, where))}")
            line += f" ({', '.join(ways)})"
        lines.append(line)
        if group in ("trainable", "batch"):
            lines += [
                f"    {jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} {sharding.spec}"
                for (path, leaf), sharding in zip(leaves, specs, strict=True)
            ]
    return "\n".join(lines)


def _per_device(tree: Any, shardings: Any) -> int:
    """Bytes."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
