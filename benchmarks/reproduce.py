"""The numbers of a paper's tables beside ours, on its weights and data.

    python benchmarks/reproduce.py --paper=searle --list   # every cell, what it takes, what is here
    python benchmarks/reproduce.py --paper=searle          # runs what can be run
    python benchmarks/reproduce.py --paper=slerp --weights=weights/ --data_dir=data/

Papers: searle, slerp (with TAT), rtd, isa, compodiff, table by table, with their ablations and what
they quote; what is left out, and why, is said behind them. Weights lie in --weights under their
published names (`SEARLE_ViT-B32.pt`, `openai/clip-vit-base-patch32`), or in the hub's cache;
benchmarks are prepared as for launch/eval.py. What the authors have not released is trained by the
command that is shown, seed by seed in --workdir/train, and then evaluated like the rest.

Each run is kept in --workdir with its results.json, and made again only if its config, weights or
data have changed. Of test splits without public labels it writes the file for the server; put the
server's numbers beside it, `server.json`: {"mAP@5": 8.9, ...}. REPRODUCTION.md is written after
each run. Exit status 1: nothing of the paper can be run yet, or a run failed.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import reproduce_recipes as recipes  # noqa: E402
from benchmarks.reproduce_recipes import PAPERS, Recipe  # noqa: E402
from benchmarks.reproduce_table import SERVER, STAMP, document, listing, what  # noqa: E402
from cir_jax.errors import CirError, DataError  # noqa: E402
from cir_jax.evaluation import published  # noqa: E402
from cir_jax.evaluation.published import Row  # noqa: E402
from cir_jax.training.differences import differing_fields  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are. partial: incomplete data will do, whose numbers are not comparable."""

    weights: Path
    workdir: Path
    data_dir: Path
    partial: bool = False

    def train(self, recipe: Recipe, seed: int) -> Path:
        """The workdir of a training run."""
        return self.workdir / "train" / f"{recipe.training.slug}-{seed}"

    def run(self, recipe: Recipe, row: Row, seed: int) -> Path:
        """The folder of an evaluation."""
        name = f"{row.benchmark.replace('/', '_').replace(':', '_')}-{row.split}"
        return self.workdir / "runs" / f"{recipe.slug}-{seed}" / name

    def located(self, name: str) -> str:
        """The name or path to give for weights with this published name, "" = not here.

        Of several joined by "+", all must be here.
        """
        if "+" in name and all(found := [self.located(part) for part in name.split("+")]):
            return "+".join(found)
        for place in (self.weights / name, self.weights / Path(name).name, Path(name)):
            if place.is_file() or (place.is_dir() and any(place.iterdir())):
                return str(place.absolute())
        return name if _cached(name) else ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a paper, and what it takes here.

    missing: what to get, as "NAME: from where". seeds: of the runs that can be made.
    """

    row: Row
    recipe: Recipe
    protocol: str
    missing: tuple[str, ...]
    seeds: tuple[int, ...]


def _cached(name: str) -> bool:
    """Whether the hub's cache has a model; nothing is downloaded."""
    if name.count("/") != 1 or name.endswith((".pt", ".pth", ".pkl")):
        return False
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return False
    weights = (".safetensors", ".bin", ".pt")
    return any(
        repo.repo_id == name and any(file.file_name.endswith(weights) for file in revision.files)
        for repo in repos
        for revision in repo.revisions
    )


def lines(paper: str, places: Places, seeds: Sequence[int]) -> list[Line]:
    """All rows of a paper, as the tables have them."""
    from cir_jax.evaluation import benchmarks

    data: dict[tuple[str, str], str] = {}
    found = []
    for row in published.of_paper(paper):
        recipe = recipes.recipe(row)
        key = row.benchmark, row.split
        if key not in data:
            data[key] = _lacks_data(row, places)
        missing = [data[key]] if data[key] else []
        missing += _lacks_weights(recipe, places)
        here = (0,)
        if recipe.trained:
            here = tuple(seed for seed in seeds if _is_trained(places.train(recipe, seed)))
            if not here:
                training = _training(recipe.training, places, seeds[0])
                variant = "" if recipe.asked else row.variant
                what = f"{recipe.config}, {variant}" if variant else recipe.config
                missing.append(f"training {what}: {training}")
        protocol = benchmarks.find(row.benchmark).protocol.id
        found.append(Line(row, recipe, protocol, tuple(missing), here if not missing else ()))
    return found


