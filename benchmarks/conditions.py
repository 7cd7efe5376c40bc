"""CompoDiff's conditions on the embedded world, measured against what its images really show.

    python benchmarks/conditions.py --workdir=runs/table

* Negative text: in the queries of shapes/circo that leave the background free, the reference's
  background is unwanted; in those whose reference shows another thing that the text does not name,
  its shape. How often the top 10 show it, without and with it as the negative text, and the mAP@10
  of the queries, which should not fall.
* Mask: two things A and B, and a text that describes a third kind C. Of five images one shows C in
  the place of A, one C in the place of B; nothing but the mask tells which is meant. How often the
  right one is before the other (chance 50 %) and first of all (chance 20 %), with the mask on A,
  without a mask, and with the mask on B, for which the other one would be right.
* The (w_I, w_T) plane: mAP@10 of shapes/circo over the guidance weights, as the paper's figure 10.

Seed s is the run that benchmarks/compare.py leaves in the workdir, trained there if there is none,
on the test world test_s. Writes benchmarks/conditions.json and conditions.png.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import logging  # noqa: E402

SEEDS = (0, 1, 2)
IMAGE_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.5, 4.0)
TEXT_WEIGHTS = (0.0, 1.0, 2.0, 3.0, 5.0, 7.5)
TOP = 10
REGION_QUERIES = {"shapes": 300, "smoke": 6}
PLANES = {"shapes": (IMAGE_WEIGHTS, TEXT_WEIGHTS), "smoke": ((1.0, 2.5), (2.0, 7.5))}
MASKS = ("on A", "none", "on B")


class Trained:
    """A run with its world: what composes queries, and the scenes behind the gallery's images."""

    def __init__(self, preset: str, seed: int, workdir: Path):
        from cir_jax import experiment as experiments
        from cir_jax.evaluation import benchmarks
        from cir_jax.loading import read_experiment
        from cir_jax.retrieval import features
        from cir_jax.storage.places import default_cache_dir
        from cir_jax.training import stages
        from cir_jax.training import workdir as workdirs
        from data import build
        from data.shapes import benchmarks as worlds
        from data.shapes.shapes_dataset_builder import Shapes, ShapesTiny

        config = read_experiment(f"compodiff:{preset}")
        config.seed, self.split = seed, f"test_{seed}"
        config.evaluation.split = self.split
        name = "shapes_tiny/circo" if preset == "smoke" else "shapes/circo"
        data_dir = experiments.data_dir(config)
        needed = benchmarks.required(config.evaluation.benchmarks)
        build.prepare_needed(stages.required_tables(config), needed, data_dir=data_dir)
        directory = workdir.absolute() / f"compodiff-{seed}"
        workdirs.claim(directory, config)
        experiment = experiments.setup(config)
        self.params = stages.train(experiment, directory)
        experiment = experiments.for_evaluation(experiment)
        self.composer, self.frozen = experiment.composer, experiment.frozen
        self.options = {"mesh": experiment.mesh, "batch_size": config.evaluation.batch_size}
        self.seed = seed
        self.benchmark = benchmarks.load(name, self.split, data_dir)
        sizes = (ShapesTiny if preset == "smoke" else Shapes).SIZES.benchmarks
        self.scenes = worlds.world(self.split, sizes).gallery
        assert len(self.scenes) == len(self.benchmark.gallery)
        self.raw = features.image_features(
            self.composer.backbone,
            self.frozen["backbone"],
            self.benchmark.gallery,
            cache_dir=default_cache_dir(),
            **self.options,
        )

    def compose(self, texts: Sequence[str], **given: Any) -> np.ndarray:
        """float32[queries, dim]. given: see `features.query_features`."""
        from cir_jax.evaluation.evaluate import tokenise
        from cir_jax.retrieval import features

        composer, numbers = self.composer, np.arange(len(texts), dtype=np.int32)
        ids = tokenise(composer, [composer.prompt(text) for text in texts])
        given = {**given, **self.options, "seed": self.seed}
        return features.query_features(composer, self.params, self.frozen, ids, numbers, **given)


# --- negative text


