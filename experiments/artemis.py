"""ARTEMIS: explicit matching and implicit similarity, trained on image triplets.

    python launch/main.py --config=experiments/artemis.py

Presets: shapes (embedded world), smoke (seconds, for tests), and the comparison of CompoDiff's
paper on clip_rn50, whose settings are not published: the release's, on triplets of a prepared
dataset, named with --config.stage.match.data.dataset (`data/image_triplets`: FashionIQ, CIRR,
SynthTriplets18M).

An official checkpoint needs no training. It is the backbone, too; its vocabulary lies beside it:

    python launch/eval.py --config=experiments/artemis.py:official \\
        --config.backbone=model_best.pth --config.init_from=official:model_best.pth
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "composer.embed_dim": 512,
    # no corpus ships: a prepared dataset with a table `triplets`
    "stage.match.data.dataset": "",
    "stage.match.batch_size": 32,
    "stage.match.duration": "50 epochs",
    "stage.match.optimizer.learning_rate": 5e-4,
    "stage.match.optimizer.schedule": "step",
    "stage.match.optimizer.drop": 0.5,
    "stage.match.optimizer.drop_every": "10 epochs",
    "stage.match.optimizer.warmup": "0 steps",
    "stage.match.optimizer.weight_decay": 0.01,
    "stage.match.optimizer.decay": ".*",
}
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
    "clip_rn50": {"backbone": "timm/resnet50_clip.openai", "dtype": "bfloat16", **RELEASED},
    "official": {
        **RELEASED,
        "backbone": "",  # a checkpoint
        "composer.embed_dim": 0,
        "evaluation.benchmarks": ("fashioniq:artemis_words", "cirr:artemis"),
    },
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("artemis", {"name": "artemis", "embed_dim": 128, "version": "ARTEMIS"})
    config.stages = ("match",)
    config.stage.match = base.stage(
        tables={"triplets": 1.0},
        features=True,
        batch_size=128,
        duration="400 steps",
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": "50 steps"},
    )
    return base.apply(config, PRESETS, preset)
