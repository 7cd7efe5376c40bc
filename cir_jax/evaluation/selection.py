"""Which checkpoint is the best: `config.checkpoint.best`, such as "cirr R@1".

One metric of one benchmark on its validation split, of the parameters that are evaluated (averaged
where a stage averages). Test splits cannot be chosen by.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cir_jax.errors import ConfigError, unknown
from cir_jax.evaluation import benchmarks
from cir_jax.evaluation.evaluate import evaluate
from cir_jax.experiment import Experiment, for_evaluation
from cir_jax.retrieval import features
from cir_jax.storage.places import default_cache_dir
from cir_jax.training.scores import Scorer

SPLIT = "val"


def wanted(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Benchmark and metric of config.checkpoint.best, None where it is not set.

    Raises ConfigError for ones that do not exist, with those that do.
    """
    best = config["checkpoint"].get("best", "")  # not in configs of earlier versions
    if not best:
        return None
    name, _, metric = best.strip().rpartition(" ")
    field = f"config.checkpoint.best={best!r}"
    if not name:
        raise ConfigError(f"{field}: expected a benchmark and one of its metrics, as in 'cirr R@1'")
    base, composed = name.partition(":")[0], _composed()
    if base not in composed:
        what = f"benchmark to choose a checkpoint by in {field}:"
        raise ConfigError(unknown(what, base, composed))
    protocol = benchmarks.find(name).protocol
    rising = [one for one in protocol.headline if not one.endswith(" rank")]
    if metric not in rising:
        raise ConfigError(unknown(f"metric of {name} in {field}:", metric, rising))
    return name, metric


def _composed() -> list[str]:
    """Benchmarks of composed queries, but for those that are a test alone."""
    return [
        name
        for name, entry in benchmarks.REGISTRY.items()
        if not entry.truths
        and entry.table != "pretrain"
        and entry.protocol.text != "inversion"
        and entry.split != "test"
    ]


def required(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """Dataset -> tables that choosing reads."""
    found = wanted(config)
    return benchmarks.required([found[0]] if found else [])


def scorer(experiment: Experiment) -> Scorer | None:
    """What scores the checkpoints of the experiment, None where config.checkpoint.best is not set.

    Image features are computed once. Raises ConfigError, and DataError for data that are not
    there.
    """
    found = wanted(experiment.config)
    if found is None:
        return None
    name, metric = found
    experiment = for_evaluation(experiment)
    config, composer, frozen = experiment.config, experiment.composer, experiment.frozen
    if not composer.pretrained_backbone:
        raise ConfigError(
            f"config.checkpoint.best={config.checkpoint.best!r}: {config.name} trains a backbone, "
            "which composes no queries. Leave it empty."
        )
    benchmark = benchmarks.load(
        name,
        SPLIT,
        experiment.data_dir,
        allow_partial=config.evaluation.get("allow_partial", False),
    )
    options = dict(
        mesh=experiment.mesh,
        batch_size=config.evaluation.batch_size,
        cache_dir=default_cache_dir(),
    )

    @functools.cache
    def gallery() -> np.ndarray | None:
        if not features.uses_backbone_gallery(composer):
            return None
        backbone = composer.backbone
        return features.image_features(backbone, frozen["backbone"], benchmark.gallery, **options)

    def measure(params: Any) -> float:
        result = evaluate(
            composer,
            params,
            frozen,
            benchmark,
            seed=config.seed,
            image_features=gallery(),
            **options,
        )
        return result.metrics[metric].value

    settings = {
        "evaluation.dtype": composer.backbone.dtype.name,
        "data": benchmark.data,
        **{f"composer.{key}": config.composer.get(key) for key in composer.inference_settings},
    }
    return Scorer(f"{SPLIT}/{name} {metric}", measure, settings)
