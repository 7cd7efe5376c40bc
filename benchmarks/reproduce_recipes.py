"""How the rows of the papers' tables are computed here, and where to get what that takes.

The numbers are in `cir_jax.evaluation.published`; `recipe` says what a row of it is in our terms.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cir_jax.evaluation.published import Row
from experiments import compodiff

PAPERS = ("searle", "slerp", "rtd", "isa", "compodiff")

PRESETS = {"clip_b32": "vit_b32", "clip_l14": "vit_l14", "clip_bigg": "vit_g14"}
"""Backbone -> what the presets of most experiments call it."""

BACKBONES = {
    "clip_b32": "openai/clip-vit-base-patch32",
    "clip_l14": "openai/clip-vit-large-patch14",
    "clip_bigg": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "clip_rn50": "timm/resnet50_clip.openai",
    "clip_rn50x4": "timm/resnet50x4_clip.openai",
    "blip_b": "model_base.pth",
    "blip_l": "model_large.pth",
}

ISA_ENCODERS = {
    "EfficientNet-B2": "paper",
    "EfficientNet-B0": "efficientnet_b0",
    "EfficientViT-M2": "efficientvit_m2",
    "MobileNetV2": "mobilenetv2",
    "MobileViTV2": "mobilevitv2",
    "symmetric": "paper_symmetric",
}

RELEASED = {
    ("searle", "clip_b32"): "SEARLE_ViT-B32.pt",
    ("searle", "clip_l14"): "SEARLE_ViT-L14.pt",
    ("lincir", "clip_l14"): "lincir_large.pt",
    ("pic2word", "clip_l14"): "pic2word_large.pt",
}
"""Method and backbone -> the file with its authors' weights."""

PHRASES = "concept_to_phrases.pkl"
EDITOR = "timbrooks/instruct-pix2pix"
BLIP = "github.com/salesforce/BLIP, README; vocab.txt of google-bert/bert-base-uncased beside it"
GLOVE = (
    "made by cir_jax.weights.artemis.begin of torchvision's ResNet-50, the captions of training "
    "and GloVe's vectors"
)
MODELS = "huggingface.co/navervision/zeroshot-cir-models"

ORIGINS = {
    "SEARLE_ViT-B32.pt": "github.com/miccunifi/SEARLE, release `weights`",
    "SEARLE_ViT-L14.pt": "github.com/miccunifi/SEARLE, release `weights`",
    PHRASES: "github.com/miccunifi/SEARLE; or made by launch/phrases.py",
    "lincir_large.pt": MODELS,
    "pic2word_large.pt": MODELS,
    "model_base.pth": BLIP,
    "model_large.pth": BLIP,
    "model_large_retrieval_coco.pth": BLIP,
    "resnet50_glove_fashioniq_train": GLOVE,
    "resnet50_glove_cirr_train": GLOVE,
}
"""Name of a file -> where its authors have it. Other names are hub ids, or made here (`Made`)."""

CORPORA = {
    "searle": "images (the paper: ImageNet test)",
    "pic2word": "images (the paper: CC3M)",
    "lincir": "texts",
    "palavra": "captioned images (COCO)",
    "rtd": "text triplets",
    "tat": "pairs (LAION 2M, as BLIP captioned them)",
    "isa": "images",
    "combiner": "image triplets",
    "clip4cir": "image triplets",
    "artemis": "image triplets",
    "compodiff": "image triplets and pairs (SynthTriplets18M, LAION)",
}
"""Method -> what the paper trains it on; `data/*/README.md` say how to get or make it."""


def _images_of(dataset: str) -> dict[str, Any]:
    """SEARLE's stages on the training images of a benchmark."""
    own = {"dataset": dataset, "split": "train", "tables.images": 0.0, "tables.gallery": 1.0}
    stages = ("oti", "distil")
    return {f"stage.{stage}.data.{name}": x for stage in stages for name, x in own.items()}


VARIANTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("searle_oti", "L2 loss"): {"composer.image_loss": "l2"},
    ("searle_oti", "concept alone"): {"composer.regulariser": "concept"},
    ("searle_oti", "random concepts"): {"composer.regulariser": "random"},
    ("searle_oti", "no regulariser"): {"composer.regulariser": "none"},
    ("searle", "cosine distillation"): {"stage.distil.composer.distillation": "cosine"},
    ("searle", "no distillation"): {"stage.distil.composer.distillation": "none"},
    ("searle", "no regulariser"): {"stage.distil.composer.weight_gpt": 0.0},
    ("searle", "on FashionIQ"): _images_of("fashioniq"),
    ("searle", "on CIRR"): _images_of("cirr"),
    ("combiner", "on FashionIQ"): {"stage.fuse.data.dataset": "fashioniq_train"},
    ("combiner", "on CIRR"): {"stage.fuse.data.dataset": "cirr_train"},
    ("tat", "no anchor"): {"composer.tuned": "both"},
    ("tat", "image anchor"): {"composer.tuned": "text"},
    ("rtd", "noise 0.1"): {"composer.noise": 0.1},
    ("rtd", "noise 0.5"): {},  # the paper's own; its main tables print others in two places
    ("rtd", "noise 1"): {"composer.noise": 1.0},
    ("rtd", "Gaussian noise"): {"composer.noise_type": "gaussian", "composer.noise": 1.0},
    ("rtd", "uniform noise"): {"composer.noise_type": "uniform", "composer.noise": 1.0},
    **{
        ("rtd", layers): {"composer.tuned": layers}
        for layers in ("fcs", "front", "middle", "last", "interleaved")
    },
    ("isa", "MLP"): {"composer.mapping": "mlp"},
    ("isa", "no attention"): {
        "composer.self_attention": False,
        "composer.cross_attention": False,
    },
    ("isa", "no self-attention"): {"composer.self_attention": False},
    ("isa", "no cross-attention"): {"composer.cross_attention": False},
    ("isa", "random start"): {"composer.pretrained": False},
    ("isa", "tuned tower"): {"composer.train_tower": True},
    ("isa", "GCD alone"): {"composer.local_weight": 0.0},
    ("isa", "LAR alone"): {"composer.global_weight": 0.0},
    ("isa", "GCD + LLM TR"): {  # its weight is not printed
        "composer.local_weight": 0.0,
        "composer.phrase_weight": 1.0,
        "composer.top_k": 15,
    },
    ("compodiff", "T5-XL alone"): {"backbone": compodiff.PRESETS["vit_l14_t5"]["backbone"]},
    ("compodiff", "text as tokens"): {"composer.conditioning": "tokens"},
    ("compodiff", "triplets alone"): {
        "stage.stage2.data.tables.captions": 0.0,
        "stage.stage2.data.tables.masked": 0.0,
        "stage.stage2.data.tables.triplets": 1.0,
    },
}
"""Experiment and what an ablation changes -> the fields that do it in training."""

SAMPLING: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("compodiff", f"{steps} step{'s' * (steps > 1)}"): {"composer.steps": steps}
    for steps in (1, 2, 3, 4, 5, 50, 100)
}
"""The same of what is asked of one training run in evaluation."""

TRAINED_ON = {"fashioniq": "FashionIQ", "cirr": "CIRR"}
"""Benchmark that has a split to train on -> its name."""

