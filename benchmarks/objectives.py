"""Why CompoDiff stays behind Slerp on the embedded world: the same triplets, two objectives.

    python benchmarks/objectives.py

A perceptron of the features of reference image and modification text predicts the target's. Squared
error is what CompoDiff is trained with (section 3.2): its best prediction is the mean of all
targets that fit the query. InfoNCE tells the target from those of the other queries.
CIRCO-like mAP@10 on val after every 100 steps, three seeds. Writes benchmarks/objectives.json.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import logging  # noqa: E402

from cir_jax import experiment as experiments  # noqa: E402
from cir_jax.composers import losses  # noqa: E402
from cir_jax.composers.base import Composer, Params, Query, normalise  # noqa: E402
from cir_jax.composers.slerp import Slerp  # noqa: E402
from cir_jax.evaluation import benchmarks, selection  # noqa: E402
from cir_jax.loading import read_experiment  # noqa: E402
from cir_jax.models.backbone import Backbone  # noqa: E402
from cir_jax.training import stages  # noqa: E402
from cir_jax.training.scores import Scores  # noqa: E402
from data import build  # noqa: E402

OBJECTIVES = ("squared error", "InfoNCE")
STEPS, EVERY = 800, 100
SEEDS = (0, 1, 2)
TEMPERATURE = 0.05


class Perceptron(Composer):
    """(reference image feature, text feature) -> target feature."""

    trained = True

    def __init__(self, backbone: Backbone, objective: str):
        super().__init__(backbone)
        self.objective_name = objective
        self.model = nn.Sequential(
            [nn.Dense(8 * backbone.dim), nn.gelu, nn.Dense(8 * backbone.dim), nn.gelu]
            + [nn.Dense(backbone.dim)]
        )

    def init(self, rng: jax.Array) -> Params:
        return self.model.init(rng, jnp.zeros((1, 2 * self.backbone.dim)))["params"]

    def predict(self, params: Params, frozen: Params, query: Query) -> jax.Array:
        """Features of unit variance, as CompoDiff's are scaled here: float32[batch, dim]."""
        image = normalise(self.reference_features(frozen, query))
        text = normalise(self.backbone.encode_text(frozen["backbone"], query["token_ids"]))
        both = jnp.concatenate([image, text], axis=-1) * self.backbone.dim**0.5
        return self.model.apply({"params": params}, both)

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        target = normalise(batch["target_features"]) * self.backbone.dim**0.5
        return {"predicted": self.predict(params, frozen, batch), "target": target}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        predicted, target = rows["predicted"], rows["target"]
        if self.objective_name == "squared error":
            return jnp.mean(jnp.square(predicted - target)), {}
        return losses.info_nce(normalise(predicted), normalise(target), 1 / TEMPERATURE), {}

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return normalise(self.predict(params, frozen, query))


def prepared(preset: str) -> experiments.Experiment:
    """CompoDiff's experiment with a stage of its triplets alone, scored on val as it goes."""
    config = read_experiment(f"compodiff:{preset}")
    stage = config.stage.stage2
    stage.after = ""
    stage.data.tables = {"captions": 0.0, "triplets": 1.0}
    stage.duration, stage.optimizer.schedule = f"{STEPS} steps", "constant"
    config.checkpoint.every = f"{EVERY} steps"
    (name,) = (name for name in config.evaluation.benchmarks if name.endswith("/circo"))
    config.checkpoint.best = f"{name} mAP@10"
    config.stages = ("stage2",)
    needed = benchmarks.required([name])
    data_dir = experiments.data_dir(config)
    build.prepare_needed(stages.required_tables(config), needed, data_dir=data_dir)
    return experiments.setup(config)


def scores(experiment: experiments.Experiment, seed: int) -> dict[int, float]:
    """Steps -> CIRCO-like mAP@10 on val."""
    experiment.config.seed = seed
    with tempfile.TemporaryDirectory() as workdir:
        scorer = selection.scorer(experiment)
        stages.make_trainer(experiment, "stage2", None, scorer=scorer).run(Path(workdir))
        return Scores(Path(workdir)).values


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: rows = steps, columns = objectives, mean +- standard deviation over the seeds."""
    lines = ["| steps | " + " | ".join(OBJECTIVES) + " |", "| ---" * (1 + len(OBJECTIVES)) + " |"]
    for steps, row in measured["mAP@10"].items():
        cells = (f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in row.values())
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"\nSlerp: {measured['slerp']:.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=("shapes", "smoke"), default="shapes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "objectives.json")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    experiment = prepared(args.preset)
    values: dict[str, dict[str, list[float]]] = {}
    for objective in OBJECTIVES:
        composer = Perceptron(experiment.backbone, objective)
        for seed in SEEDS:
            found = scores(dataclasses.replace(experiment, composer=composer), seed)
            for steps, value in found.items():
                row = values.setdefault(str(steps), {})
                row.setdefault(objective, []).append(round(value, 3))
    slerp = Slerp(experiment.backbone, read_experiment("slerp").composer.alpha)
    scorer = selection.scorer(dataclasses.replace(experiment, composer=slerp))
    assert scorer is not None
    measured = {
        "command": "python benchmarks/objectives.py",
        "split": "val",
        "seeds": list(SEEDS),
        "date": datetime.date.today().isoformat(),
        "slerp": round(scorer.measure({}), 3),
        "mAP@10": values,
    }
    args.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
