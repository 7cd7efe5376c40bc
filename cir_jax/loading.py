"""`cir_jax.load`: from a workdir, a config or a method's name to something that searches."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cir_jax import experiment as experiments
from cir_jax.composers import shared
from cir_jax.composers.official import FLAG
from cir_jax.errors import ConfigError, WeightsError, unknown
from cir_jax.evaluation.runner import trained_params
from cir_jax.experiment import Experiment
from cir_jax.retrieval.search import Searcher
from cir_jax.storage.buckets import is_remote, place
from cir_jax.storage.places import SHIPPED, is_hub_id
from cir_jax.training import workdir as workdirs
from cir_jax.weights import files, hub

EXPERIMENTS = SHIPPED / "experiments"


def methods() -> list[str]:
    """Names of the experiments that come with the library."""
    return sorted(file.stem for file in EXPERIMENTS.glob("*.py") if file.stem != "base")


def read_experiment(name: str, backbone: str = "") -> ConfigDict:
    """The config of "slerp", "compodiff:vit_l14" or "my/experiment.py:preset".

    backbone: where no preset is named, the one made for this backbone, if there is such a one.
    Raises ConfigError when there is no such experiment or preset.
    """
    file, _, preset = name.partition(":")
    module = _execute(_find(file))
    if not preset and backbone:
        for key, changes in getattr(module, "PRESETS", {}).items():
            if changes.get("backbone") == backbone:
                preset = key
                break
    return module.get_config(preset) if preset else module.get_config()


def _find(name: str) -> Path:
    for path in (Path(name).expanduser(), SHIPPED / name, EXPERIMENTS / f"{name}.py"):
        if path.is_file() and path.suffix == ".py":
            return path
    if Path(name).name == name and not name.endswith(".py"):
        raise ConfigError(f"{unknown('method', name, methods())} Or give the path of a file.")
    raise ConfigError(f"{name} is no file. Give the path of an experiment, experiments/NAME.py.")


def _execute(path: Path) -> types.ModuleType:
    with _neighbours(path.resolve().parent):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _neighbours(directory: Path) -> Iterator[None]:
    """`from experiments import base` means ours, whatever else is called so in this program."""

    def ours(name: str) -> bool:
        return name.partition(".")[0] == "experiments"

    others = {name: sys.modules.pop(name) for name in filter(ours, list(sys.modules))}
    package = types.ModuleType("experiments")
    package.__path__ = [str(directory), str(EXPERIMENTS)]
    sys.modules["experiments"] = package
    try:
        yield
    finally:
        for name in filter(ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(others)


def load(*what: Any, **how: Any) -> Searcher:
    """See `cir_jax.load`; takes what `experiment_of` does."""
    experiment, workdir = experiment_of(*what, **how)
    experiment = experiments.for_evaluation(experiment)
    params = trained_params(experiment, workdir)
    return Searcher(experiment.composer, params, experiment.frozen, mesh=experiment.mesh)


def experiment_of(
    what: str | Path | None = None,
    config: Any = None,
    *,
    backbone: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: Any = None,
    revision: str | None = None,
) -> tuple[Experiment, Path | None]:
    """What `load` loads, and the workdir with its parameters, if they are in one. Raises as it
    does."""
    workdir, is_shared = None, False
    if what is not None:
        directory = place(what)
        is_shared = not is_remote(directory) and is_one_for_others(what)
        if revision is not None and not is_shared:
            raise ConfigError(f"revision={revision!r}: of ORG/NAME on the hub, not of {what}.")
        if is_shared:
            if config is not None or weights is not None:
                raise ConfigError(f"load({str(what)!r}): it has a config and weights of its own.")
            config = read_shared(what, revision)
        elif (directory / workdirs.CONFIG_FILE).is_file() or not _is_method(what):
            if not directory.exists():
                raise ConfigError(unknown("workdir or method", str(what), methods()))
            workdir = directory
        elif config is None:
            config = what
        else:
            raise ConfigError(f"load({str(what)!r}, config=...): both name a method. Give one.")
    if isinstance(config, str | Path):
        config = read_experiment(str(config), str(backbone or ""))
    if config is None:
        if workdir is None:
            raise ConfigError(
                f"load: give a workdir, a method ({', '.join(methods())}), or config=..."
            )
        config = ConfigDict(workdirs.read_config(workdir))
    config = ConfigDict(config.to_dict())
    config.mesh = ConfigDict({"data": -1})  # of this machine, not of the one that trained
    if backbone is not None:
        config.backbone = str(backbone)
    if weights is not None:
        if workdir is not None:
            raise ConfigError(f"load: weights={str(weights)!r} or a workdir, not both.")
        config.init_from = f"{FLAG}{weights}"
    if dtype is not None:
        config.evaluation.dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    experiment = experiments.setup(config)
    if not experiment.composer.pretrained_backbone:
        raise ConfigError(
            f"{config.name} trains a backbone: export it (--config.export_to=DIR), then "
            "search with another composer on it, such as experiments/slerp.py."
        )
    if experiment.composer.trained and workdir is None and not config.init_from:
        raise ConfigError(
            f"composer {config.composer.name} is trained: give the workdir of its training run, or "
            "weights='PATH' for its authors' weights."
        )
    return experiment, workdir


def is_one_for_others(what: str | Path) -> bool:
    """Whether `what` is a composer as others get it: such a directory, or the form of a hub id that
    is nothing else."""
    path = Path(what).expanduser()
    if path.exists():
        return hub.is_one(path)
    return not _is_method(what) and is_hub_id(str(what))


def to_fetch(what: str | Path, backbone: str | Path | None = None) -> dict[str, str]:
    """Name -> how much of it comes from the hub, "605 MB", before `load` has it: of this backbone,
    and of a composer as others get it and its own. Raises as `weights.hub.located`."""
    names, sizes = [str(backbone)] if backbone else [], {}
    if is_one_for_others(what):
        sizes[str(what)], about = hub.to_fetch(what)
        if not names and not about["backbone"].get("included"):
            names = str(about["experiment"].get("backbone", "")).split("+")
    sizes |= {name: files.to_fetch(name) for name in names}
    return {name: size for name, size in sizes.items() if size}


def read_shared(what: str | Path, revision: str | None = None) -> ConfigDict:
    """The config of a composer as others get it; see `weights.hub.located` for what is raised."""
    directory = hub.located(what, revision)
    values = shared.read_config(directory)
    if wrong := workdirs.problem(values):
        raise WeightsError(f"{directory / hub.CONFIG}: its experiment: {wrong}. Get it again.")
    # what is evaluated goes to a folder of that name
    return ConfigDict(_tuples(values | {"preset": str(what).strip("/").rpartition("/")[2]}))


def _tuples(node: Any) -> Any:
    """JSON's lists as an experiment has them, so that they can be overridden on a command line."""
    if isinstance(node, dict):
        return {key: _tuples(value) for key, value in node.items()}
    return tuple(map(_tuples, node)) if isinstance(node, list) else node


def _is_method(what: str | Path) -> bool:
    name = str(what).partition(":")[0]
    return name in methods() or name.endswith(".py")
