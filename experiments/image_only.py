"""Image-only baseline: the reference image alone.

python launch/eval.py --config=experiments/image_only.py
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "shapes": {},
    "smoke": {"evaluation.benchmarks": base.benchmarks("shapes_tiny")},
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32"},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14"},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("image_only", {"name": "image_only"})
    return base.apply(config, PRESETS, preset)
