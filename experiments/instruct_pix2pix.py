"""CLIP + InstructPix2Pix: the naive baseline, editing the reference, then comparing images.

    python launch/eval.py --config=experiments/instruct_pix2pix.py:vit_l14 --benchmarks=circo

vit_l14: CompoDiff's Table 3, CLIP ViT-L/14 and timbrooks/instruct-pix2pix. Needs the extra `synth`,
and a GPU for more than a few queries: 100 steps for each. Edited images are kept in the cache, so
an interrupted evaluation goes on. --config.composer.model=DIR: other weights. shapes: on the
embedded world, which InstructPix2Pix has never seen; smoke: in 2 steps.
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "shapes": {},
    "smoke": {
        "composer.steps": 2,
        "composer.resolution": 64,
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
    },
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14"},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "instruct_pix2pix",
        "model": "timbrooks/instruct-pix2pix",
        "steps": 100,
        "text_guidance": 7.5,
        "image_guidance": 1.5,
        "resolution": 512,
    }
    return base.apply(base.experiment("instruct_pix2pix", composer), PRESETS, preset)