def negative(trained: Trained) -> dict[str, dict[str, Any]]:
    """Per kind of unwanted attribute: its rate in the top 10 and mAP@10, "plain" and "negative"."""
    from cir_jax.evaluation import metrics
    from cir_jax.evaluation.evaluate import tokenise
    from cir_jax.retrieval import features, ranking

    composer, gallery = trained.composer, features.unit(trained.raw)
    found: dict[str, dict[str, Any]] = {}
    for kind, chosen in (("background", _backgrounds(trained)), ("shape", _shapes(trained))):
        queries = [trained.benchmark.queries[number] for number, _, _ in chosen]
        references = np.asarray([query.reference for query in queries], np.int32)
        targets = trained.benchmark.target_table()[[number for number, _, _ in chosen]]
        texts = [query.texts[0] for query in queries]
        given = {"reference_features": trained.raw[references]}
        negatives = tokenise(composer, [composer.prompt(text) for _, text, _ in chosen])
        hidden = references if trained.benchmark.protocol.remove_reference else None
        rows: dict[str, Any] = {"queries": len(chosen)}
        for name, fields in (("plain", {}), ("negative", {"negative_token_ids": negatives})):
            composed = trained.compose(texts, fields=fields, **given)
            ranked = ranking.rank(*(composed, gallery), k=TOP, targets=targets, exclude=hidden)
            unwanted = [
                np.mean([shows(trained.scenes[image]) for image in row])
                for row, (_, _, shows) in zip(ranked.top, chosen, strict=True)
            ]
            precision = metrics.average_precision(ranked.target_ranks, TOP)
            rows[name] = {
                "unwanted": 100 * float(np.mean(unwanted)),
                "mAP@10": float(np.mean(precision)),
            }
        found[kind] = rows
    return found


def _backgrounds(trained: Trained) -> list[tuple[int, str, Any]]:
    """(query, negative text, what shows it) where nothing is said of the background."""
    from data.shapes.words import BACKGROUND_WORDS

    found = []
    for number, query in enumerate(trained.benchmark.queries):
        if "spatial_relations_background" in query.aspects:
            continue
        unwanted = trained.scenes[query.reference].background
        text = f"a photo on a {BACKGROUND_WORDS[unwanted][0]} background"
        found.append((number, text, lambda scene, b=unwanted: scene.background == b))
    return found


def _shapes(trained: Trained) -> list[tuple[int, str, Any]]:
    """Likewise of a second thing's shape that the text does not name."""
    from data.shapes.words import SHAPE_WORDS, plural

    found = []
    for number, query in enumerate(trained.benchmark.queries):
        scene = trained.scenes[query.reference]
        words = set(query.texts[0].split())
        for thing in scene.things[1:]:
            said = {form for word in SHAPE_WORDS[thing.shape] for form in (word, plural(word))}
            if thing.shape != scene.subject.shape and not said & words:
                text = f"a photo with a {SHAPE_WORDS[thing.shape][0]}"
                found.append((number, text, lambda scene, s=thing.shape: s in scene.shapes))
                break
    return found


# --- mask


