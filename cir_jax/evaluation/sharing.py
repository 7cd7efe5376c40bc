"""From what was trained to the directory that others get: weights, config, card, digests."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError

from cir_jax.composers import shared
from cir_jax.composers.base import Composer
from cir_jax.errors import DataError
from cir_jax.evaluation import card, report, runner, setting
from cir_jax.experiment import Experiment, for_evaluation
from cir_jax.sharding.placement import to_host
from cir_jax.storage import digests, faults
from cir_jax.storage.atomic import new_directory
from cir_jax.storage.places import SHIPPED
from cir_jax.weights import hub


def export(experiment: Experiment, workdir: Path) -> None:
    """Writes what was trained in `workdir` to config.export_to=hub:DIR, if that is set; all
    processes call it, when the results are there."""
    if target := shared.given(experiment.config.export_to):
        write(experiment, workdir, Path(target).expanduser())
        if jax.process_index() == 0:
            print(f"exported to {target}: `cir push {target} {hub.ANY_NAME}` shares it")


def write(experiment: Experiment, workdir: Path | None, target: Path) -> None:
    """Writes the composer of an experiment, with the numbers of the workdir's `results.json` that
    belong to it. What is in `target` is replaced, when all is written.

    workdir: None = of config.init_from, or a training-free method. Raises CheckpointError without
    trained parameters, ConfigError for what cannot be shared, DataError for results that are none,
    and when nothing can be written.
    """
    config = experiment.config
    shared.check(config, target)
    experiment = for_evaluation(experiment)
    trained = runner.trained(experiment, workdir)
    params, backbone = (
        jax.tree.map(to_host, tree) for tree in (trained.params, experiment.frozen["backbone"])
    )
    if jax.process_index() != 0:
        return
    try:
        with new_directory(target, whole=True) as scratch:
            made = _made(experiment, trained)
            shared.write(scratch, config, experiment.composer, params, backbone, made)
            about = hub.read(scratch)
            results = _results(experiment.composer, about["trained"], workdir)
            digests.add(scratch)
            (scratch / hub.CARD).write_text(card.text(about, results), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{target}: cannot be written ({faults.cause(error)}). Make room, or choose another "
            "directory."
        ) from error


def _results(composer: Composer, trained: str, workdir: Path | None) -> list[dict[str, Any]]:
    """Those of the workdir that are of this composer; how many are not is printed."""
    if workdir is None:
        return []
    own = setting.of_composer(composer) | {"trained": trained}
    file = workdir / "results.json"
    results, others = card.own_results(file, json.loads(json.dumps(own)))
    if others:
        print(
            f"{file}: {others} of its results are of other weights or settings, or of incomplete "
            "data, so the card is without them. Evaluate again for its numbers."
        )
    return results


def _made(experiment: Experiment, trained: runner.Trained) -> dict[str, Any]:
    """What is known of how it was made, without names of this machine's folders."""
    config, position = experiment.config, trained.position
    made: dict[str, Any] = {
        "cir_jax": report.version("cir_jax"),
        "preset": config.get("preset", ""),
    }
    if commit := _commit():
        made["commit"] = commit
    if trained.stage:
        made |= {"stage": trained.stage, "step": position["next_batch"], "steps": position["steps"]}
        made["tables"] = {
            name.removeprefix("Table(").removesuffix(")"): {
                "records": contents.get("records", 0),
                "id": _identity(contents),
            }
            for name, contents in position.get("tables", {}).items()
        }
    if experiment.begins_with and (cached := hub.of_cache(experiment.begins_with)):
        made["init_from"] = " at ".join(cached)
    elif config.init_from:
        made["init_from"] = config.init_from.replace("\\", "/").rpartition("/")[2]
    return made


def _identity(contents: Any) -> str:
    """What tells the records of a table from others of its name (`Table.contents`)."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


def _commit() -> str:
    """Of a checkout that this runs in: its commit, with a plus where files differ; else ""."""
    if not (SHIPPED / ".git").exists():
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(SHIPPED), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""
