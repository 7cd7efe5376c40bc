"""What all experiments share: the fields, their meaning and their defaults. Values only."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cir_jax.errors import ConfigError, unknown

OPTIMIZER = {
    "name": "adamw",  # adamw (Adam with weight_decay=0) | muon
    "learning_rate": 1e-4,
    "schedule": "constant",  # constant | cosine | linear | step
    "drop_every": "0 steps",  # schedule step: a duration, and the factor
    "drop": 1.0,
    "warmup": "0 steps",  # a duration: "500 steps", "2 epochs", "300k examples", "5%"
    "final": 0.0,  # learning rate at the end, as a share of the peak
    "weight_decay": 0.01,
    "decay": r".*/(kernel|embedding)",  # paths that decay: matrices
    "only": ".*",  # paths that are trained; the rest stays as it is
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "clip_norm": 0.0,  # of the global gradient; 0 = no clipping
    "adam_learning_rate": 1e-3,  # muon only: for everything outside the blocks
    "backbone_share": 1.0,  # of the learning rate, for a backbone trained with a method's network
}


def benchmarks(dataset: str) -> tuple[str, ...]:
    """The benchmarks of the embedded world, `shapes` or `shapes_tiny`."""
    return tuple(f"{dataset}/{name}" for name in ("circo", "cirr", "fashioniq", "genecis"))


def experiment(name: str, composer: Mapping[str, Any]) -> ConfigDict:
    """The fields of every experiment. `composer` holds its name and its constructor's arguments."""
    config = ConfigDict()
    config.name = name
    config.seed = 0
    config.backbone = "data/shapes/clip"  # Hugging Face directory or hub id
    config.image_size = 0  # of the backbone; 0 = its own, else its positions are interpolated
    # of images: as the weights say | clip | targetpad | squarepad | squash
    config.preprocessing = ""
    config.dtype = "float32"  # | bfloat16: of training's computation; parameters stay float32
    # equal layers of towers and denoiser are a loop of a step's program: it compiles in less time,
    # and chips cannot fetch a layer's weights while they compute the one before
    config.scan = False
    config.remat = False  # the backbone's layers are computed twice, to train in less memory
    config.composer = ConfigDict(dict(composer))
    config.stage = ConfigDict()
    config.stages = ()  # which to run, in order
    # workdir whose result a first stage continues, or official:PATH, hub:DIR or hub:ORG/NAME
    config.init_from = ""
    # where to write what was trained: a backbone as a Hugging Face directory, a method's own
    # parameters as the checkpoint of its authors (the other end of official:PATH); hub:DIR writes
    # a composer for others, after the evaluation whose numbers its card has
    config.export_to = ""
    config.data_dir = ""  # "" = $CIR_JAX_DATA, else ~/.cache/cir_jax/data
    # what reads the batches on each host: processes (0 = threads of this one), threads of each of
    # them, batches that are read ahead; -1 and 0 = as the host has cores
    config.workers = -1
    config.threads = 0
    config.prefetch = 0
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1 = whatever is left
    # where parameters lie that are not trained: split over fsdp | replicated, which is faster if
    # they fit; --dry_run says the bytes
    config.frozen = "split"
    config.log_every = 50
    # best: benchmark and metric, "cirr R@1": each checkpoint is scored by it on val, and the best
    # one is kept beside the newest `keep` and is the result of the stage (unless another stage
    # continues this one); "" = the last one is
    config.checkpoint = ConfigDict({"every": "500 steps", "keep": 2, "best": ""})
    config.evaluation = ConfigDict()
    # | bfloat16: of evaluation, inversion and search; with bfloat16, nearest phrases move
    config.evaluation.dtype = "float32"
    config.evaluation.benchmarks = benchmarks("shapes")
    # "" = each benchmark's own: val where labels are public, test_0 of the embedded world, whose
    # hyper-parameters are chosen on val
    config.evaluation.split = ""
    config.evaluation.allow_partial = False  # benchmarks whose images are not all there
    config.evaluation.batch_size = 256
    # directory or hub id of an unCLIP decoder (extra `synth`): composed queries, decoded, in the
    # contact sheets; "" = none
    config.evaluation.decoder = ""
    return config


def stage(
    *,
    tables: Mapping[str, float],
    batch_size: int,
    duration: str,
    optimizer: Mapping[str, Any],
    dataset: str = "shapes",
    features: bool = False,
    with_reference: bool = False,
    group: int = 1,
    ema: float = 0.0,
    microbatches: int = 1,
    after: str = "",
    example: str = "",
    tokens: str = "",
    split: str = "train",
    composer: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """One training stage.

    tables: training table -> share of the rows. features: read precomputed image features instead
    of images. with_reference: caption rows carry an empty reference (stages that share a batch
    layout with triplets). group: consecutive records kept in one batch. duration: "500 steps",
    "2 epochs", "300k examples". ema: decay of the averaged parameters, 0 = none. microbatches:
    parts a batch is encoded in. after: the stage whose result this one continues. example: what
    becomes of a record (`cir_jax.training.inputs.EXAMPLES`), "" = what its table is for. tokens:
    the inversion stage whose pseudo-words are joined to the records, "" = none. split: of the
    tables; "train[:1000]" are the first records. composer: another composer than the experiment's,
    for this stage alone.
    """
    if wrong := sorted(set(optimizer) - set(OPTIMIZER)):
        raise ConfigError(unknown("optimizer field", wrong[0], OPTIMIZER))
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "dataset": dataset,
            "tables": dict(tables),
            "features": features,
            "with_reference": with_reference,
            "group": group,
            "example": example,
            "tokens": tokens,
            "split": split,
            # JPEGs of twice the pixels that are needed, or more, are decoded at a half, a quarter
            # or an eighth of their size: faster, other pixels than the released codes read
            "reduced_jpeg": False,
        }
    )
    config.kind = "train"
    config.composer = ConfigDict(dict(composer or {}))
    config.batch_size = batch_size
    config.duration = duration
    config.optimizer = ConfigDict(OPTIMIZER | dict(optimizer))
    config.ema = ema
    config.microbatches = microbatches
    config.after = after
    return config


def inversion_stage(
    *,
    composer: Mapping[str, Any],
    table: str,
    batch_size: int,
    dataset: str = "shapes",
    split: str = "train",
) -> ConfigDict:
    """A stage that inverts each image of a table with `composer` and stores the pseudo-words.

    batch_size: images inverted together, on all devices. split: as `stage`'s.
    """
    config = ConfigDict()
    config.kind = "inversion"
    config.composer = ConfigDict(dict(composer))
    config.data = ConfigDict({"dataset": dataset, "tables": {table: 1.0}, "split": split})
    config.batch_size = batch_size
    config.after = ""
    return config


def around(config: ConfigDict, name: str, **settings: Any) -> ConfigDict:
    """The experiment `config` of another method, with composer `name` around that method's: its
    stages train what they train there, and `settings` are the composer's own."""
    config.name = name
    word = config.composer.to_dict()
    for stage in config.stages:
        if not config.stage[stage].composer:
            config.stage[stage].composer = ConfigDict(dict(word))
    config.composer = ConfigDict({"name": name, "word": word, **settings})
    return config


def apply(config: ConfigDict, presets: Mapping[str, Mapping[str, Any]], name: str) -> ConfigDict:
    """`config` with the dotted overrides of preset `name`. ConfigError lists the presets."""
    if name not in presets:
        raise ConfigError(unknown(f"preset of experiments/{config.name}.py:", name, presets))
    config.update_from_flattened_dict(dict(presets[name]))
    config.preset = name
    return config