def region(trained: Trained, count: int) -> dict[str, dict[str, float]]:
    """Mask -> rates in percent: "right before other" and "first" of five, A's place being right."""
    from PIL import Image

    from cir_jax.composers.conditions import masked
    from cir_jax.input import masks
    from cir_jax.retrieval import features
    from data.shapes.edits import Goal
    from data.shapes.language import goal_caption
    from data.shapes.render import encode_png, object_mask, render
    from data.shapes.scene import stream

    composer = trained.composer
    transform = composer.backbone.image_transform
    cases = [_case(stream("shapes", "conditions", trained.split, i)) for i in range(count)]
    candidates = [scene for _, five, _ in cases for scene in five]
    raw = features.image_features(
        composer.backbone,
        trained.frozen["backbone"],
        [{"image": encode_png(render(scene))} for scene in candidates],
        **trained.options,
    )
    gallery = features.unit(raw).reshape(count, 5, -1)
    rng = stream("shapes", "conditions", trained.split)
    texts = [goal_caption(rng, Goal(kind)) for _, _, kind in cases]
    found = {}
    for name in MASKS:

        def reference(row: int, name: str = name) -> tuple[np.ndarray, np.ndarray]:
            scene = cases[row][0]
            image = Image.fromarray(render(scene))
            if name == "none":
                return transform(image), np.zeros((masks.SIZE, masks.SIZE), np.float32)
            return masked(composer, image, object_mask(scene, MASKS.index(name) // 2))

        composed = trained.compose(texts, reference_images=reference)
        scores = np.einsum("qd,qcd->qc", composed, gallery)
        before = scores[:, 0] > scores[:, 1]
        first = scores.argmax(axis=1) == 0
        found[name] = {"before": 100 * float(before.mean()), "first": 100 * float(first.mean())}
    return found


def _case(rng: Any) -> tuple[Any, list[Any], tuple[int, int, int]]:
    """Reference with things A and B, five candidates, the kind C: C for A, C for B, the reference
    once more, C for A on another background, C for both."""
    import dataclasses

    from data.shapes.scene import (
        BACKGROUNDS,
        QUADRANTS,
        Scene,
        draw,
        jitter,
        pick_other,
        sample_thing,
    )

    first, second = (sample_thing(rng, place) for place in draw(rng, QUADRANTS, 2))
    third = sample_thing(rng, 0)
    while len({first.shape, second.shape, third.shape}) < 3:
        first, second = (sample_thing(rng, thing.position) for thing in (first, second))
    background = int(rng.random() * len(BACKGROUNDS))
    other = pick_other(rng, len(BACKGROUNDS), background)

    def scene(a: Any, b: Any, on: int = background) -> Scene:
        return jitter(rng, Scene((a, b), on))

    in_a, in_b = (
        dataclasses.replace(third, position=thing.position, size=thing.size)
        for thing in (first, second)
    )
    five = [
        scene(in_a, second),
        scene(first, in_b),
        scene(first, second),
        scene(in_a, second, other),
        scene(in_a, in_b),
    ]
    return scene(first, second), five, third.kind


# --- guidance


def plane(trained: Trained, preset: str) -> dict[str, dict[str, float]]:
    """w_I -> w_T -> mAP@10."""
    from cir_jax.composers.conditions import Conditions
    from cir_jax.evaluation.asked import Asked
    from cir_jax.evaluation.evaluate import evaluate

    images, texts = PLANES[preset]
    found: dict[str, dict[str, float]] = {}
    for w_image in images:
        for w_text in texts:
            result = evaluate(
                trained.composer,
                trained.params,
                trained.frozen,
                trained.benchmark,
                seed=trained.seed,
                image_features=trained.raw,
                asked=Asked(Conditions(guidance=(w_image, w_text))),
                **trained.options,
            )
            row = found.setdefault(str(w_image), {})
            row[str(w_text)] = result.metrics["mAP@10"].value
    return found


# --- file and picture


def mean(runs: Sequence[Any]) -> Any:
    """Numbers of several seeds -> {"mean", "std"} of each, trees of the same keys."""
    if isinstance(runs[0], Mapping):
        return {key: mean([run[key] for run in runs]) for key in runs[0]}
    spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
    return {"mean": round(statistics.mean(runs), 2), "std": round(spread, 2)}


def table(measured: Mapping[str, Any]) -> str:
    """Markdown of the negative texts and the masks."""
    said = [
        "| unwanted | in the top 10 | with it as negative text | mAP@10 | with |",
        "|---" * 5 + "|",
    ]
    for kind, rows in measured["negative"].items():
        cells = [
            f"{rows[name][what]['mean']:.1f} ± {rows[name][what]['std']:.1f}"
            for what in ("unwanted", "mAP@10")
            for name in ("plain", "negative")
        ]
        said.append(f"| {kind} | {' | '.join(cells)} |")
    said += ["", "| mask | A's place before B's | first of five |", "|---" * 3 + "|"]
    for name, rates in measured["mask"].items():
        cells = [f"{rates[k]['mean']:.1f} ± {rates[k]['std']:.1f}" for k in ("before", "first")]
        said.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(said)


CELL, LEFT = 64, 70


def draw(measured: Mapping[str, Any], path: Path) -> None:
    """The plane as squares whose brightness is the mAP@10, and the rates as bars below it."""
    from PIL import Image, ImageDraw

    values = measured["plane"]
    rows, columns = list(values), list(next(iter(values.values())))
    bars = [
        (f"{kind} unwanted, {name}", measured["negative"][kind][name]["unwanted"]["mean"])
        for kind in measured["negative"]
        for name in ("plain", "negative")
    ]
    bars += [(f"mask {name}: A before B", rates["before"]["mean"]) for name, rates in
             measured["mask"].items()]  # fmt: skip
    width = LEFT + max(CELL * len(columns) + 20, 480)
    height = 60 + CELL * len(rows) + 20 + 22 * len(bars) + 20
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 8), "mAP@10 of shapes/circo over the guidance weights", "black")
    flat = [cell["mean"] for row in values.values() for cell in row.values()]
    least, most = min(flat), max(flat)
    for j, w_text in enumerate(columns):
        pen.text((LEFT + CELL * j + 8, 30), f"w_T {w_text}", "black")
    for i, w_image in enumerate(rows):
        pen.text((6, 50 + CELL * i + 24), f"w_I {w_image}", "black")
        for j, w_text in enumerate(columns):
            value = values[w_image][w_text]["mean"]
            share = (value - least) / (most - least or 1)
            corner = (LEFT + CELL * j, 50 + CELL * i)
            fill = (int(255 - 215 * share), int(250 - 130 * share), int(255 - 60 * share))
            pen.rectangle((*corner, corner[0] + CELL - 3, corner[1] + CELL - 3), fill=fill)
            shade = "white" if share > 0.6 else "black"
            pen.text((corner[0] + 18, corner[1] + 24), f"{value:.1f}", shade)
    top = 60 + CELL * len(rows) + 10
    for i, (label, value) in enumerate(bars):
        y = top + 22 * i
        pen.text((6, y + 3), label, "black")
        pen.rectangle((220, y, 220 + max(int(value * 2.4), 1), y + 16), fill=(40, 120, 195))
        pen.text((226 + int(value * 2.4), y + 3), f"{value:.1f} %", "black")
    image.save(path)


