"""Image + text baseline: the sum of the two unit features; BGE-VL: of the un-normalised ones.

    python launch/eval.py --config=experiments/image_text.py
    python launch/eval.py --config=experiments/image_text.py:bge_vl_base --split=test

BGE-VL (MegaPairs, arXiv 2412.14475) is a CLIP trained for its sum. Its CIRCO numbers are of texts
that say what the images share (circo:bge_vl); circo, beside it, has the captions alone. Preset blip
is on the small BLIP of experiments/isa.py.
"""

from ml_collections import ConfigDict

from experiments import base

BGE_VL = {
    "composer.unit": False,
    "evaluation.benchmarks": ("circo:bge_vl", "circo", "cirr", "fashioniq:bge_vl"),
}
PRESETS = {
    "shapes": {},
    "blip": {"backbone": "data/shapes/blip"},
    "smoke": {"evaluation.benchmarks": base.benchmarks("shapes_tiny")},
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32"},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14"},
    "bge_vl_base": {"backbone": "BAAI/BGE-VL-base", **BGE_VL},
    "bge_vl_large": {"backbone": "BAAI/BGE-VL-large", **BGE_VL},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment("image_text", {"name": "image_text", "unit": True})
    return base.apply(config, PRESETS, preset)
