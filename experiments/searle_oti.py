"""SEARLE-OTI: the reference image as a word, by optimisation, no training (arXiv 2303.15247).

    python launch/eval.py --config=experiments/searle_oti.py

inverts the reference image of every query, in 2 minutes on two CPU cores. Expected on the embedded
world (three seeds): CIRCO-like mAP@10 19.2 +- 1.8, where image + text has 14.5 +- 1.7. To invert
the images of a table once and keep the words:

    python launch/main.py --config=experiments/searle_oti.py --config.stages=oti

Preset inversion (Table 7), what a word holds of its image: without regulariser, "a photo of $"
finds the image among 1,000 random scenes:

    python launch/eval.py --config=experiments/searle_oti.py:inversion

R@1 96.7 +- 0.5 (three seeds, the same scenes; 2 minutes each on two CPU cores; the paper on CIRR:
99.72). Learning rate, starts and ema were chosen on these scenes, there is no val part. Here many
optimisations end in poor local minima, so it decays a high learning rate and keeps the best of four
starts. With seed 0, --config.composer.schedule=constant --config.composer.starts=1 gives 91.3, and
--config.composer.regulariser=phrases 95.4 (7 minutes). Queries with a modification text gain from
neither: preset shapes has mAP@10 20.3 on --benchmarks=shapes/circo --config.evaluation.split=val,
19.8 with four starts, and 18.4 to 19.2 with schedule=cosine and a learning_rate of 0.05 to 1.

The images of a benchmark: --config.stage.oti.data.dataset=cirr --config.stage.oti.data.split=val
--config.stage.oti.data.tables.images=0 (shapes: captions) --config.stage.oti.data.tables.gallery=1.
Stored words, of launch/export_words.py or of the released code (a folder with
ema_oti_pseudo_tokens.pt and image_names.pkl), answer queries by the names of their images:

    python launch/eval.py --config=experiments/searle_oti.py:vit_b32 --benchmarks=cirr \\
        --config.composer.words=DIR

vit_b32, vit_l14: the paper's recipe (Table 3, B/32 on CIRCO: mAP@10 7.83). They need the released
phrases, --config.composer.phrases=concept_to_phrases.pkl, and their stage a table `images`
(launch/prepare.py) in --config.stage.oti.data.dataset=NAME.
"""

from ml_collections import ConfigDict

from experiments import base

PAPER = {
    "preprocessing": "targetpad",
    "composer.phrases": "concept_to_phrases.pkl",
    "composer.top_k": 15,
    "composer.iterations": 350,
    "composer.ema": 0.99,
    "stage.oti.data.dataset": "",
    "stage.oti.batch_size": 32,
}
PRESETS = {
    "shapes": {},
    "inversion": {
        "composer.regulariser": "none",
        "composer.iterations": 500,
        "composer.learning_rate": 1.0,
        "composer.schedule": "cosine",
        "composer.starts": 4,
        "composer.ema": 0.95,
        "evaluation.benchmarks": ("shapes/inversion",),
        "evaluation.batch_size": 16,  # larger ones fall out of the processor's cache
    },
    "smoke": {
        "composer.iterations": 3,
        "stage.oti.data.dataset": "shapes_tiny",
        "stage.oti.batch_size": 16,
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
    },
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **PAPER},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **PAPER},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "searle_oti",
        "image_weight": 0.0,  # of the reference image itself, by Slerp
        "phrases": "data/shapes/phrases.json",
        "names": "",  # file of the concepts; "" = all that have phrases
        "cached_phrases": 1 << 16,  # features of so many are kept, of more computed when drawn
        "top_k": 1,  # this, iterations and ema were chosen on val
        "iterations": 100,
        "learning_rate": 2e-2,
        "schedule": "constant",  # constant | cosine, to 0
        "starts": 1,  # of these optimisations of an image, the best word is kept
        "weight_decay": 0.01,
        "ema": 0.9,
        "weight_cos": 1.0,
        "weight_gpt": 0.5,
        "image_loss": "cosine",  # cosine | l2
        "regulariser": "phrases",  # phrases | concept | random | none (Table 4)
        "words": "",  # folder of stored words of the benchmark's images, instead of all the above
    }
    config = base.experiment("searle_oti", composer)
    paper = preset.startswith("vit")
    # with the composer of the experiment
    config.stage.oti = base.inversion_stage(
        composer={}, table="images" if paper else "captions", batch_size=64
    )
    config.stage.oti.data.tables.gallery = 0.0  # of a benchmark
    return base.apply(config, PRESETS, preset)