_SYNTH = {
    "InstructPix2Pix's triplets": "InstructPix2Pix's 1M triplets",
    **{
        f"{size} triplets": f"{size} of SynthTriplets18M's triplets" for size in ("1M", "5M", "10M")
    },
}
OTHER_CORPORA: Mapping[tuple[str, str], str] = {
    ("tat", "LLaVA-Align"): "LLaVA-Align (0.58M pairs)",
    ("tat", "CC3M"): "CC3M (2.3M pairs)",
    ("tat", "LAION 4M"): "LAION 4M",
    ("tat", "LAION 8M"): "LAION 8M",
    ("pic2word", "LAION 2M"): "the images of LAION 2M",
    **{
        (method, f"on {name}"): f"the train split of {name}"
        for method in ("searle", "combiner")
        for name in TRAINED_ON.values()
    },
    ("rtd", "templates"): "text triplets made by templates (launch/triplets.py)",
    **{
        (method, variant): corpus
        for method in ("artemis", "combiner", "compodiff")
        for variant, corpus in _SYNTH.items()
    },
}
"""Experiment and an ablation -> what it is trained on instead."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run of `launch/eval.py`.

    config: experiment and preset. changes: fields of it that are other than there.
    official: files of the method's own weights, together. beside: field -> another file it reads.
    trained: the method has to be trained here, by this config, and is in a workdir of its own.
    begins: what that training continues: released weights, or the config of another run of ours.
    made: experiment and preset that exports the backbone, where nobody has released it; made_with:
        fields of it that are other than there.
    corpus: what the one that is trained is trained on, if it is not the paper's usual one.
    asked: fields of an evaluation of a training run that others share.
    """

    config: str
    changes: tuple[tuple[str, Any], ...] = ()
    official: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    trained: bool = False
    begins: str = ""
    made: str = ""
    made_with: tuple[tuple[str, Any], ...] = ()
    corpus: str = ""
    asked: tuple[tuple[str, Any], ...] = ()

    @property
    def maker(self) -> "Recipe":
        """What exports the backbone."""
        return Recipe(self.made, self.made_with, corpus=self.corpus)

    @property
    def training(self) -> "Recipe":
        """What is trained: the same for all evaluations of it."""
        return dataclasses.replace(self, asked=())

    @property
    def slug(self) -> str:
        """A folder for it; equal recipes share one."""
        fields = (*self.changes, *self.asked)
        parts = [self.config, *(f"{name.rpartition('.')[2]} {x}" for name, x in fields)]
        parts += [self.corpus] * bool(self.corpus and not self.made)
        return "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def recipe(row: Row) -> Recipe:
    """How a row is computed. Raises KeyError for one of another paper, or an unknown variant."""
    if row.paper not in PAPERS:
        raise KeyError(row.paper)
    base, _, more = (part.strip() for part in row.backbone.partition(","))
    base, _, supervised = base.partition(" ")
    base, _, tuned = base.partition("+")
    if row.method in ("image_only", "text_only", "image_text", "slerp"):
        return _training_free(row, base, tuned, more)
    if row.method == "instruct_pix2pix":
        return Recipe("instruct_pix2pix:vit_l14", beside=(("composer.model", EDITOR),))
    if row.method in ("combiner", "artemis", "compodiff"):
        return _of_triplets(row, base, tuned or supervised, more)
    if row.method == "searle_oti":
        changes = _changes("searle_oti", row.variant)
        preset = f"searle_oti:{PRESETS[base]}"
        return Recipe(preset, changes, beside=(("composer.phrases", PHRASES),))
    if row.method == "isa":
        beside = (("composer.phrases", PHRASES),) if row.variant == "GCD + LLM TR" else ()
        changes = _changes("isa", row.variant)
        return Recipe(f"isa:{ISA_ENCODERS[more]}", changes, beside=beside, trained=True)
    experiment = tuned or row.method
    changes = _changes(experiment, row.variant)
    if base == "blip_b":
        changes += (("backbone", BACKBONES[base]),)
    preset = PRESETS.get(base, "vit_b32")
    corpus = OTHER_CORPORA.get((experiment, row.variant), "")
    released = RELEASED.get((row.method, base), "")
    if tuned == "rtd":
        begins = released or f"{row.method}:{preset}"
        config = f"rtd:{row.method}_{preset}"
        return Recipe(config, changes, trained=True, begins=begins, corpus=corpus)
    config = f"{row.method}:{preset}"
    if released and not row.variant:
        return Recipe(config, changes, official=(released,))
    return Recipe(config, changes, trained=True, corpus=corpus)


def _training_free(row: Row, base: str, tuned: str, more: str) -> Recipe:
    changes: dict[str, Any] = {"backbone": BACKBONES[base]}
    if row.method == "slerp" and row.benchmark == "cirr":
        changes["composer.alpha"] = 0.9
    if more == "tuned on COCO":
        changes["backbone"] = "model_large_retrieval_coco.pth"
    if row.paper == "searle":
        changes["preprocessing"] = "targetpad"
    made = _tat(base, row.variant) if tuned == "tat" else {}
    if made:
        changes["backbone"] = made.pop("backbone")
    return Recipe(f"{row.method}:vit_b32", _items(changes), **made)


