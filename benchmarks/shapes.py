"""The README's table: all methods on the embedded world, three seeds.

    python benchmarks/shapes.py --workdir=runs/table

Seed s trains with seed s and reports on the test world test_s; hyper-parameters were chosen on val.
searle_oti:inversion ranks the same scenes for all seeds.
Writes benchmarks/shapes.json; the table in README.md is `table(that file)`. Resumes like main.py.
--methods=searle,lincir measures these alone and keeps the other rows of the file.
"""

import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402

EXPERIMENTS = (
    *("slerp", "palavra", "pic2word", "searle_oti", "searle", "lincir", "compodiff"),
    *("rtd", "pdv", "tat", "clip4cir", "combiner", "magiclens", "artemis"),
)
# with a preset of their own, in --preset=shapes only:
LONG = "compodiff:shapes_long"
INVERSION = "searle_oti:inversion"  # what its words hold of their images, on no test world
BASELINES_OF = "slerp"  # the baselines are the same beside every method
SEEDS = (0, 1, 2)
COLUMNS = (
    ("circo", "mAP@5"),
    ("circo", "mAP@10"),
    ("cirr", "R@1"),
    ("cirr", "Rs@1"),
    ("fashioniq", "R@10"),
    ("genecis", "R@1"),
)
REFERENCES = ("slerp", "image_text")
"""Methods that each row is compared with, on the same queries, by circo mAP@10."""
PAPER = {
    "image_only": "3.09 (Slerp)",
    "text_only": "3.65 (Slerp)",
    "image_text": "4.40 (ISA)",
    "slerp": "9.84 (Slerp)",
    "palavra": "5.32 (SEARLE, ViT-B/32)",
    "pic2word": "9.51 (CompoDiff)",
    "searle_oti": "11.03 (SEARLE)",
    "searle": "12.73 (CompoDiff)",
    "lincir": "13.58 (Slerp)",
    "compodiff": "13.36 (CompoDiff)",
    LONG: "13.36 (CompoDiff)",
    "rtd": "9.63 (RTD, around Pic2Word)",
    "pdv": "",
    "tat": "19.41 (Slerp)",
    "clip4cir": "",
    "combiner": "12.08 (CompoDiff, ResNet-50)",
    "magiclens": "30.8 (MagicLens, which reads the shared concept, too)",
    "artemis": "11.41 (CompoDiff, ResNet-50)",
}
"""CIRCO test mAP@10 with CLIP ViT-L/14 where nothing else is said, and the paper that prints it."""

OUTPUT = flags.DEFINE_string("output", str(ROOT / "benchmarks" / "shapes.json"), "File to write")
PRESET = flags.DEFINE_string("preset", "shapes", "Preset of the experiments: shapes or smoke")
WORKDIR = flags.DEFINE_string("workdir", "runs/table", "Where the runs lie")
METHODS = flags.DEFINE_list("methods", [*EXPERIMENTS, LONG, INVERSION], "To measure")

Values = dict[str, dict[str, list[float]]]
"""benchmark metric -> method -> value of each seed."""


def measure(workdir: Path, preset: str, methods: Sequence[str]) -> Values:
    """Trains and evaluates the methods."""
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import benchmarks, runner
    from cir_jax.loading import read_experiment
    from cir_jax.training import stages
    from cir_jax.training import workdir as workdirs
    from data import build

    values: Values = {}
    for seed in SEEDS:
        for name in methods:
            method, _, own = name.partition(":")
            config = read_experiment(f"experiments/{method}.py:{own or preset}")
            config.seed = seed
            if name != INVERSION:
                config.evaluation.split = f"test_{seed}"
            build.prepare_needed(
                stages.required_tables(config),
                benchmarks.required(config.evaluation.benchmarks),
                data_dir=experiments.data_dir(config),
            )
            directory = workdir.absolute() / f"{name.replace(':', '-')}-{seed}"
            workdirs.claim(directory, config)
            experiment = experiments.setup(config)
            params = stages.train(experiment, directory) or {}  # Slerp has no stages
            alone = name != BASELINES_OF
            for result in runner.run(experiment, params, directory, alone=alone):
                row_name = name if own else result.method
                for metric, estimate in result.metrics.items():
                    row = values.setdefault(f"{result.benchmark.partition('/')[2]} {metric}", {})
                    row.setdefault(row_name, []).append(estimate.value)
    return values


def merge(before: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """The recorded file with new rows in place of the old ones, each with its date and commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    today = f"{datetime.date.today().isoformat()} {found.stdout.strip()}".strip()
    methods = {method for rows in values.values() for method in rows}
    merged = {column: dict(rows) for column, rows in before.get("values", {}).items()}
    for column, rows in values.items():
        merged[column] = merged.get(column, {}) | rows
    return {
        "command": "python benchmarks/shapes.py",
        "seeds": list(SEEDS),
        "measured": before.get("measured", {}) | dict.fromkeys(sorted(methods), today),
        "values": merged,
    }


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Of pairs: mean +- standard error."""
    apart = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    return f"{statistics.mean(apart):+.1f} ± {error:.1f}"


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: rows = methods, mean +- standard deviation over the seeds.

    Differences of circo mAP@10 are paired, seed by seed: mean +- standard error.
    """
    columns = [f"{b} {m}" for b, m in COLUMNS] + [f"mAP@10 − {other}" for other in REFERENCES]
    head = ["method", *columns, "paper, CIRCO mAP@10"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for method, paper in PAPER.items():
        if method not in measured["measured"]:
            continue
        cells = [measured["values"][f"{b} {m}"][method] for b, m in COLUMNS]
        shown = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in cells]
        rows = measured["values"]["circo mAP@10"]
        for other in REFERENCES:
            known = other != method and other in rows
            shown.append(difference(rows[method], rows[other]) if known else "")
        lines.append(" | ".join([method, *shown, paper]))
    return "\n".join(f"| {line} |" for line in lines)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    known = [*EXPERIMENTS, LONG, INVERSION]
    if wrong := sorted(set(METHODS.value) - set(known)):
        there = ", ".join(known)
        raise app.UsageError(f"--methods: no {wrong[0]}; there are {there}")
    output = Path(OUTPUT.value)
    before = json.loads(output.read_text()) if output.is_file() else {}
    methods = [m for m in METHODS.value if m in EXPERIMENTS or PRESET.value == "shapes"]
    measured = merge(before, measure(Path(WORKDIR.value), PRESET.value, methods))
    output.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    app.run(main)
