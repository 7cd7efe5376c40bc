"""Slerp: spherical interpolation of image and text features, no training (arXiv 2405.00571).

    python launch/eval.py --config=experiments/slerp.py

Paper: alpha 0.8 on CIRCO and FashionIQ, 0.9 on CIRR. On the embedded world 0.8 was chosen on
val; expected there (README): CIRCO-like mAP@10 22.4 +- 2.8. The paper, ViT-L/14 on CIRCO: 9.84.
Preset tat is on the CLIP that experiments/tat.py tuned, blip on the small BLIP of
experiments/isa.py.
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "shapes": {},
    "blip": {"backbone": "data/shapes/blip", "composer.alpha": 0.6},  # chosen on val, too
    "smoke": {"evaluation.benchmarks": base.benchmarks("shapes_tiny")},
    "tat": {"backbone": "runs/tat/shapes/backbone"},  # experiments/tat.py writes it
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32"},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14"},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("slerp", {"name": "slerp", "alpha": 0.8})
    return base.apply(config, PRESETS, preset)
