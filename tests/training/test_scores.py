"""The best checkpoint is the one whose parameters scored best, whatever was killed meanwhile."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from cir_jax.errors import CheckpointError
from cir_jax.training import loop
from cir_jax.training.checkpoints import load_scored
from cir_jax.training.loop import Preempted
from cir_jax.training.scores import FILE, Scorer
from tests.training.line import trainer

STEPS, BEST = 10, 4  # a checkpoint every 2
EMA = 0.5


class Killed(BaseException):
    pass


def run(directory, best, measure=None, before=None, settings=None, **stage):
    """best: parameters of the step to be found; measure: called before each score."""

    def score(params):
        if measure:
            measure()
        return -sum(
            jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).sum()), params, best))
        )

    made = trainer(steps=STEPS, ema=EMA, keep=1, before=before, **stage)
    made.scorer = Scorer("val/line R@1", score, settings or {})
    return jax.device_get(made.run(directory))


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The averaged parameters of step BEST."""
    made = trainer(steps=BEST, ema=EMA)
    return jax.device_get(made.run(tmp_path_factory.mktemp("best")))


def found(directory):
    """All that an interruption must not change."""
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "speed"} for row in rows]
    kept = sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    return rows, json.loads((directory / FILE).read_text()), kept


@pytest.fixture(scope="module")
def unbroken(best, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    result = run(directory, best)
    jax.tree.map(np.testing.assert_array_equal, result, best)
    return directory, found(directory)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_taken(unbroken, best):
    directory, (rows, scores, kept) = unbroken
    assert kept == [BEST, STEPS]
    scored = [(row["step"], row["best_step"]) for row in rows if "val/line R@1" in row]
    assert scored == [(2, 2), (4, 4), (6, 4), (8, 4), (10, 4)]
    assert scores["metric"] == "val/line R@1" and scores["scores"]["4"] == 0.0
    assert [row["val/line R@1"] for row in rows if "best_step" in row] == list(
        scores["scores"].values()
    )
    params, position = load_scored(directory / "checkpoints", best)
    jax.tree.map(np.testing.assert_array_equal, params, best)
    assert (position["next_batch"], position["reached"]) == (BEST, STEPS)
    again = run(directory, best, measure=lambda: pytest.fail("all are scored"))
    jax.tree.map(np.testing.assert_array_equal, again, best)


@pytest.mark.parametrize("moment", ["between checkpoints", "before the score", "before its line"])
def test_a_killed_run_chooses_the_same(unbroken, best, tmp_path, monkeypatch, moment):
    calls = []

    def third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Killed

    with pytest.raises(Killed), monkeypatch.context() as patch:
        if moment == "between checkpoints":
            run(tmp_path, best, before=lambda step: third() if step > 4 else None)
        elif moment == "before the score":
            run(tmp_path, best, measure=third)
        else:
            write = loop.MetricsLog.write

            def cut(log, step, metrics, speed):
                if "best_step" in metrics:
                    third()
                write(log, step, metrics, speed)

            patch.setattr(loop.MetricsLog, "write", cut)
            run(tmp_path, best)
    result = run(tmp_path, best)
    jax.tree.map(np.testing.assert_array_equal, result, best)
    assert found(tmp_path) == unbroken[1]


def test_a_signal_is_not_kept_waiting_by_a_score(unbroken, best, tmp_path):
    def send(at):
        return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None

    for at in (4, 7, STEPS):  # of these, 7 is no checkpoint of an unbroken run
        with pytest.raises(Preempted, match=f"saved after step {at}"):
            run(tmp_path, best, before=send(at))
        assert str(at) not in found(tmp_path)[1]["scores"]
    result = run(tmp_path, best)
    jax.tree.map(np.testing.assert_array_equal, result, best)
    assert found(tmp_path) == unbroken[1]


def test_scores_of_other_settings_are_not_compared(best, tmp_path):
    def killed():
        raise Killed

    said = r"evaluation.dtype \(was 'float32', is 'bfloat16'\)"
    same = {"composer.guidance": (2.5, 2.0)}
    ours, other = ({"evaluation.dtype": name} | same for name in ("float32", "bfloat16"))
    with pytest.raises(Killed):
        run(tmp_path, best, before=lambda step: killed() if step > 6 else None, settings=ours)
    before = found(tmp_path)
    with pytest.raises(CheckpointError, match=f"cannot be compared with theirs: {said}. Go on"):
        run(tmp_path, best, settings=other)
    assert found(tmp_path) == before
    run(tmp_path, best, settings=ours)
    run(tmp_path, best, settings=other)  # nothing is left to score


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(best, tmp_path, caplog):
    run(tmp_path, best)
    (tmp_path / "checkpoints" / str(BEST) / "position" / "metadata").write_text("{}")
    params, position = load_scored(tmp_path / "checkpoints", best)
    assert position["next_batch"] == STEPS and "4 is not readable (damaged" in caplog.text


def test_what_is_no_file_of_scores_or_of_another_metric(tmp_path, best):
    (tmp_path / FILE).write_text('{"metric": "val/cirr R@5", "scores": {"2": 3.5}}')
    with pytest.raises(CheckpointError, match="holds val/cirr R@5, config.checkpoint.best says"):
        run(tmp_path, best)
    for content in ("[]", "{", '{"metric": "", "scores": {"a": 1}}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(CheckpointError, match="not as training wrote it .*or delete it"):
            run(tmp_path, best)
