"""TAT: LoRA moves the image encoder towards the text encoder, for Slerp (arXiv 2405.00571).

    python launch/main.py --config=experiments/tat.py

Takes 1 to 2 minutes on two CPU cores. On the embedded world (three seeds) it does not gain:
CIRCO-like mAP@10 22.3 +- 2.8, where Slerp has 22.4 +- 2.8. One reason may be that this world's CLIP
was pretrained on captions of the same kind.

The tuned backbone is for other methods, too: the presets `tat` of experiments/slerp.py and
combiner.py look for it where this writes it, any other method takes it with --config.backbone=DIR:

    python launch/main.py --config=experiments/tat.py --config.export_to=runs/tat/shapes/backbone
    python launch/eval.py --config=experiments/slerp.py:tat
    python launch/main.py --config=experiments/combiner.py:tat

Presets: shapes (embedded world), smoke (seconds, for tests), and the paper's recipe on vit_b32,
vit_l14 and blip_l (BLIP's own file, model_large.pth): one epoch over two million pairs (LAION's, as
BLIP captioned them) in a prepared dataset (`launch/prepare.py --dataset=pairs`), named with
--config.stage.anchor.data.dataset, batch 1024. Ablations: --config.composer.tuned=text (images are
the anchor) and both (no anchor), other pairs. The paper on CIRCO, L/14: mAP@10 19.41, where Slerp
has 9.84; with images as the anchor mAP@5 7.54, without one 8.26.
"""

from ml_collections import ConfigDict

from experiments import base

RELEASED = {
    "stage.anchor.data.dataset": "",
    "stage.anchor.batch_size": 1024,
    "stage.anchor.duration": "1 epochs",
    "checkpoint.every": "200 steps",
}
PRESETS = {
    "shapes": {},
    "smoke": {
        "stage.anchor.data.dataset": "shapes_tiny",
        "stage.anchor.batch_size": 32,
        "stage.anchor.duration": "8 steps",
        "evaluation.benchmarks": base.benchmarks("shapes_tiny"),
        "log_every": 2,
        "checkpoint.every": "4 steps",
    },
    "vit_b32": {"backbone": "openai/clip-vit-base-patch32", **RELEASED},
    "vit_l14": {"backbone": "openai/clip-vit-large-patch14", **RELEASED},
    "blip_l": {"backbone": "model_large.pth", **RELEASED},
}


def get_config(preset: str = "shapes") -> ConfigDict:
    composer = {
        "name": "tat",
        "alpha": 0.8,
        "tuned": "image",  # image | text | both
        "rank": 16,
        "lora_alpha": 16.0,
        "dropout": 0.1,
        "scale": 1 / 0.07,
    }
    config = base.experiment("tat", composer)
    config.stages = ("anchor",)
    config.stage.anchor = base.stage(
        tables={"captions": 1.0},
        batch_size=128,
        duration="1 epochs",
        optimizer={"learning_rate": 1e-4, "decay": ".*"},
    )
    return base.apply(config, PRESETS, preset)
