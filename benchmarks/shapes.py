"""The README's table: all methods on the embedded world, three seeds.

    python benchmarks/shapes.py --workdir=runs/table

Seed s trains with seed s and reports on the test world test_s; hyper-parameters were chosen on val.
Writes benchmarks/shapes.json; the table in README.md is `table(that file)`. Resumes like main.py.
"""

import datetime
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402

EXPERIMENTS = ("slerp", "compodiff")
SEEDS = (0, 1, 2)
COLUMNS = (
    ("circo", "mAP@5"),
    ("circo", "mAP@10"),
    ("cirr", "R@1"),
    ("cirr", "Rs@1"),
    ("fashioniq", "R@10"),
    ("genecis", "R@1"),
)
PAPER = {
    "image_only": "3.09 (Slerp)",
    "text_only": "3.65 (Slerp)",
    "image_text": "4.40 (ISA)",
    "slerp": "9.84 (Slerp)",
    "compodiff": "13.36 (CompoDiff)",
}
"""CIRCO test mAP@10 with CLIP ViT-L/14, and the paper that prints it."""

OUTPUT = flags.DEFINE_string("output", str(ROOT / "benchmarks" / "shapes.json"), "File to write")
PRESET = flags.DEFINE_string("preset", "shapes", "Preset of the experiments: shapes or smoke")
WORKDIR = flags.DEFINE_string("workdir", "runs/table", "Where the runs lie")


def measure(workdir: Path, preset: str) -> dict[str, Any]:
    """Trains and evaluates everything: {benchmark metric: {method: [value of each seed]}}."""
    from cir_jax.evaluation import runner
    from cir_jax.loading import read_experiment
    from cir_jax.training import experiment as experiments
    from data import build

    values: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        for name in EXPERIMENTS:
            config = read_experiment(f"experiments/{name}.py:{preset}")
            config.seed, config.evaluation.split = seed, f"test_{seed}"
            for dataset, tables in experiments.required_tables(config).items():
                build.prepare(dataset, tables, experiments.data_dir(config))
            directory = workdir.absolute() / f"{name}-{seed}"
            experiments.claim_workdir(directory, config)
            experiment = experiments.setup(config)
            params = experiments.train(experiment, directory) or {}  # Slerp has no stages
            for result in runner.run(experiment, params, directory):
                if result.method != name and name != EXPERIMENTS[0]:
                    continue  # the baselines are the same beside every method
                for metric, estimate in result.metrics.items():
                    row = values.setdefault(f"{result.benchmark.partition('/')[2]} {metric}", {})
                    row.setdefault(result.method, []).append(estimate.value)
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/shapes.py",
        "seeds": list(SEEDS),
        "values": values,
    }


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: rows = methods, mean +- standard deviation over the seeds."""
    head = ["method", *(f"{b} {m}" for b, m in COLUMNS), "paper, CIRCO mAP@10"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for method, paper in PAPER.items():
        cells = [measured["values"][f"{b} {m}"][method] for b, m in COLUMNS]
        shown = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in cells]
        lines.append(" | ".join([method, *shown, paper]))
    return "\n".join(f"| {line} |" for line in lines)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    measured = measure(Path(WORKDIR.value), PRESET.value)
    Path(OUTPUT.value).write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    app.run(main)
