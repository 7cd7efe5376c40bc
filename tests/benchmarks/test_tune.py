"""Tuning: every method alike, on val, from a committed command; what it says is what we use."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import tune
from cir_jax.weights.fingerprint import fingerprint
from tests.launch.binaries import environment, run_command


@pytest.mark.parametrize("method", tune.GRIDS)
def test_the_budget_is_the_same_for_all_and_holds_the_default(method):
    default = tune.configured(method, "shapes").composer.to_dict()
    points = tune.settings(method, default)
    assert points[0] == {name: default[name] for name in tune.GRIDS[method]}
    assert tune.BUDGET - 1 <= len(points) <= tune.BUDGET
    assert len({json.dumps(point) for point in points}) == len(points)


@pytest.mark.parametrize("method", tune.GRIDS)
def test_the_experiment_has_the_setting_that_was_chosen(method):
    rows = json.loads((Path(tune.__file__).parent / "tune.json").read_text())["methods"][method]
    default = tune.configured(method, "shapes").composer.to_dict()
    assert [row["setting"] for row in rows] == json.loads(
        json.dumps(tune.settings(method, default))
    )
    assert tune.best(rows) is rows[0] and len({row["weights"] for row in rows}) == 1


def test_the_best_on_val_is_chosen_and_the_default_where_it_is_as_good():
    def row(value, **setting):
        return {"setting": setting, "val": {"circo mAP@10": value, "cirr R@1": -value}}

    rows = [row(3.0, alpha=0.8), row(5.0, alpha=0.5), row(5.0, alpha=0.6)]
    assert tune.best(rows) is rows[1]
    shown = tune.table({"methods": {"slerp": rows}}).splitlines()
    assert shown[2:] == [
        "| slerp | alpha=0.8 | 3.0 |",
        "| slerp | alpha=0.5 | **5.0** |",
        "| slerp | alpha=0.6 | 5.0 |",
    ]


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_cut(tmp_path):
    output = tmp_path / "tune.json"
    command = [sys.executable, tune.__file__, "--methods=slerp", "--preset=smoke"]
    command += [f"--workdir={tmp_path}", f"--output={output}"]
    alphas = (0.8, 0.5, 0.6, 0.65, 0.7, 0.75, 0.85, 0.9, 0.95)
    known = [
        {"setting": {"alpha": alpha}, "weights": fingerprint({}), "val": {"circo mAP@10": value}}
        for alpha, value in zip(alphas[1:], range(99, 91, -1), strict=True)
    ]
    other = known.pop(1) | {"weights": "others", "val": {"circo mAP@10": 100.0}}
    output.write_text(json.dumps({"methods": {"slerp": [*known, other]}}))
    status, said = run_command(command, environment(tmp_path))
    assert status == 0, said
    rows = json.loads(output.read_text())["methods"]["slerp"]
    assert [row["setting"]["alpha"] for row in rows] == list(alphas)
    assert [rows[1], *rows[3:]] == known  # not measured again
    assert rows[2]["weights"] == fingerprint({})
    assert max(rows[0]["val"]["circo mAP@10"], rows[2]["val"]["circo mAP@10"]) < 90
    assert "| slerp | alpha=0.5 | **99.0** |" in said
    status, said = run_command([*command, "--methods=text"], environment(tmp_path))
    assert status and "no text; there are slerp, palavra" in said
