"""A config brought to life: mesh, backbone, composer, frozen parameters.

Parameters are float32; two settings say in which type is computed. `config.dtype` is that of
training, with the products that a device has by default. `config.evaluation.dtype` is that of
evaluation, inversion and search: its float32 is float32 on GPUs and TPUs, too
(`Backbone.full_precision`), as the papers evaluate.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from cir_jax import composers, weights
from cir_jax.composers import official, shared
from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, unknown
from cir_jax.models.backbone import Backbone
from cir_jax.sharding import placement
from cir_jax.sharding.mesh import make_mesh
from cir_jax.storage.buckets import local, place
from cir_jax.storage.places import default_data_dir
from cir_jax.weights import hub, published
from cir_jax.weights.official import check_torch

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass
class Experiment:
    """A config brought to life: mesh, backbone, composer, frozen parameters."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    backbone: Backbone
    composer: Composer
    frozen: Any
    begins_with: Path | None = None  # of config.init_from=hub:NAME, as it was checked

    @property
    def data_dir(self) -> Path:
        return data_dir(self.config)


def data_dir(config: ml_collections.ConfigDict) -> Path:
    """Where prepared datasets lie: `config.data_dir`, else `$CIR_JAX_DATA`, else the cache."""
    return place(config.data_dir) if config.data_dir else default_data_dir()


def setup(
    config: ml_collections.ConfigDict,
    shapes_only: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Experiment:
    """Loads the backbone and builds the composer: in the type of training if there is something to
    train, else in that of evaluation. `of_stage` and `for_evaluation` change it.

    shapes_only: see `Composer.freeze`. devices: None = those of this run. Others need not be here:
    an experiment for them is to be compiled, not run, and `frozen` are jax.ShapeDtypeStruct, of a
    backbone whose weights need not be here either (`weights.published`).
    Raises ConfigError, MeshError, WeightsError.
    """
    evaluation = evaluation_dtype(config)
    if config.dtype not in DTYPES:
        raise ConfigError(unknown("config.dtype", config.dtype, DTYPES))
    rules = frozen_rules(config)
    mesh = make_mesh(config.mesh, devices)
    settings = config.composer.to_dict()
    name = settings.pop("name")
    cls = composers.composer_class(name)
    dtype = DTYPES[config.dtype if cls.trained else evaluation]
    # whole, before anything of it is read
    begins_with = hub.find(given) if (given := shared.given(config.init_from)) else None
    size = config.get("image_size")  # not in configs of earlier versions
    if devices is not None:
        backbone = published.architecture(config.backbone, dtype, size)
        params = jax.eval_shape(backbone.init, jax.random.key(0)) if cls.pretrained_backbone else {}
    elif cls.pretrained_backbone:
        where = functools.partial(placement.parameter_shardings, mesh, rules=rules)
        backbone, params = weights.load(config.backbone, dtype, image_size=size, shardings=where)
    else:
        backbone, params = weights.load_architecture(config.backbone, dtype, image_size=size), {}
    if config.preprocessing:
        backbone = backbone.with_preprocessing(config.preprocessing)
    if config.remat:
        backbone = backbone.with_remat()
    composer = composers.build(name, backbone, **settings)
    if begins_with:
        shared.check_backbone(begins_with, backbone)
    else:
        _check_init_from(config, composer)
    _check_export_to(config, composer)
    frozen = placement.place(mesh, _frozen(composer, params, shapes_only), rules)
    return Experiment(config, mesh, backbone, composer, frozen, begins_with)


def _check_init_from(config: ml_collections.ConfigDict, composer: Composer) -> None:
    """Raises ConfigError for official:PATH of a method that has no such, and for a workdir that no
    stage continues."""
    field = f"config.init_from={config.init_from!r}"
    names = stage_names(config)
    if official.given(config.init_from):
        official.check_known(composer, field)
    elif config.init_from and not any(config.stage[name].after for name in names):
        raise ConfigError(f"{field}: none of the stages {', '.join(names)} continues another one.")


def _check_export_to(config: ml_collections.ConfigDict, composer: Composer) -> None:
    """Raises ConfigError or WeightsError for what cannot be written there, before it is trained."""
    field = f"config.export_to={config.export_to!r}"
    if target := shared.given(config.export_to):
        shared.check(config, target)
    elif config.export_to:
        path = local(config.export_to, "config.export_to")
        if composer.pretrained_backbone:
            official.check_known(composer, field)
            if composer.exports_by_torch(path):
                check_torch(field)


def frozen_rules(config: ml_collections.ConfigDict) -> placement.Rules:
    """Where frozen parameters lie. Raises ConfigError for another `config.frozen` than these."""
    given = config.get("frozen", "split")  # not in configs of earlier versions
    if given not in placement.FROZEN:
        raise ConfigError(unknown("config.frozen", given, placement.FROZEN))
    return placement.FROZEN[given]


def evaluation_dtype(config: ml_collections.ConfigDict) -> str:
    """Key of `DTYPES`. Raises ConfigError for another `config.evaluation.dtype` than these."""
    given = config.evaluation.get("dtype", "float32")  # not in configs of earlier versions
    if given not in DTYPES:
        raise ConfigError(unknown("config.evaluation.dtype", given, DTYPES))
    return given


def of_stage(experiment: Experiment, name: str, shapes_only: bool = False) -> Experiment:
    """The experiment with the composer of stage `name`, where the stage has one of its own.

    A stage that inverts computes in the type of evaluation. shapes_only: see `Composer.freeze`.
    """
    config = experiment.config
    recipe = config.stage[name]
    dtype = evaluation_dtype(config) if recipe.kind == "inversion" else config.dtype
    return _view(experiment, dtype, recipe.composer.to_dict(), shapes_only)


def for_evaluation(experiment: Experiment) -> Experiment:
    """The experiment in the type of evaluation, over the same parameters."""
    return _view(experiment, evaluation_dtype(experiment.config), {})


def _view(
    experiment: Experiment, dtype: str, settings: dict[str, Any], shapes_only: bool = False
) -> Experiment:
    """settings: of another composer, name and arguments; {} = the experiment's own."""
    backbone = experiment.backbone.with_dtype(DTYPES[dtype])
    if not settings and backbone is experiment.backbone:
        return experiment
    settings = settings or experiment.config.composer.to_dict()
    composer = composers.build(settings.pop("name"), backbone, **settings)
    # nothing of a backbone that is trained from scratch
    frozen = _frozen(composer, experiment.frozen.get("backbone", {}), shapes_only)
    frozen = placement.place(experiment.mesh, frozen, frozen_rules(experiment.config))
    return dataclasses.replace(experiment, backbone=backbone, composer=composer, frozen=frozen)


def _frozen(composer: Composer, params: Any, shapes_only: bool) -> Any:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.eval_shape(lambda params: composer.freeze(params, shapes_only=True), params)
    return composer.freeze(params, shapes_only)


def stage_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The stages to run, checked against those that the experiment has."""
    wanted = config.stages
    wanted = [wanted] if isinstance(wanted, str) else wanted
    # on the command line, stages=a,b arrives as one name
    wanted = tuple(name.strip() for names in wanted for name in names.split(","))
    for name in wanted:
        if name not in config.stage:
            raise ConfigError(unknown(f"stage of experiment {config.name}:", name, config.stage))
    return wanted