def _tat(base: str, variant: str = "") -> dict[str, Any]:
    """The backbone that TAT tunes: its name, and the fields of a recipe that say how it is made."""
    made = f"tat:{PRESETS.get(base, base)}"
    name = f"{made} {variant}".strip().lower()
    return {
        "backbone": "".join(c if c.isalnum() or c == "_" else "-" for c in name),
        "made": made,
        "made_with": _changes("tat", variant),
        "corpus": OTHER_CORPORA.get(("tat", variant), ""),
    }


def _of_triplets(row: Row, base: str, how: str, more: str) -> Recipe:
    """A method that is trained on image triplets: SynthTriplets18M, or (how: "supervised", or the
    method that tunes the backbone before; variant "fine-tuned") those of the benchmark itself."""
    benchmark = row.benchmark.partition(":")[0]
    own, tuned = f"{benchmark}_train", row.variant == "fine-tuned"
    preset = PRESETS.get(base) or base.removeprefix("clip_")
    if row.method == "compodiff" and more == "T5-XL":
        preset += "_clip_t5"
    elif row.method == "artemis":
        preset = "clip_rn50"
    config, begins = f"{row.method}:{preset}", ""
    stages: tuple[str, ...] = {"combiner": ("fuse",), "artemis": ("match",)}.get(row.method, ())
    changes = {} if tuned else dict(_changes(row.method, row.variant))
    asked = dict(SAMPLING.get((row.method, row.variant), {}))
    made: dict[str, Any] = {}
    if tuned:
        begins = config
        if row.method == "compodiff":
            changes["backbone"] = compodiff.PRESETS[preset]["backbone"]
            config = f"compodiff:{benchmark}"
    if how == "tat":
        made = _tat(base)
    elif how == "clip4cir":
        made = {
            "backbone": f"clip4cir-{preset}-{own}",
            "made": f"clip4cir:{preset}",
            "made_with": (("stage.tune.data.dataset", own),),
            "corpus": f"the train split of {TRAINED_ON[benchmark]}",
        }
    elif more == "GloVe supervised":
        config, stages, how = f"artemis:{benchmark}", ("match", "finetune"), "supervised"
        changes["backbone"] = f"resnet50_glove_{own}"
    if made:
        changes["backbone"] = made.pop("backbone")
    corpus = OTHER_CORPORA.get((row.method, row.variant), "")
    if (how or tuned) and not corpus:
        changes |= {f"stage.{stage}.data.dataset": own for stage in stages}
        corpus = f"the train split of {TRAINED_ON[benchmark]}"
    if row.note.startswith("stage 1,"):
        (changes if row.variant else asked)["stages"] = ("stage1",)
    fields = {"corpus": corpus, **made}
    return Recipe(
        config, _items(changes), trained=True, begins=begins, asked=_items(asked), **fields
    )


def _changes(experiment: str, variant: str) -> tuple[tuple[str, Any], ...]:
    """Raises KeyError for a variant that is nowhere."""
    key = experiment, variant
    if key not in VARIANTS and (not variant or key in OTHER_CORPORA or key in SAMPLING):
        return ()
    return _items(VARIANTS[key])


def _items(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(changes.items())


def known_reason(row: Row) -> str:
    """What is known of a difference from the paper's number, "" = nothing."""
    if row.variant:
        return ""
    if row.quoted:
        return f"the number is {row.note}"
    if row.paper == "searle" and row.method == "searle" and row.backbone == "clip_l14":
        return (
            "the released weights are not those of the paper's first version: they give CIRCO test "
            "11.68 12.73 14.33 15.12, FashionIQ 25.56 46.23 (compodiff, slerp)"
        )
    if "unstated" in row.source and row.method != "image_only":
        return "the paper does not say how it joins captions, or what it samples with"
    if row.method in ("image_only", "text_only", "image_text") and row.paper in ("slerp", "isa"):
        return "the paper does not state its preprocessing and prompts, and released no evaluation"
    if row.method == "slerp":
        return "no evaluation was released: preprocessing is that of the weights, text the caption"
    if row.note:
        return f"the paper's row is marked: {row.note}"
    return ""
