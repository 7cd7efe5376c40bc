"""SEARLE: words found by optimisation are distilled into a network (arXiv 2303.15247).

    python launch/main.py --config=experiments/searle.py

Takes 2 to 3 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 19.4 +- 1.3, where image + text has 14.5 +- 1.7 and text alone 4.2 +- 0.2. The paper on
CIRCO: 9.43 (B/32), 12.12 (L/14; 12.73 with the released weights).

Stage `oti` inverts images one by one and stores the words, `distil` trains phi on them. Presets:
shapes (embedded world; the first 1,536 images), smoke (seconds, for tests), and on B/32 and L/14
the paper's settings (vit_b32, vit_l14) and those of the released code (vit_b32_code, vit_l14_code),
which weighs the regulariser more. They want the released phrases (concept_to_phrases.pkl) and a
prepared dataset with a table `images` (the paper: 100,000 images, ImageNet's test split), named
with --config.stage.oti.data.dataset and --config.stage.distil.data.dataset. The released weights
need neither:

    python launch/eval.py --config=experiments/searle.py:vit_b32 \\
        --config.init_from=official:SEARLE_ViT-B32.pt

--config.stage.distil.composer.cached_phrases=6000000 computes the features of all 5.4 million
released phrases once, before the first step: 11 GB on each device with B/32, 17 GB with L/14, and
twice that on the host.

Ablations of Table 4: --config.stage.distil.composer.distillation=cosine|none,
--config.stage.distil.composer.weight_gpt=0.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base


def _released(backbone: str, epochs: int, weight_gpt: float, top_k: int) -> dict[str, Any]:
    """Preset of a backbone; OTI is the same in paper and code."""
    changes: dict[str, Any] = {
        "backbone": backbone,
        "preprocessing": "targetpad",
        "dtype": "bfloat16",
        "stage.oti.composer.top_k": 15,
        "stage.oti.composer.iterations": 350,
        "stage.oti.composer.learning_rate": 2e-2,
        "stage.oti.composer.ema": 0.99,
        "stage.distil.composer.top_k": top_k,
        "stage.distil.composer.dropout": 0.5,
        "stage.distil.composer.weight_gpt": weight_gpt,
        "stage.distil.batch_size": 256,
        "stage.distil.duration": f"{epochs} epochs",
        "stage.distil.optimizer.learning_rate": 1e-4,
        "stage.distil.optimizer.schedule": "constant",
        "stage.distil.optimizer.warmup": "0 steps",
        "stage.distil.optimizer.decay": ".*",
        "checkpoint.every": "5 epochs",
    }
    for stage in ("oti", "distil"):
        changes |= {
            f"stage.{stage}.composer.phrases": "concept_to_phrases.pkl",
            f"stage.{stage}.data.dataset": "",
            f"stage.{stage}.data.tables.captions": 0.0,
            f"stage.{stage}.data.tables.images": 1.0,
            f"stage.{stage}.data.split": "train",
        }
    return changes


B32, L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
PRESETS = {
    "shapes": {},
    "smoke": {
        "stage.oti.data.dataset": "shapes_tiny",
        "stage.oti.data.split": "train[:64]",
        "stage.oti.composer.iterations": 3,
        "stage.oti.batch_size": 32,
        "stage.distil.data.dataset": "shapes_tiny",
        "stage.distil.data.split": "train[:64]",
        "stage.distil.batch_size": 32,
        "stage.distil.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "vit_b32": _released(B32, 100, 0.25, 15),
    "vit_l14": _released(L14, 50, 0.25, 15),
    "vit_b32_code": _released(B32, 100, 0.75, 150),
    "vit_l14_code": _released(L14, 50, 0.75, 150),
}


def get_config(preset: str = "shapes") -> ConfigDict:
    # phrases and losses belong to the stage: a trained phi needs none of them
    config = base.experiment("searle", {"name": "searle", "image_weight": 0.0})
    config.stages = ("oti", "distil")
    # top_k chosen on val: mAP@10 19.3 with 1, 17.8 with 5
    phrases = {
        "phrases": "data/shapes/phrases.json",
        "names": "",
        "top_k": 1,
        "cached_phrases": 1 << 16,  # features of so many are kept, of more computed when drawn
    }
    config.stage.oti = base.inversion_stage(
        composer={
            "name": "searle_oti",
            **phrases,
            "iterations": 60,
            "learning_rate": 5e-2,
            "ema": 0.9,
        },
        table="captions",
        split="train[:1536]",
        batch_size=128,
    )
    config.stage.oti.data.tables.images = 0.0
    config.stage.distil = base.stage(
        tables={"captions": 1.0, "images": 0.0},
        split="train[:1536]",
        example="images",
        tokens="oti",
        features=True,
        composer={
            "name": "searle",
            **phrases,
            "dropout": 0.5,
            "distillation": "contrastive",  # contrastive | cosine | none
            "temperature": 0.25,
            "weight_distil": 1.0,
            "weight_gpt": 0.75,
        },
        batch_size=128,
        duration="300 steps",
        optimizer={"learning_rate": 2e-3, "schedule": "cosine", "warmup": "50 steps"},
    )
    return base.apply(config, PRESETS, preset)
