"""CLIP4Cir's first stage: CLIP is tuned so that image + text finds the target (arXiv 2308.11485).

    python launch/main.py --config=experiments/clip4cir.py

Takes 3 to 4 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 20.1 +- 2.8, where image + text, which it tunes, has 14.5 +- 1.7 and Slerp 22.4 +- 2.8.

Its CLIP is a backbone for Combiner, the second stage (or any other method):

    python launch/main.py --config=experiments/clip4cir.py --config.export_to=runs/clip4cir/clip
    python launch/main.py --config=experiments/combiner.py --config.backbone=runs/clip4cir/clip

--config.composer.tuned=text|image tunes one encoder. Presets: shapes (embedded world), smoke
(seconds, for tests), and the released recipe on rn50, rn50x4, vit_b32 and vit_l14, on the triplets
of a prepared dataset, named with --config.stage.tune.data.dataset (`data/image_triplets`:
FashionIQ, CIRR). The authors' tuned CLIP needs no training:

    python launch/eval.py --config=experiments/clip4cir.py:rn50x4 \\
        --config.init_from=official:tuned_clip_best.pt
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "dtype": "bfloat16",
    "preprocessing": "targetpad",
    # no corpus ships: a prepared dataset with a table `triplets`
    "stage.tune.data.dataset": "",
    "stage.tune.data.example": "joined_triplets",
    "stage.tune.batch_size": 128,
    "stage.tune.duration": "100 epochs",
    "stage.tune.optimizer.learning_rate": 2e-6,
    "stage.tune.optimizer.schedule": "constant",
    "stage.tune.optimizer.warmup": "0 steps",
    "stage.tune.optimizer.eps": 1e-7,
}
PRESETS = {
    "shapes": {},
    "smoke": {
        "stage.tune.data.dataset": "shapes_tiny",
        "stage.tune.batch_size": 32,
        "stage.tune.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "rn50": {"backbone": "timm/resnet50_clip.openai", **RELEASED},
    "rn50x4": {"backbone": "timm/resnet50x4_clip.openai", **RELEASED},
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **RELEASED},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **RELEASED},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {"name": "clip4cir", "tuned": "both", "scale": 100.0}  # both | text | image
    config = base.experiment("clip4cir", composer)
    config.stages = ("tune",)
    config.stage.tune = base.stage(
        tables={"triplets": 1.0},
        batch_size=128,
        duration="200 steps",
        optimizer={
            "learning_rate": 1e-4,
            "schedule": "cosine",
            "warmup": "20 steps",
            "decay": ".*",
        },
    )
    return base.apply(config, PRESETS, preset)
