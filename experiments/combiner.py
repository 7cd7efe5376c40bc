"""Combiner: a network fuses image and text features, trained on image triplets (CLIP4Cir).

    python launch/main.py --config=experiments/combiner.py

Takes 1 to 2 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 25.1 +- 2.2, where Slerp has 22.4 +- 2.8 and image + text 14.5 +- 1.7. Dropout and scale were
chosen on val (benchmarks/tune.json).

Presets: shapes (embedded world), smoke (seconds, for tests), tat (on the CLIP that
experiments/tat.py tuned), and the released stage 2 on rn50, rn50x4, vit_b32 and vit_l14, on the
triplets of a prepared dataset, named with --config.stage.fuse.data.dataset (`data/image_triplets`:
FashionIQ, CIRR, SynthTriplets18M). Released weights need no training:

    python launch/eval.py --config=experiments/combiner.py:vit_b32 \\
        --config.backbone=tuned_clip_best.pt --config.init_from=official:combiner.pt

A CLIP of CLIP4Cir's stage 1 is a state dict alone: the vocabulary (`bpe_simple_vocab_16e6.txt.gz`)
and an `open_clip_config.json` that says QuickGELU lie beside it; the message about what is missing
gives its content.
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "dtype": "bfloat16",
    "preprocessing": "targetpad",
    "composer.projection_dim": 2560,
    "composer.hidden_dim": 5120,
    "composer.dropout": 0.5,
    "composer.scale": 100.0,
    # no corpus ships: a prepared dataset with a table `triplets`
    "stage.fuse.data.dataset": "",
    "stage.fuse.data.example": "joined_triplets",
    "stage.fuse.batch_size": 4096,
    "stage.fuse.duration": "300 epochs",
    "stage.fuse.optimizer.learning_rate": 2e-5,
    "stage.fuse.optimizer.schedule": "constant",
    "stage.fuse.optimizer.warmup": "0 steps",
    "stage.fuse.optimizer.weight_decay": 0.0,
}
PRESETS = {
    "shapes": {},
    "smoke": {
        "composer.projection_dim": 16,
        "composer.hidden_dim": 32,
        "stage.fuse.data.dataset": "shapes_tiny",
        "stage.fuse.batch_size": 32,
        "stage.fuse.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "tat": {"backbone": "runs/tat/shapes/backbone"},  # experiments/tat.py writes it
    "rn50": {"backbone": "timm/resnet50_clip.openai", **RELEASED},
    "rn50x4": {"backbone": "timm/resnet50x4_clip.openai", **RELEASED},
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **RELEASED},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **RELEASED},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "combiner",
        "projection_dim": 512,
        "hidden_dim": 1024,
        "dropout": 0.3,
        "scale": 20.0,
    }
    config = base.experiment("combiner", composer)
    config.stages = ("fuse",)
    config.stage.fuse = base.stage(
        tables={"triplets": 1.0},
        features=True,
        batch_size=128,
        duration="400 steps",
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": "50 steps"},
    )
    return base.apply(config, PRESETS, preset)
