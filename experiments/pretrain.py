"""Contrastive pretraining of the small CLIP of the embedded world.

    python launch/main.py --config=experiments/pretrain.py --config.export_to=data/shapes/clip

is how data/shapes/clip was made (seed 0). See data/shapes/clip/README.md for time and quality.
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "shapes": {},
    "smoke": {
        "stage.contrastive.data.dataset": "shapes_tiny",
        "stage.contrastive.batch_size": 32,
        "stage.contrastive.duration": "20 steps",
        "evaluation.benchmarks": ("shapes_tiny/captions",),
        "log_every": 5,
    },
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("pretrain", {"name": "clip_pretraining"})
    config.stages = ("contrastive",)
    config.stage.contrastive = base.stage(
        tables={"pretrain": 1.0},
        group=2,  # a scene and its twin without one shape: hard negatives for negation
        batch_size=192,
        duration="2400 steps",
        optimizer={
            "name": "muon",
            "learning_rate": 0.02,
            "adam_learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup": "50 steps",
            "final": 0.005,
            "weight_decay": 0.0,
            "b2": 0.98,
            "clip_norm": 1.0,
        },
    )
    config.evaluation.benchmarks = ("shapes/captions",)
    config.evaluation.split = "val"
    return base.apply(config, PRESETS, preset)
