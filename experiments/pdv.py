"""PDV-F around a pseudo-word method: no training of its own (arXiv 2502.07215).

    python launch/main.py --config=experiments/pdv.py

trains the method inside (shapes: Pic2Word) as its own experiment does, and evaluates with PDV-F.

On val of the embedded world: CIRCO-like mAP@10 19.5, where Pic2Word alone has 17.8
(benchmarks/tune.json).

Presets: shapes and smoke (Pic2Word inside), searle, lincir, palavra, rtd, and METHOD_vit_b32,
METHOD_vit_l14 for the authors' weights:

    python launch/eval.py --config=experiments/pdv.py:searle_vit_l14 \\
        --config.init_from=official:SEARLE_ViT-L14.pt

The paper, SEARLE inside, L/14 on CIRCO: mAP@5 12.6, where SEARLE alone has 11.7.
"""

from ml_collections import ConfigDict

from experiments import base

METHODS = ("pic2word", "searle", "lincir")
INSIDE = {
    "shapes": "pic2word:shapes",
    "smoke": "pic2word:smoke",
    **{name: f"{name}:shapes" for name in ("searle", "lincir", "palavra", "rtd")},
    **{f"{name}_{size}": f"{name}:{size}" for name in METHODS for size in ("vit_b32", "vit_l14")},
}
"""Preset -> the method inside and its preset."""
PRESETS: dict[str, dict] = {name: {} for name in INSIDE}


def get_config(preset: str = "shapes") -> ConfigDict:
    inside = INSIDE.get(preset, INSIDE["shapes"])  # an unknown preset is `base.apply`'s to say
    config = base.around(inside, "pdv", alpha_image=0.3, alpha_text=1.0, beta=0.8)  # chosen on val
    return base.apply(config, PRESETS, preset)
