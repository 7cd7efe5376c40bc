"""ARTEMIS: explicit matching and implicit similarity, trained on image triplets.

    python launch/main.py --config=experiments/artemis.py

Takes 1 to 3 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 24.9 +- 2.7, where image + text has 14.5 +- 1.7. Among nine settings of width and first
temperature, these were the best on val (23.2; temperature 2.66, as released: 23.0, 2.0: 20.9; width
128: 23.1, 512: 22.7).

Presets: shapes (embedded world), smoke (seconds, for tests), and the comparison of CompoDiff's
paper on clip_rn50, whose settings are not published: the release's, on triplets of a prepared
dataset, named with --config.stage.match.data.dataset (`data/image_triplets`: FashionIQ, CIRR,
SynthTriplets18M).

official, fashioniq and cirr are the release itself. A checkpoint of it needs no training. It is the
backbone, too; its vocabulary lies beside it (for one of CIRR, the benchmark is cirr:artemis):

    python launch/eval.py --config=experiments/artemis.py:official \\
        --config.backbone=model_best.pth --config.init_from=official:model_best.pth

Training begins with a directory that `cir_jax.weights.artemis.begin` makes of torchvision's
ResNet, the captions of training and GloVe's vectors. Then, in two stages, first all is trained but
the ResNet and the words' embeddings, then all (on CIRR never the ResNet):

    python launch/main.py --config=experiments/artemis.py:fashioniq --config.backbone=DIR
"""

from ml_collections import ConfigDict

from experiments import base

OWN = r"/(networks|backbone/(visual_projection|text/(ahead|back|projection)))/.*"
"""What the release trains from the beginning."""

TEMPERATURE = 2.65926
"""The release's first one, ln(1 / 0.07)."""


def _released(stage: str, epochs: int, learning_rate: float, drop_every: int) -> dict[str, object]:
    return {
        # no corpus ships: a prepared dataset with a table `triplets`
        f"stage.{stage}.data.dataset": "",
        f"stage.{stage}.batch_size": 32,
        f"stage.{stage}.duration": f"{epochs} epochs",
        f"stage.{stage}.optimizer.learning_rate": learning_rate,
        f"stage.{stage}.optimizer.schedule": "step",
        f"stage.{stage}.optimizer.drop": 0.5,
        f"stage.{stage}.optimizer.drop_every": f"{drop_every} epochs",
        f"stage.{stage}.optimizer.warmup": "0 steps",
        f"stage.{stage}.optimizer.weight_decay": 0.01,
        f"stage.{stage}.optimizer.decay": ".*",
    }


def _two_stages(double: int, then: str) -> dict[str, object]:
    """double: 2 where a record has two orders of its captions, of which an epoch here has one.
    then: what the second stage trains."""
    released = {
        "backbone": "",
        "composer.embed_dim": 0,
        "composer.temperature": TEMPERATURE,
        "composer.train_backbone": True,
        "stages": ("match", "finetune"),
        "stage.match.optimizer.only": OWN,
        "stage.finetune.optimizer.only": then,
        **_released("match", 8 * double, 5e-4, 4 * double),
        # the rate that is left of the first stage
        **_released("finetune", 50 * double, 2.5e-4, 10 * double),
    }
    for stage in ("match", "finetune"):
        released[f"stage.{stage}.data.features"] = False
    return released


PRESETS = {
    "shapes": {},
    "smoke": {
        "composer.embed_dim": 16,
        "stage.match.data.dataset": "shapes_tiny",
        "stage.match.batch_size": 32,
        "stage.match.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "clip_rn50": {
        "backbone": "timm/resnet50_clip.openai",
        "dtype": "bfloat16",
        "composer.embed_dim": 512,
        "composer.temperature": TEMPERATURE,
        **_released("match", 50, 5e-4, 10),
    },
    "official": {
        "backbone": "",
        "composer.embed_dim": 0,
        "evaluation.benchmarks": ("fashioniq:artemis_words",),
    },
    "fashioniq": {
        **_two_stages(2, ".*"),
        "stage.match.data.example": "augmented_triplets",
        "stage.finetune.data.example": "augmented_triplets",
        "evaluation.benchmarks": ("fashioniq:artemis_words",),
    },
    "cirr": {
        **_two_stages(1, "/(networks|backbone/(visual_projection|text))/.*"),
        "evaluation.benchmarks": ("cirr:artemis",),
    },
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "artemis",
        "embed_dim": 256,
        "version": "ARTEMIS",
        "train_backbone": False,
        "temperature": 3.5,  # of the start: it is learned
    }
    config = base.experiment("artemis", composer)
    config.stages = ("match",)
    config.stage.match = base.stage(
        tables={"triplets": 1.0},
        features=True,
        batch_size=128,
        duration="400 steps",
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": "50 steps"},
    )
    if "stage.finetune.duration" in PRESETS.get(preset, {}):
        config.stage.finetune = base.stage(
            tables={"triplets": 1.0}, batch_size=32, duration="", after="match", optimizer={}
        )
    return base.apply(config, PRESETS, preset)