def _lacks_data(row: Row, places: Places) -> str:
    from cir_jax.evaluation import benchmarks

    try:
        benchmarks.load(row.benchmark, row.split, places.data_dir, allow_partial=places.partial)
    except DataError as error:
        dataset = benchmarks.find(row.benchmark).dataset
        how = f"data/{dataset}/README.md; python launch/prepare.py --dataset={dataset} --source=DIR"
        prepared = (places.data_dir / dataset).is_dir()
        return f"benchmark {dataset} {row.split}: {str(error) if prepared else how}"
    return ""


def _lacks_weights(recipe: Recipe, places: Places) -> Iterator[str]:
    backbone = _config(recipe).backbone
    if recipe.made and not places.located(backbone):
        export = f"--config.export_to={places.weights / backbone}"
        yield f"{backbone}: {_training(recipe.maker, places, 0, export)}"
    elif not places.located(backbone):
        for part in backbone.split("+"):
            if not places.located(part):
                yield f"{part}: {_origin(part, places)}"
    for name in (*recipe.official, *(name for _, name in recipe.beside)):
        if not places.located(name):
            yield f"{name}: {_origin(name, places)}"


def _origin(name: str, places: Places) -> str:
    return recipes.ORIGINS.get(name) or f"hf download {name} --local-dir {places.weights / name}"


def _training(recipe: Recipe, places: Places, seed: int, *more: str) -> str:
    """The command that trains what nobody has released."""
    config, changes = _config(recipe), dict(recipe.changes)
    method, _, preset = recipe.config.partition(":")
    if here := places.located(config.backbone):
        changes["backbone"] = here
    begins, where = recipe.begins, ""
    if begins in recipes.ORIGINS:
        changes["init_from"] = f"official:{places.located(begins) or begins}"
        where = f", from {begins} ({recipes.ORIGINS[begins]})"
    elif begins:
        run = Recipe(begins)
        changes["init_from"] = places.train(run, seed) / _config(run).stages[-1]
        where = f", from a run of {begins}"
    files = dict(recipe.beside)
    for stage in config.stages:
        if config.stage[stage].composer.get("phrases") == recipes.PHRASES:
            files[f"stage.{stage}.composer.phrases"] = recipes.PHRASES
    changes |= {field: places.located(name) or name for field, name in files.items()}
    words = [f"python launch/main.py --config=experiments/{method}.py:{preset}"]
    words += [f"--config.{name}={_shell(value)}" for name, value in changes.items()]
    words += [
        f"--config.stage.{stage}.data.dataset=NAME"
        for stage in config.stages
        if not config.stage[stage].data.dataset
    ]
    words += [*more, f"--config.seed={seed}", f"--workdir={places.train(recipe, seed)}"]
    corpus = recipe.corpus or recipes.CORPORA[method]
    return f"no weights are released; train on {corpus}{where}: {' '.join(words)}"


def _shell(value: Any) -> str:
    return json.dumps(str(value)) if isinstance(value, tuple) else str(value)


def _is_trained(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in workdir.glob("*/checkpoints/*"))


def _config(recipe: Recipe) -> Any:
    from cir_jax.loading import read_experiment

    config = read_experiment(recipe.config)
    config.update_from_flattened_dict(dict((*recipe.changes, *recipe.asked)))
    return config


def configured(line: Line, places: Places, seed: int) -> Any:
    """The config of an evaluation, with what it reads where it lies."""
    from ml_collections import ConfigDict

    from cir_jax.training import workdir as workdirs

    config = _config(line.recipe)
    if line.recipe.trained:
        config = ConfigDict(workdirs.read_config(places.train(line.recipe, seed)))
        config.update_from_flattened_dict(dict(line.recipe.asked))
    else:
        config.backbone = places.located(config.backbone)
        if line.recipe.official:
            paths = [places.located(name) for name in line.recipe.official]
            config.init_from = f"official:{','.join(paths)}"
        for field, name in line.recipe.beside:
            config.update_from_flattened_dict({field: places.located(name)})
    config.seed = seed
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluation.benchmarks = (line.row.benchmark,)
    config.evaluation.split = line.row.split
    config.evaluation.allow_partial = places.partial
    config.data_dir = str(places.data_dir)
    return config


def made_of(line: Line, places: Places, config: Any) -> dict[str, Any]:
    """What an evaluation depends on: its config, and its files by name, size and time."""
    from cir_jax.evaluation import benchmarks

    entry = benchmarks.find(line.row.benchmark)
    names = [*config.backbone.split("+"), *config.init_from.removeprefix("official:").split(",")]
    names += [places.located(name) for _, name in line.recipe.beside]
    roots = [Path(name) for name in names if name and Path(name).exists()]
    roots += [places.data_dir / entry.dataset / table for table in entry.tables]
    if line.recipe.trained:
        roots.append(places.train(line.recipe, config.seed))
    files = sorted(f for root in roots for f in (root.rglob("*") if root.is_dir() else (root,)))
    listed = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.is_file() and file.name not in (".lock",)
    ]
    text = json.dumps(listed)
    fields = json.loads(config.to_json_best_effort())
    files_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"config": fields, "files": files_id, "differs": differing(line, config)}


