"""PDV-F around a pseudo-word method: no training of its own (arXiv 2502.07215).

    python launch/main.py --config=experiments/pdv.py

trains the method inside (shapes: Pic2Word) as its own experiment does, and evaluates with PDV-F.
Around SEARLE-OTI there is nothing to train:

    python launch/eval.py --config=experiments/pdv.py:searle_oti

(on val, --benchmarks=shapes/circo --config.evaluation.split=val, mAP@10 21.2, OTI alone 20.3.)

Takes 1 to 2 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 19.9 +- 2.0, where Pic2Word alone has 17.4 +- 1.7. Its factors were chosen on val
(benchmarks/tune.json).

Presets: shapes and smoke (Pic2Word inside), searle, searle_oti, lincir, palavra, isa, rtd, and
METHOD_vit_b32, METHOD_vit_l14 for the authors' weights:

    python launch/eval.py --config=experiments/pdv.py:searle_vit_l14 \\
        --config.init_from=official:SEARLE_ViT-L14.pt

The paper, SEARLE inside, L/14 on CIRCO: mAP@5 12.6, where SEARLE alone has 11.7.
"""

from ml_collections import ConfigDict

from experiments import base, isa, lincir, palavra, pic2word, rtd, searle, searle_oti

METHODS = {
    "pic2word": pic2word, "searle": searle, "searle_oti": searle_oti, "lincir": lincir,
    "palavra": palavra, "isa": isa, "rtd": rtd,
}  # fmt: skip
PAPERS = ("pic2word", "searle", "searle_oti", "lincir")
"""Those with presets for real backbones."""
INSIDE = {
    "shapes": ("pic2word", "shapes"),
    "smoke": ("pic2word", "smoke"),
    **{name: (name, "shapes") for name in METHODS if name != "pic2word"},
    **{f"{name}_{size}": (name, size) for name in PAPERS for size in ("vit_b32", "vit_l14")},
}
"""Preset -> the method inside and its preset."""
PRESETS: dict[str, dict] = {name: {} for name in INSIDE}


def get_config(preset: str = "shapes") -> ConfigDict:
    # an unknown preset is `base.apply`'s to say
    method, of_method = INSIDE.get(preset, INSIDE["shapes"])
    inside = METHODS[method].get_config(of_method)
    # chosen on val
    config = base.around(inside, "pdv", alpha_image=0.3, alpha_text=1.0, beta=0.8)
    return base.apply(config, PRESETS, preset)
