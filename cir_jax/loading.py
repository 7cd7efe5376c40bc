"""`cir_jax.load`: from a workdir or a config to something that searches."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cir_jax import experiment as experiments
from cir_jax.errors import ConfigError
from cir_jax.evaluation.runner import trained_params
from cir_jax.retrieval.search import Searcher
from cir_jax.storage.places import REPOSITORY
from cir_jax.training import workdir as workdirs


def read_experiment(name: str) -> ConfigDict:
    """The config of "experiments/slerp.py" or "experiments/compodiff.py:vit_l14".

    Raises ConfigError when there is no such file.
    """
    file, _, preset = name.partition(":")
    for path in (Path(file), REPOSITORY / file):
        if path.is_file():
            break
    else:
        raise ConfigError(
            f"{file} is no file. Give the path of an experiment, experiments/NAME.py."
        )
    root = str(path.resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)  # experiments import their neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset) if preset else module.get_config()


def load(workdir: str | Path | None = None, config: Any = None) -> Searcher:
    """See `cir_jax.load`."""
    if isinstance(config, str | Path):
        config = read_experiment(str(config))
    if config is None:
        if workdir is None:
            raise ConfigError("load: give a workdir, or config='experiments/NAME.py', or both.")
        config = ConfigDict(workdirs.read_config(Path(workdir)))
    config = ConfigDict(config.to_dict())
    config.mesh = ConfigDict({"data": -1})  # of this machine, not of the one that trained
    experiment = experiments.setup(config)
    if not experiment.composer.pretrained_backbone:
        raise ConfigError(
            f"{config.name} trains a backbone: export it (--config.export_to=DIR), then "
            "search with another composer on it, such as experiments/slerp.py."
        )
    if experiment.composer.trained and workdir is None and not config.init_from:
        raise ConfigError(
            f"composer {config.composer.name} is trained: give the workdir of its training run, or "
            "config.init_from='official:PATH' for its authors' weights."
        )
    params = trained_params(experiment, Path(workdir) if workdir else None)
    return Searcher(experiment.composer, params, experiment.frozen, mesh=experiment.mesh)