FREE = ("seed", "preset", "backbone", "init_from", "export_to", "data_dir", "workers", "mesh",
        "frozen", "remat", "log_every", "evaluation", "checkpoint")  # fmt: skip
"""Fields of a training run that may be other than in the preset: they do not change the method."""

PLACES = ("data.dataset", "phrases", "names", "microbatches")
"""The same, as the ends of fields."""


def differing(line: Line, config: Any) -> list[str]:
    """In what a training run is another than the one that the paper's row wants."""
    if not line.recipe.trained:
        return []
    wanted, run = (json.loads(one.to_json_best_effort()) for one in (_config(line.recipe), config))
    return [
        said
        for said in differing_fields(wanted, run, FREE)
        if not said.partition(" ")[0].endswith(PLACES)
    ]


def forget_stale(line: Line, places: Places, seed: int) -> None:
    """An evaluation of other weights, data or settings than there are now is none."""
    output = places.run(line.recipe, line.row, seed)
    file = output / STAMP
    try:
        made = json.loads(file.read_text())
    except (OSError, ValueError):
        made = None
    now = json.loads(json.dumps(made_of(line, places, configured(line, places, seed))))
    if made != now or not (output / "results.json").is_file():
        file.unlink(missing_ok=True)
        (output / SERVER).unlink(missing_ok=True)  # of another submission


def run(line: Line, places: Places, seed: int) -> bool:
    """Evaluates, unless that was done before. Returns whether it was done now."""
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import runner
    from cir_jax.storage.atomic import write_atomically

    output = places.run(line.recipe, line.row, seed)
    if (output / STAMP).is_file():
        return False
    config = configured(line, places, seed)
    stamp = made_of(line, places, config)
    experiment = experiments.setup(config)
    workdir = places.train(line.recipe, seed) if line.recipe.trained else None
    params = runner.trained_params(experiment, workdir)
    runner.run(experiment, params, output, ["python", *sys.argv], alone=True)
    write_atomically(output / STAMP, lambda stream: stream.write(json.dumps(stamp).encode()))
    return True


def reproduce(paper: str, places: Places, seeds: Sequence[int], output: Path) -> bool:
    """Runs what can be run; returns whether there was anything, and all of it ran. Writes `output`
    after each run."""
    from cir_jax.storage.atomic import write_atomically

    listed = lines(paper, places, seeds)
    todo = {  # two rows may be one run
        places.run(line.recipe, line.row, seed): (line, seed)
        for line in listed
        for seed in line.seeds
    }
    if not todo:
        print(listing(paper, listed))
        print("\nnothing of it can be run yet: get the above first", file=sys.stderr)
        return False
    failed: dict[str, str] = {}

    def write() -> None:
        text = document(paper, listed, places, failed)
        write_atomically(output, lambda stream: stream.write(text.encode()))

    for line, seed in todo.values():
        forget_stale(line, places, seed)
    for number, (line, seed) in enumerate(todo.values(), 1):
        name = f"{what(line.row)}, seed {seed}"
        print(f"[{number}/{len(todo)}] {name}", flush=True)
        try:
            if not run(line, places, seed):
                print("  done before", flush=True)
        except CirError as error:  # the others may do
            failed[name] = str(error)
            print(f"  failed: {error}", file=sys.stderr, flush=True)
        write()
    print(f"{output}: {len(todo) - len(failed)} of {len(todo)} runs")
    return not failed


def main(argv: Sequence[str] | None = None) -> int:
    from cir_jax.storage.places import default_data_dir

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--paper", required=True, choices=PAPERS)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of them")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--data_dir", type=Path, default=None, help="of the prepared benchmarks")
    parser.add_argument("--seeds", default="0,1,2", help="of training runs to look for")
    parser.add_argument("--output", type=Path, default=Path("REPRODUCTION.md"))
    parser.add_argument("--allow_partial", action="store_true", help="use incomplete data, too")
    args = parser.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    places = Places(
        args.weights.expanduser(),
        args.workdir.expanduser(),
        (args.data_dir or default_data_dir()).expanduser().absolute(),
        args.allow_partial,
    )
    try:
        if args.list:
            print(listing(args.paper, lines(args.paper, places, seeds)))
            return 0
        return 0 if reproduce(args.paper, places, seeds, args.output) else 1
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