SAID = """
With the reference's background as negative text, {background[negative][unwanted]} % of the top 10
show it in place of {background[plain][unwanted]} %, at mAP@10 {background[negative][mAP@10]} in
place of {background[plain][mAP@10]} (the queries that leave the background free); a second thing's
shape, {shape[negative][unwanted]} % in place of {shape[plain][unwanted]} %, and mAP@10
{shape[negative][mAP@10]} in place of {shape[plain][mAP@10]}. Of two images that show what the text
describes in the place of one thing or of another, the masked one is before the other for
{mask[on A][before]} % of {queries} references with the mask on it, {mask[none][before]} % without a
mask and {mask[on B][before]} % with the mask on the other thing.
"""


def said(measured: dict[str, Any]) -> str:
    """The sentences of benchmarks/README.md."""

    def numbers(found: Any) -> Any:
        if "mean" in found:
            return f"{found['mean']:.1f} ± {found['std']:.1f}"
        return {name: numbers(value) for name, value in found.items()}

    found = {**numbers(measured["negative"]), "mask": numbers(measured["mask"])}
    return " ".join(SAID.format(**found, queries=REGION_QUERIES["shapes"]).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=tuple(PLANES), default="shapes")
    parser.add_argument("--workdir", type=Path, default=Path("runs/table"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "conditions.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    runs = []
    for seed in args.seeds:
        trained = Trained(args.preset, seed, args.workdir)
        runs.append(
            {
                "negative": negative(trained),
                "mask": region(trained, REGION_QUERIES[args.preset]),
                "plane": plane(trained, args.preset),
            }
        )
    measured = {
        "command": "python benchmarks/conditions.py",
        "date": datetime.date.today().isoformat(),
        "seeds": args.seeds,
        **mean(runs),
    }
    args.output.write_text(json.dumps(measured, indent=1) + "\n")
    draw(measured, args.output.with_suffix(".png"))
    print(table(measured))


if __name__ == "__main__":
    main()
