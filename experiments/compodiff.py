"""CompoDiff: latent diffusion from text, then from text and reference image (arXiv 2303.11916).

    python launch/main.py --config=experiments/compodiff.py

Takes about 6 minutes on two CPU cores. Expected on the embedded world (three seeds, README):
CIRCO-like mAP@10 19.2 +- 2.8, where image + text has 14.5 +- 1.7 and Slerp 22.4 +- 2.8, with
shapes_long 20.5 +- 2.7. Why it stays behind Slerp there: benchmarks/README.md. The paper, ViT-L/14
on CIRCO: 13.36.

Presets: shapes (embedded world, minutes on a laptop), shapes_long (three times the triplets and the
steps: 15 minutes), smoke (seconds, for tests). Those of the paper's Table A.1 need the weights and
your own corpora, see --config.stage.*.data.dataset: vit_l14, rn50 and vit_g14 (images and texts of
one CLIP), vit_l14_bigg, vit_l14_t5, vit_l14_clip_t5 (texts of others, table 7), prior_like (table
5). fashioniq and cirr fine-tune what was trained so on the training triplets of the benchmark:

    python launch/prepare.py --dataset=image_triplets --source=DIR --name=fashioniq_train
    python launch/main.py --config=experiments/compodiff.py:fashioniq --config.init_from=WORKDIR

The released weights need no training, a directory or hub id of theirs and of both CLIPs is enough:

    python launch/eval.py --config=experiments/compodiff.py:released --benchmarks=circo \\
        --config.init_from=official:navervision/CompoDiff-Aesthetic

Caption retrieval (table 5) of what stage 1 trained:

    python launch/eval.py --config=experiments/compodiff.py:vit_l14 --workdir=WORKDIR \\
        --config.stages=stage1 --benchmarks=coco_captions
"""

from ml_collections import ConfigDict

from experiments import base

L14 = "openai/clip-vit-large-patch14"
BIGG = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"  # ViT-G/14 by OpenCLIP, dim 1280
T5_XL = "google/t5-v1_1-xl"

PAPER = {
    "dtype": "bfloat16",
    "composer.depth": 12,
    "composer.heads": 16,
    "composer.dim_head": 64,
    "composer.cross_heads": 8,
    "composer.guidance": (1.5, 7.5),
    "composer.steps": 10,
    "composer.feature_scale": "none",
    "composer.source_mixing": 0.1,
    # no corpus ships: a prepared dataset with tables `captions`, `masked` and `triplets`
    "stage.stage1.data.dataset": "",
    "stage.stage2.data.dataset": "",
    "stage.stage1.batch_size": 4096,
    "stage.stage2.batch_size": 2048,
    "stage.stage1.duration": "1m steps",
    "stage.stage2.duration": "200k steps",
    "stage.stage1.optimizer.learning_rate": 1e-4,
    "stage.stage2.optimizer.learning_rate": 1e-5,
    "stage.stage1.optimizer.schedule": "constant",
    "stage.stage2.optimizer.schedule": "constant",
    "stage.stage1.ema": 0.9999,
    "stage.stage2.ema": 0.9999,
    "stage.stage1.optimizer.weight_decay": 0.06,
    "stage.stage2.optimizer.weight_decay": 0.06,
    "checkpoint.every": "5k steps",
}
FINETUNED = PAPER | {
    "backbone": L14,
    # `python launch/prepare.py --dataset=image_triplets --source=DIR --name=fashioniq_train`
    "stage.finetune.data.dataset": "fashioniq_train",
    "evaluation.benchmarks": ("fashioniq",),
}
PRESETS = {
    "shapes": {},
    "shapes_long": {
        "stage.stage1.data.dataset": "shapes_long",
        "stage.stage2.data.dataset": "shapes_long",
        "stage.stage2.duration": "5000 steps",
        "stage.stage2.ema": 0.998,
    },
    "smoke": {
        "composer.depth": 1,
        "stage.stage1.data.dataset": "shapes_tiny",
        "stage.stage2.data.dataset": "shapes_tiny",
        "stage.stage1.batch_size": 32,
        "stage.stage2.batch_size": 32,
        "stage.stage1.duration": "8 steps",
        "stage.stage2.duration": "12 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    # image space and text condition, as in the paper's tables; the hidden width is the images'
    "vit_l14": {"backbone": L14, **PAPER},
    "vit_l14_bigg": {"backbone": f"{L14}+{BIGG}", **PAPER},
    "vit_l14_t5": {"backbone": f"{L14}+{T5_XL}", **PAPER},
    "vit_l14_clip_t5": {"backbone": f"{L14}+{L14}+{T5_XL}", **PAPER},
    "rn50": {"backbone": "timm/resnet50_clip.openai", **PAPER},
    "vit_g14": {"backbone": BIGG, **PAPER},
    "prior_like": {"backbone": L14, **PAPER, "composer.conditioning": "tokens"},
    "released": {
        "backbone": f"{L14}+{BIGG}",
        **PAPER,
        "preprocessing": "squash",
        "composer.samples_per_query": 2,
        "composer.mask_fill": "grey",
    },
    "fashioniq": FINETUNED,
    "cirr": FINETUNED
    | {"stage.finetune.data.dataset": "cirr_train", "evaluation.benchmarks": ("cirr",)},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    config = base.experiment(
        "compodiff",
        {
            "name": "compodiff",
            "depth": 4,
            "heads": 4,
            "dim_head": 32,
            "cross_heads": 4,  # the release: 8
            "drop_text": 0.1,
            "drop_image": 0.1,
            "guidance": (2.5, 2.0),  # (image, text); chosen on val, the paper's is (1.5, 7.5)
            "steps": 2,  # chosen on val: retrieval likes the conditional mean
            "samples_per_query": 4,
            "source_mixing": 0.0,
            "noised_reference": 0.0,
            "mask_fill": "noise",
            "conditioning": "cross_attention",
            "padding": "read",
            "feature_scale": "unit_variance",
        },
    )
    optimizer = {"learning_rate": 2e-3, "schedule": "cosine", "warmup": "50 steps", "final": 0.02}
    config.stages = ("stage1", "stage2")
    config.stage.stage1 = base.stage(
        tables={"captions": 1.0},
        with_reference=True,
        features=True,
        batch_size=128,
        duration="250 steps",
        optimizer=optimizer,
        ema=0.98,
    )
    config.stage.stage2 = base.stage(
        tables={"captions": 0.3, "masked": 0.3, "triplets": 0.4},
        features=True,
        batch_size=128,
        duration="1600 steps",
        optimizer=optimizer | {"learning_rate": 1e-3},
        ema=0.995,
        after="stage1",
    )
    if preset in ("fashioniq", "cirr"):
        # of the stages above, or of released weights: --config.init_from=WORKDIR | official:PATH
        config.stages = ("finetune",)
        config.stage.finetune = base.stage(
            tables={"triplets": 1.0},
            features=True,
            batch_size=2048,
            duration="50k steps",
            optimizer={"learning_rate": 1e-5, "schedule": "constant", "weight_decay": 0.06},
            ema=0.9999,
            after="stage2",
        )
    return base.apply(config, PRESETS, preset)
