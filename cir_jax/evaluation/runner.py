"""From an experiment to its tables, results.json, submissions, pictures and page."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cir_jax.errors import CheckpointError, DataError
from cir_jax.evaluation import benchmarks, per_query, report, submissions
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.contact_sheet import contact_sheet
from cir_jax.evaluation.decoding import Unclip
from cir_jax.evaluation.evaluate import evaluate_with_baselines
from cir_jax.evaluation.page import write_page
from cir_jax.evaluation.queries import Benchmark, CaptionBenchmark
from cir_jax.evaluation.result import Result
from cir_jax.experiment import Experiment, for_evaluation, stage_names
from cir_jax.sharding.placement import to_host
from cir_jax.storage.atomic import check_writable
from cir_jax.storage.places import default_cache_dir
from cir_jax.training import checkpoints
from cir_jax.training import workdir as workdirs
from cir_jax.training.stages import as_trained, given_params, scored_params
from cir_jax.weights.files import content_id


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters and where they are from: a stage and the position of its checkpoint, or ""."""

    params: Any
    stage: str = ""
    position: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def trained_params(experiment: Experiment, workdir: Path | None) -> Any:
    """The parameters of `trained`."""
    return trained(experiment, workdir).params


def trained(experiment: Experiment, workdir: Path | None) -> Trained:
    """The result of the last stage in `workdir` that has a checkpoint; {} for untrained methods.

    Where there is none, the weights of config.init_from=official:PATH or hub:NAME; workdir None =
    these. Raises CheckpointError when a trained method has neither.
    """
    if workdir:
        workdirs.say_changes(workdir, experiment.config)
    if not experiment.composer.trained:
        return Trained({})
    for name in reversed(stage_names(experiment.config)) if workdir else ():
        directory = workdir / name
        if checkpoints.finished(directory / "checkpoints"):
            params, position = scored_params(as_trained(experiment, name), directory)
            params = experiment.composer.take_over(params, experiment.frozen)
            step, steps = position["next_batch"], position["steps"]
            last = name == stage_names(experiment.config)[-1]
            if not (last and position["reached"] == steps):
                _say(f"unfinished training: evaluating step {step} of {steps} of {name}")
            elif step < steps:
                _say(f"evaluating step {step} of {steps} of {name}, the best checkpoint")
            return Trained(params, name, position)
    params = given_params(experiment)
    if params is not None:
        if jax.process_index() == 0:
            print(f"evaluating the weights of {experiment.config.init_from}")
        return Trained(params)
    raise CheckpointError(
        f"{workdir or 'no workdir given'}: no checkpoint of "
        f"{', '.join(stage_names(experiment.config))}. Train first "
        "(`python launch/main.py` with the same --config and --workdir)."
    )


def run(
    experiment: Experiment,
    params: Any,
    output: Path,
    command: Sequence[str] = (),
    alone: bool = False,
    asked: Asked | None = None,
) -> list[Result]:
    """Evaluates on all of config.evaluation.benchmarks, in config.evaluation.dtype; the baselines
    beside the method, unless `alone`. asked: of every query, beside what the benchmarks say.

    Prints a table per benchmark, with published numbers of the same protocol; writes into `output`
    `results.json`, `queries.jsonl` (see `per_query`), `report.html`, per benchmark a contact sheet
    `<benchmark>.png`, and the files for the test servers where the labels are not public. Returns
    all results.
    Raises DataError before anything is evaluated when a benchmark or `output` cannot be used.
    """
    config = experiment.config
    method = config.composer.name
    _check_writable(output)
    # all of them first: a mistake in the last one shows before the first is evaluated
    loaded = [
        benchmarks.load(
            name,
            config.evaluation.split,
            experiment.data_dir,
            allow_partial=config.evaluation.get("allow_partial", False),
        )
        for name in config.evaluation.benchmarks
    ]
    experiment = for_evaluation(experiment)
    if not experiment.composer.pretrained_backbone:  # its weights are what was trained
        name = experiment.backbone.weights_id.partition("@")[0]
        identity = content_id(name, jax.tree.map(to_host, params))
        backbone = dataclasses.replace(experiment.backbone, weights_id=identity)
        experiment.composer.backbone = backbone
    trained = ""
    if experiment.composer.trained:
        trained = content_id(method, jax.tree.map(to_host, params))
    decode = None
    if model := config.evaluation.get("decoder", ""):  # not in configs of earlier versions
        decode = Unclip(model, experiment.backbone)
    everything: list[Result] = []
    evaluated: list[tuple[Benchmark, list[Result]]] = []
    for benchmark in loaded:
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
            alone=alone,
            asked=asked,
        )
        if trained:
            last = results[-1]
            results[-1] = dataclasses.replace(last, setting={**last.setting, "trained": trained})
        papers = report.published_rows(results)
        _say("")
        report.print_table(results, papers)
        if isinstance(benchmark, CaptionBenchmark) and benchmark.absent:
            dataset = benchmark.data.partition("@")[0]
            _say(
                f"without the ground truths {', '.join(benchmark.absent)}: they are not prepared "
                f"(data/{dataset}/README.md says which files they are made of)"
            )
        everything += results
        if isinstance(benchmark, Benchmark):
            _retrieved(results[-1], benchmark, output, decode)
            evaluated.append((benchmark, results))
    if evaluated:
        write_page(output / "report.html", f"{config.name}: what was retrieved", evaluated)
        _say(f"\npage: {output / 'report.html'}")
        per_query.write(output / per_query.FILE, evaluated)
        _say(f"queries: {output / per_query.FILE}")
    settings = config.composer.to_dict() | ({"asked": asked.said} if asked else {})
    report.write_results(output / "results.json", everything, command, settings)
    _say(f"results: {output / 'results.json'}")
    return everything


def _retrieved(result: Result, benchmark: Benchmark, output: Path, decode: Unclip | None) -> None:
    """The contact sheet, or the submission where there is no public ground truth."""
    if result.outcome is not None:
        picture = output / f"{submissions.file_name(benchmark.name)}.png"
        if decode is not None and result.composed is None:
            _say(f"not decoded: {result.method} composes no features of the backbone")
            decode = None
        contact_sheet(result, benchmark, picture, decode=decode)
        _say(f"pictures: {picture}")
        return
    for path in submissions.write(result, benchmark, output):
        server = submissions.SERVERS[benchmark.protocol.name]
        refused = " (would reject it: the data are partial)" if benchmark.partial else ""
        _say(f"submission: {path}  ->  {server}{refused}")


def _check_writable(output: Path) -> None:
    if jax.process_index() != 0:
        return
    try:
        check_writable(output)
    except OSError as error:
        raise DataError(
            f"{output}: nothing can be written there ({error.strerror}). Choose another folder "
            "with --workdir or --output."
        ) from error


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
