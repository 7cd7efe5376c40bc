"""From an experiment to its tables, results.json and pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cir_jax.errors import CheckpointError
from cir_jax.evaluation import benchmarks, report
from cir_jax.evaluation.benchmarks import Benchmark
from cir_jax.evaluation.contact_sheet import contact_sheet
from cir_jax.evaluation.evaluate import evaluate_with_baselines
from cir_jax.evaluation.result import Result
from cir_jax.retrieval.batches import to_host
from cir_jax.retrieval.cache import default_cache_dir
from cir_jax.training.experiment import Experiment, scored_params, stage_names
from cir_jax.weights.files import content_id


def trained_params(experiment: Experiment, workdir: Path) -> Any:
    """The result of the last stage in `workdir` that has a checkpoint; {} for untrained methods.

    Raises CheckpointError when a trained method has none.
    """
    if not experiment.composer.trained:
        return {}
    for name in reversed(stage_names(experiment.config)):
        directory = workdir / name
        if any(path.name.isdigit() for path in (directory / "checkpoints").glob("*")):
            params, position = scored_params(experiment, directory)
            step, steps = position["next_batch"], position["steps"]
            last = name == stage_names(experiment.config)[-1]
            if jax.process_index() == 0 and not (last and step == steps):
                print(f"unfinished training: evaluating step {step} of {steps} of {name}")
            return params
    raise CheckpointError(
        f"{workdir}: no checkpoint of {', '.join(stage_names(experiment.config))}. Train first "
        "(`python launch/main.py` with the same --config and --workdir)."
    )


def run(
    experiment: Experiment, params: Any, output: Path, command: Sequence[str] = ()
) -> list[Result]:
    """Evaluates on all of config.evaluation.benchmarks, the baselines beside the method.

    Prints a table per benchmark; writes `results.json` and `<benchmark>.png` (a contact sheet)
    into `output`. Returns all results.
    """
    config = experiment.config
    method = config.composer.name
    if not experiment.composer.pretrained_backbone:  # its weights are what was trained
        name = experiment.backbone.weights_id.partition("@")[0]
        identity = content_id(name, jax.tree.map(to_host, params))
        backbone = dataclasses.replace(experiment.backbone, weights_id=identity)
        experiment.composer.backbone = backbone
    everything: list[Result] = []
    for name in config.evaluation.benchmarks:
        benchmark = benchmarks.load(name, config.evaluation.split, experiment.data_dir)
        results = evaluate_with_baselines(
            experiment.composer,
            params,
            experiment.frozen,
            benchmark,
            mesh=experiment.mesh,
            batch_size=config.evaluation.batch_size,
            seed=config.seed,
            cache_dir=default_cache_dir(),
            method=method,
        )
        if jax.process_index() == 0:
            print()
        report.print_table(results)
        everything += results
        if isinstance(benchmark, Benchmark) and results[-1].outcome is not None:
            picture = output / f"{name.replace('/', '_')}.png"
            contact_sheet(results[-1], benchmark, picture)
            if jax.process_index() == 0:
                print(f"pictures: {picture}", flush=True)
    report.write_results(output / "results.json", everything, command)
    if jax.process_index() == 0:
        print(f"\nresults: {output / 'results.json'}", flush=True)
    return everything
