"""Settings of the methods, tuned alike on val of the embedded world.

    python benchmarks/tune.py --workdir=runs/table

Each method gets up to BUDGET settings of its query; nothing is trained for them. Trained methods
are read from the runs of seed 0 that benchmarks/compare.py leaves in the workdir, and trained there
if there are none. Combiner, MagicLens, ISA and RTD, whose queries have no settings, are trained for
each of their own: the last stage, the ones before it once. Chosen is the best CIRCO-like mAP@10 on
val; the test worlds are not looked at. Writes benchmarks/tune.json after each setting and goes on
there, with the same weights; --methods=palavra,slerp tunes these alone. README's numbers use the
settings of experiments/, which this file must confirm.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tqdm  # noqa: E402
from absl import logging  # noqa: E402

BUDGET = 9
"""Settings per method, the default among them."""

ALPHAS = {"alpha": (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)}
LINKS = {"link": (",", "that", "and", "but", "which", "of", "with", "which is", "that is")}
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "slerp": ALPHAS,
    "palavra": {"refine_steps": (30, 100), "refine_learning_rate": (0.01, 0.02, 0.05, 0.1)},
    "pic2word": LINKS,
    "searle_oti": {"iterations": (50, 100, 200), "learning_rate": (1e-2, 2e-2, 5e-2)},
    "combiner": {"dropout": (0.1, 0.3, 0.5), "scale": (10.0, 20.0, 40.0)},
    "pdv": {"alpha_image": (0.3, 0.6, 1.0), "beta": (0.4, 0.6, 0.8)},
    "tat": ALPHAS,
    "rtd": {"noise": (0.0, 0.5, 1.0), "temperature": (0.03, 0.07, 0.2)},
    "magiclens": {
        "initial": ("sum", "random"),
        "query_negatives": (True, False),
        "temperature": (0.07, 0.15),
    },
    "artemis": {"embed_dim": (128, 256, 512), "temperature": (2.0, 2.65926, 3.5)},
    "slerp:blip": ALPHAS,
    "pic2word:blip": LINKS,
    "isa": {"dropout": (0.0, 0.5), "tokens": (2, 6), "temperature": (0.03, 0.07)},
    "compodiff": {"steps": (2, 5, 10), "guidance": ((2.5, 2.0), (1.5, 7.5), (1.0, 1.0))},
}
"""Method or METHOD:PRESET -> setting -> values; the product is tried. SEARLE, LinCIR have none."""

CHOSEN_BY = ("circo", "mAP@10")


def configured(name: str, preset: str) -> Any:
    """The config of a name in GRIDS."""
    from cir_jax.loading import read_experiment

    method, _, own = name.partition(":")
    return read_experiment(f"{method}:{own or preset}")


def settings(method: str, default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The grid's points, that of the experiment among them; BUDGET at most."""
    grid = GRIDS[method]
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    own = {name: default[name] for name in grid}
    points = [own, *(point for point in points if point != own)]
    if len(points) > BUDGET:
        raise ValueError(f"{method}: {len(points)} settings, the budget is {BUDGET}")
    return points


def tune(method: str, preset: str, workdir: Path, known: Sequence[Mapping[str, Any]]) -> Iterator:
    """Yields {"setting", "weights", "val": {"circo mAP@10": ...}} of each setting.

    Those `known` of the same weights are kept: the trained ones, or where each setting is trained,
    the backbone's.
    """
    from benchmarks.compare import of_run
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import benchmarks, selection
    from cir_jax.evaluation.runner import trained_params
    from cir_jax.training import stages
    from cir_jax.training import workdir as workdirs
    from cir_jax.weights.fingerprint import fingerprint
    from data import build

    config = configured(method, preset)
    config.evaluation.split = "test_0"  # as benchmarks/compare.py stores it; val is read below
    build.prepare_needed(
        stages.required_tables(config),
        benchmarks.required(config.evaluation.benchmarks),
        data_dir=experiments.data_dir(config),
    )
    directory = of_run(workdir, method, 0)
    experiment = experiments.setup(config)
    of_query = not config.stages or set(GRIDS[method]) <= {*experiment.composer.inference_settings}
    before, last = config.stages[:-1], config.stages[-1:]
    if config.stages and (of_query or before):
        workdirs.claim(directory, config)
        config.stages = config.stages if of_query else before
        stages.train(experiment, directory)
    kind, metric = CHOSEN_BY
    (name,) = (name for name in config.evaluation.benchmarks if name.endswith(f"/{kind}"))
    params = trained_params(experiment, directory) if of_query else None
    weights = fingerprint(params) if of_query else experiment.backbone.weights_id
    done = {json.dumps(row["setting"]): row for row in known if row["weights"] == weights}
    points = settings(method, config.composer.to_dict())
    for point in tqdm.tqdm(points, desc=f"tuning {method}", unit="setting"):
        key = json.dumps(point)
        if key in done:
            yield done[key]
            continue
        config.composer.update(point)
        experiment = experiments.setup(config)
        if not of_query:
            config.stages = last
            with tempfile.TemporaryDirectory() as scratch:
                for stage in before:
                    (Path(scratch) / stage).symlink_to(directory / stage)
                params = stages.train(experiment, Path(scratch))
        chosen_by = config.copy_and_resolve_references()
        chosen_by.checkpoint.best = f"{name} {metric}"
        scorer = selection.scorer(dataclasses.replace(experiment, config=chosen_by))
        assert scorer is not None
        value = scorer.measure(params)
        val = {f"{kind} {metric}": round(value, 3)}
        yield {"setting": json.loads(key), "weights": weights, "val": val}


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first of the best: the experiment's own setting where others are only as good."""
    return max(rows, key=lambda row: row["val"][" ".join(CHOSEN_BY)])


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: each method's settings with their val numbers, the chosen one bold."""
    lines = [f"| method | setting | val {' '.join(CHOSEN_BY)} |", "| --- | --- | --- |"]
    for method, rows in measured["methods"].items():
        chosen = best(rows)
        for row in rows:
            said = ", ".join(f"{name}={value}" for name, value in row["setting"].items())
            value = f"{row['val'][' '.join(CHOSEN_BY)]:.1f}"
            lines.append(f"| {method} | {said} | {f'**{value}**' if row is chosen else value} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/table"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "tune.json")
    parser.add_argument("--preset", choices=("shapes", "smoke"), default="shapes")
    parser.add_argument("--methods", default=",".join(GRIDS), help="to tune")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if wrong := sorted(set(methods) - set(GRIDS)):
        parser.error(f"--methods: no {wrong[0]}; there are {', '.join(GRIDS)}")
    logging.set_verbosity(logging.WARNING)
    before = json.loads(args.output.read_text()) if args.output.is_file() else {"methods": {}}
    measured: dict[str, Any] = {
        "command": "python benchmarks/tune.py",
        "split": "val",
        "chosen_by": " ".join(CHOSEN_BY),
        "date": datetime.date.today().isoformat(),
        "methods": dict(before["methods"]),
    }
    for method in methods:
        known = before["methods"].get(method, [])
        rows: list[Mapping[str, Any]] = []
        for row in tune(method, args.preset, args.workdir, known):
            rows.append(row)
            # those that come later, of a run that was cut, stay until they are reached
            later = [r for r in known if all(r["setting"] != done["setting"] for done in rows)]
            measured["methods"][method] = rows + later
            args.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
