"""Pretraining of the small CLIP and the small BLIP of the embedded world.

    python launch/main.py --config=experiments/pretrain.py --config.export_to=data/shapes/clip
    python launch/main.py --config=experiments/pretrain.py:blip --config.export_to=data/shapes/blip

is how data/shapes/clip and data/shapes/blip were made (seed 0). The READMEs there have time and
quality.
"""

from ml_collections import ConfigDict

from experiments import base

BLIP = {
    "backbone": "data/shapes/blip",
    "composer": {"name": "blip_pretraining", "temperature": 0.04},
    "stage.contrastive.batch_size": 128,
    "stage.contrastive.duration": "1000 steps",
}
SMOKE = {
    "stage.contrastive.data.dataset": "shapes_tiny",
    "stage.contrastive.batch_size": 32,
    "stage.contrastive.duration": "20 steps",
    "evaluation.benchmarks": ("shapes_tiny/captions",),
    "log_every": 5,
}
PRESETS = {"shapes": {}, "smoke": SMOKE, "blip": BLIP, "blip_smoke": BLIP | SMOKE}


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
