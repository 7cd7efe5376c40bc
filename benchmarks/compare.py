"""All methods on the embedded world in one comparison: trained, evaluated, timed.

    python benchmarks/compare.py                            # every run that is not in the file yet
    python benchmarks/compare.py --methods=searle,lincir    # these alone; other rows stay

Seed s trains with seed s and reports on the test world test_s; hyper-parameters were chosen on val.
searle_oti:inversion ranks the same scenes for all seeds.

Writes benchmarks/compare.json after each run. A run that the file has, of the same config, is not
made again; one that was cut goes on in the workdir as with main.py, where it is trained and only
the file lacks it, it is evaluated.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tqdm  # noqa: E402
from absl import logging  # noqa: E402

METHODS = (
    *("slerp", "palavra", "pic2word", "searle_oti", "searle", "lincir", "compodiff"),
    *("rtd", "pdv", "tat", "clip4cir", "combiner", "magiclens", "artemis"),
    # with a preset of their own, in --preset=shapes only; the second one's words on no test world
    *("compodiff:shapes_long", "searle_oti:inversion"),
)
"""Experiments, the cheap ones that others are compared with first."""

BASELINES_OF = "slerp"
"""Whose runs evaluate the baselines, too: they are the same beside every method."""

SEEDS = (0, 1, 2)
TRAINING = "training.json"
"""In a run's workdir: what its training took, if it was one go from the beginning."""


def configured(name: str, seed: int, preset: str) -> Any:
    """The config of a run of method `name`."""
    from cir_jax.loading import read_experiment

    method, _, own = name.partition(":")
    config = read_experiment(f"{method}:{own or preset}")
    config.seed = seed
    if own != "inversion":
        config.evaluation.split = f"test_{seed}"
    return config


def fingerprint(config: Any) -> str:
    """Of all fields of a config."""
    text = json.dumps(json.loads(config.to_json_best_effort()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(experiment: Any, directory: Path) -> Any:
    """The parameters, trained or read back; {} where nothing is trained.

    Notes in the workdir what a training took that began there and ended in one go.
    """
    from cir_jax.storage.atomic import write_atomically
    from cir_jax.training import stages

    begun = any((directory / name).exists() for name in experiment.config.stages)
    load, wall, cpu = os.getloadavg()[0], time.perf_counter(), sum(os.times()[:4])
    params = stages.train(experiment, directory)
    if params is None:
        return {}
    if not begun:
        taken = {
            "cpu_seconds": round(sum(os.times()[:4]) - cpu, 1),
            "wall_seconds": round(time.perf_counter() - wall, 1),
            "load_before": round(load, 1),
        }
        write_atomically(directory / TRAINING, lambda file: file.write(json.dumps(taken).encode()))
    return params


def trained_parameters(experiment: Any) -> int:
    """How many numbers the stages train; those that two stages train count once."""
    import jax

    from cir_jax.experiment import of_stage, stage_names
    from cir_jax.training import optimizers

    found: dict[str, int] = {}
    for name in stage_names(experiment.config):
        recipe = experiment.config.stage[name]
        if recipe.kind == "inversion":
            continue
        composer = of_stage(experiment, name, shapes_only=True).composer
        tree = jax.eval_shape(composer.init, jax.random.key(0))
        mask = optimizers.path_mask(recipe.optimizer.only)(tree)
        sizes = jax.tree.map(lambda x, trained: x.size * trained, tree, mask)
        composed_by = json.dumps(recipe.composer.to_dict(), sort_keys=True)
        found[composed_by] = max(found.get(composed_by, 0), sum(jax.tree.leaves(sizes)))
    return sum(found.values())


def measure(name: str, config: Any, directory: Path) -> dict[str, dict[str, Any]]:
    """Trains and evaluates one run: method -> its record, the baselines' with BASELINES_OF's."""
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import benchmarks, runner
    from cir_jax.training import stages
    from cir_jax.training import workdir as workdirs
    from data import build

    build.prepare_needed(
        stages.required_tables(config),
        benchmarks.required(config.evaluation.benchmarks),
        data_dir=experiments.data_dir(config),
    )
    workdirs.claim(directory, config)
    with workdirs.only_run(directory):
        experiment = experiments.setup(config)
        params = train(experiment, directory)
        results = runner.run(experiment, params, directory, alone=name != BASELINES_OF)
    records: dict[str, dict[str, Any]] = {}
    for result in results:
        row = name if result.method == config.composer.name else result.method
        metrics = records.setdefault(row, {"metrics": {}})["metrics"]
        for metric, estimate in result.metrics.items():
            kind = result.benchmark.partition("/")[2]
            metrics[f"{kind} {metric}"] = round(estimate.value, 4)
    taken = directory / TRAINING
    records[name] |= {
        "config": fingerprint(config),
        "parameters": trained_parameters(experiment),
        "training": json.loads(taken.read_text()) if taken.is_file() else None,
    }
    return records


def commit() -> str:
    """Of this checkout; "-dirty" behind it where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout[:-1]


def machine() -> dict[str, Any]:
    import jax

    from benchmarks.encoders import cpu_name

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return {"device": device.device_kind, "cpu": cpu_name(), "cores": cores}


def compare(methods: Sequence[str], preset: str, workdir: Path, output: Path) -> dict[str, Any]:
    """All runs of the methods that `output` does not have; it is written after each."""
    import jax

    from cir_jax.storage.atomic import write_atomically

    measured: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    measured = {"command": "python benchmarks/compare.py", "runs": {}} | measured
    runs, made_by = measured["runs"], commit()
    configs = {(name, seed): configured(name, seed, preset) for name in methods for seed in SEEDS}
    todo = [
        (name, seed)
        for (name, seed), config in configs.items()
        if runs.get(name, {}).get(str(seed), {}).get("config") != fingerprint(config)
    ]
    bar = tqdm.tqdm(total=len(configs), initial=len(configs) - len(todo), unit="run")
    for name, seed in todo:
        bar.set_description(f"{name}, seed {seed}")
        directory = workdir.absolute() / f"{name.replace(':', '-')}-{seed}"
        records = measure(name, configs[name, seed], directory)
        for method, record in records.items():
            today = datetime.date.today().isoformat()
            made = {"date": today, "commit": made_by, "machine": machine()}
            runs.setdefault(method, {})[str(seed)] = made | record
        text = json.dumps(measured, indent=1) + "\n"
        write_atomically(output, lambda file, text=text: file.write(text.encode()))
        bar.update()
        jax.clear_caches()  # so that each run begins alike, with the programs on disk
    bar.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="to measure")
    parser.add_argument("--preset", choices=("shapes", "smoke"), default="shapes")
    parser.add_argument("--workdir", type=Path, default=Path("runs/table"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "compare.json")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if wrong := sorted(set(methods) - set(METHODS)):
        parser.error(f"--methods: no {wrong[0]}; there are {', '.join(METHODS)}")
    if args.preset != "shapes":
        methods = [name for name in methods if ":" not in name]
    logging.set_verbosity(logging.WARNING)
    compare(methods, args.preset, args.workdir, args.output)


if __name__ == "__main__":
    main()
