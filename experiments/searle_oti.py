"""SEARLE-OTI: the reference image as a word, by optimisation, no training (arXiv 2303.15247).

    python launch/eval.py --config=experiments/searle_oti.py

inverts the reference image of every query. To invert the images of a table once and keep the tokens:

    python launch/main.py --config=experiments/searle_oti.py --config.stages=oti \\
        --config.stage.oti.data.dataset=DATASET --config.stage.oti.data.tables.images=1.0

The presets vit_* are the paper's (Table 3, B/32 on CIRCO: mAP@10 7.83) and need the released
phrases: --config.composer.phrases=concept_to_phrases.pkl.
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "composer.phrases": "concept_to_phrases.pkl",
    "composer.top_k": 15,
    "composer.iterations": 350,
    "composer.learning_rate": 2e-2,
    "composer.weight_gpt": 0.5,
}
PRESETS = {
    "shapes": {},
    "smoke": {
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "composer.iterations": 3,
    },
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **RELEASED},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **RELEASED},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "searle_oti",
        "phrases": "data/shapes/phrases.json",
        "names": "",  # of the concepts; "" = all that have phrases
        "top_k": 5,
        "iterations": 100,
        "learning_rate": 2e-2,
        "weight_decay": 0.01,
        "ema": 0.99,
        "weight_cos": 1.0,
        "weight_gpt": 0.5,
        "image_loss": "cosine",  # cosine | l2
        "regulariser": "phrases",  # phrases | concept | random | none (Table 4)
    }
    config = base.experiment("searle_oti", composer)
    return base.apply(config, PRESETS, preset)
