"""Image + text baseline: the sum of the two unit features.

python launch/eval.py --config=experiments/image_text.py
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "shapes": {},
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32"},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14"},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("image_text", {"name": "image_text"})
    return base.apply(config, PRESETS, preset)
