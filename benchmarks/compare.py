"""All methods on the embedded world in one comparison: trained, evaluated, timed.

    python benchmarks/compare.py                            # every run that is not in the file yet
    python benchmarks/compare.py --methods=searle,lincir    # these alone; other rows stay
    python benchmarks/compare.py --latency                  # of one query, on a quiet machine;
                                                            # needs no trained run
    python benchmarks/compare.py --render                   # the documents again, from the file

Seed s trains with seed s and reports on the test world test_s; hyper-parameters were chosen on val.
searle_oti:inversion ranks the same scenes for all seeds.

Writes benchmarks/compare.json after each run, and in the end the tables of RESULTS.md and README.md
and benchmarks/compare.png. A run that the file has, of the same config, is not made again; one that
was cut goes on in the workdir as with main.py; one that is trained, but not in the file, is
evaluated. A method more is a line in benchmarks/compare_table.py.
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
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

from benchmarks import compare_table  # noqa: E402
from benchmarks.compare_table import BASELINES, METHODS, SEEDS  # noqa: E402
from benchmarks.encoders import BUSY, cpu_name  # noqa: E402
from benchmarks.machine import busy_cores  # noqa: E402

BASELINES_OF = "slerp"
"""Whose runs evaluate the baselines, too: they are the same beside every method."""

WARM, SECONDS = 2, 2.0
"""Calls before a latency is measured; seconds to measure it in."""

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

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return {"device": device.device_kind, "cpu": cpu_name(), "cores": cores}


def read(file: Path) -> dict[str, Any]:
    """What was measured before."""
    measured = json.loads(file.read_text()) if file.is_file() else {}
    return {"command": "python benchmarks/compare.py", "runs": {}, "latency": {}} | measured


def write(file: Path, measured: dict[str, Any]) -> None:
    from cir_jax.storage.atomic import write_atomically

    text = json.dumps(measured, indent=1) + "\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


def of_run(workdir: Path, name: str, seed: int) -> Path:
    """The workdir of one run."""
    return workdir.absolute() / f"{name.replace(':', '-')}-{seed}"


def stamp(made_by: str) -> dict[str, Any]:
    """What every record says."""
    today = datetime.date.today().isoformat()
    return {"date": today, "commit": made_by, "machine": machine()}


def compare(methods: Sequence[str], preset: str, workdir: Path, output: Path) -> None:
    """All runs of the methods that `output` does not have; it is written after each."""
    import jax

    measured, made_by = read(output), commit()
    runs = measured["runs"]
    configs = {(name, seed): configured(name, seed, preset) for name in methods for seed in SEEDS}
    todo = [
        (name, seed)
        for (name, seed), config in configs.items()
        if runs.get(name, {}).get(str(seed), {}).get("config") != fingerprint(config)
    ]
    with tqdm.tqdm(total=len(configs), initial=len(configs) - len(todo), unit="run") as bar:
        for name, seed in todo:
            bar.set_description(f"{name}, seed {seed}")
            records = measure(name, configs[name, seed], of_run(workdir, name, seed))
            for method, record in records.items():
                runs.setdefault(method, {})[str(seed)] = stamp(made_by) | record
            write(output, measured)
            bar.update()
            jax.clear_caches()  # so that each run begins alike, with the programs on disk


def milliseconds(name: str, preset: str, workdir: Path) -> float | None:
    """Of one query, the first of CIRCO's likeness, from pixels and text to what the gallery is
    ranked by: the median of warm calls. None without such queries."""
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import benchmarks
    from cir_jax.input import images
    from data import build

    config = configured(name, SEEDS[0], preset)
    named = [known for known in config.evaluation.benchmarks if known.endswith("/circo")]
    if not named:
        return None
    data_dir = experiments.data_dir(config)
    build.prepare_needed({}, benchmarks.required(named), data_dir=data_dir)
    benchmark = benchmarks.load(named[0], config.evaluation.split, data_dir)
    query = benchmark.queries[0]
    image = images.decode(
        bytes(benchmark.reference(query)["image"]), "reference of the first query"
    )
    searcher = _searcher(config, of_run(workdir, name, SEEDS[0]))
    taken: list[float] = []
    while len(taken) < WARM + 5 or (sum(taken) < SECONDS and len(taken) < WARM + 100):
        start = time.perf_counter()
        searcher.query(image, query.texts[0])
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken[WARM:])


def _searcher(config: Any, directory: Path) -> Any:
    """By the run in the directory. Where there is none, by what its training begins with: the same
    computation, whatever is learned."""
    import jax

    import cir_jax
    from cir_jax import experiment as experiments
    from cir_jax.retrieval.search import Searcher

    if directory.is_dir():
        return cir_jax.load(directory, config)
    experiment = experiments.for_evaluation(experiments.setup(config))
    composer, frozen = experiment.composer, experiment.frozen
    params = jax.jit(composer.start)(jax.random.key(0), frozen)
    return Searcher(composer, params, frozen, mesh=experiment.mesh)


def measure_latency(methods: Sequence[str], preset: str, workdir: Path, output: Path) -> None:
    """Of the methods, and of the baselines beside BASELINES_OF; written after each."""
    measured, made_by = read(output), commit()
    names = [baseline.name for baseline in BASELINES] if BASELINES_OF in methods else []
    for name in tqdm.tqdm([*names, *methods], desc="latency", unit="method"):
        busy = round(busy_cores(), 2)
        if found := milliseconds(name, preset, workdir):
            record = stamp(made_by) | {"busy_cores": busy, "ms": round(found, 2)}
            if busy > BUSY * record["machine"]["cores"]:
                print(f"{name}: others kept {busy:.1f} cores busy. The tables leave its time out.")
            measured["latency"][name] = record
            write(output, measured)


def main() -> None:
    names = [method.name for method in METHODS]
    committed = ROOT / "benchmarks" / "compare.json"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default=",".join(names), help="to measure")
    parser.add_argument("--preset", choices=("shapes", "smoke"), default="shapes")
    parser.add_argument("--workdir", type=Path, default=Path("runs/table"))
    parser.add_argument("--output", type=Path, default=committed)
    parser.add_argument("--latency", action="store_true", help="measure that, train nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if wrong := sorted(set(methods) - set(names)):
        parser.error(f"--methods: no {wrong[0]}; there are {', '.join(names)}")
    if args.preset != "shapes":
        methods = [name for name in methods if ":" not in name]
    logging.set_verbosity(logging.WARNING)
    if not args.render:
        from cir_jax.errors import CirError

        run = measure_latency if args.latency else compare
        try:
            run(methods, args.preset, args.workdir, args.output)
        except CirError as error:
            raise SystemExit(str(error)) from error
    measured = read(args.output)
    if args.output.resolve() == committed:
        compare_table.render(measured, ROOT)
    print(compare_table.short_table(measured))


if __name__ == "__main__":
    main()
