"""LinCIR: captions alone teach a network to name images (arXiv 2312.01998).

    python launch/main.py --config=experiments/lincir.py

Takes 4 to 6 minutes on two CPU cores. Expected on the embedded world (three seeds): CIRCO-like
mAP@10 16.2 +- 0.8, where image + text has 14.5 +- 1.7 and text alone 4.2 +- 0.2. Images are not
read in training.

Presets: shapes (embedded world), smoke (seconds, for tests), and the paper's recipe on vit_b32,
vit_l14, vit_h14 and vit_g14: 5.5 million texts in a prepared dataset with a table `texts`
(`launch/prepare.py --dataset=texts`), named with --config.stage.smp.data.dataset, keywords by spaCy
(`pip install cir_jax[keywords]`). --config.checkpoint.best="cirr R@1" chooses the checkpoint as the
release does; it wants a prepared CIRR. Released weights need no training:

    python launch/eval.py --config=experiments/lincir.py:vit_l14 \\
        --config.init_from=official:lincir_large.pt
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "dtype": "bfloat16",
    "composer.dropout": 0.5,
    "stage.smp.data.dataset": "",
    "stage.smp.data.tables.captions": 0.0,
    "stage.smp.data.tables.texts": 1.0,
    "stage.smp.data.keywords": "spacy",
    "stage.smp.batch_size": 512,
    "stage.smp.duration": "20k steps",
    "stage.smp.optimizer.learning_rate": 1e-4,
    "stage.smp.optimizer.schedule": "constant",
    "stage.smp.optimizer.warmup": "0 steps",
    "stage.smp.optimizer.weight_decay": 0.01,
    "stage.smp.optimizer.decay": ".*",
    "checkpoint.every": "1k steps",
}
PRESETS = {
    "shapes": {},
    "smoke": {
        "stage.smp.data.dataset": "shapes_tiny",
        "stage.smp.batch_size": 32,
        "stage.smp.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **RELEASED},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **RELEASED},
    "vit_h14": {"backbone": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **RELEASED},
    "vit_g14": {"backbone": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", **RELEASED},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment(
        "lincir",
        {
            "name": "lincir",
            "image_weight": 0.0,
            "dropout": 0.3,
            "noise": 1.0,
            "l2_normalize": False,
        },
    )
    config.stages = ("smp",)
    config.stage.smp = base.stage(
        tables={"captions": 1.0, "texts": 0.0},
        example="masked_captions",
        batch_size=128,
        duration="700 steps",
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": "50 steps"},
    )
    # "spacy", or a dictionary of parts of speech where the vocabulary is closed
    config.stage.smp.data.keywords = "data/shapes/parts_of_speech.json"
    return base.apply(config, PRESETS, preset)
