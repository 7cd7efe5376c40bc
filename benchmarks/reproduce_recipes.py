"""How the rows of the papers' tables are computed here, and where to get what that takes.

The numbers are in `cir_jax.evaluation.published`; `recipe` says what a row of it is in our terms.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cir_jax.evaluation.published import Row

PAPERS = ("searle", "slerp", "rtd", "isa", "compodiff")

PRESETS = {"clip_b32": "vit_b32", "clip_l14": "vit_l14", "clip_bigg": "vit_g14"}
"""Backbone -> what the presets of most experiments call it."""

BACKBONES = {
    "clip_b32": "openai/clip-vit-base-patch32",
    "clip_l14": "openai/clip-vit-large-patch14",
    "clip_bigg": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "clip_rn50": "timm/resnet50_clip.openai",
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
BLIP = "github.com/salesforce/BLIP, README; vocab.txt of google-bert/bert-base-uncased beside it"
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
    ("tat", "no anchor"): {"composer.tuned": "both"},
    ("tat", "image anchor"): {"composer.tuned": "text"},
}
"""Experiment and what an ablation changes -> the fields that do it; others are other corpora."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run of `launch/eval.py`.

    config: experiment and preset. changes: fields of it that are other than there.
    official: files of the method's own weights, together. beside: field -> another file it reads.
    trained: the method has to be trained here, by this config, and is in a workdir of its own.
    made: experiment and preset that exports the backbone, where nobody has released it; made_with:
        fields of it that are other than there.
    corpus: what the one that is trained is trained on, if it is not the paper's usual one.
    """

    config: str
    changes: tuple[tuple[str, Any], ...] = ()
    official: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    trained: bool = False
    made: str = ""
    made_with: tuple[tuple[str, Any], ...] = ()
    corpus: str = ""

    @property
    def maker(self) -> "Recipe":
        """What exports the backbone."""
        return Recipe(self.made, self.made_with, corpus=self.corpus)

    @property
    def method(self) -> str:
        """The experiment without its preset."""
        return self.config.partition(":")[0]

    @property
    def slug(self) -> str:
        """A folder for it; equal recipes share one."""
        parts = [self.config, *(str(value) for _, value in self.changes), self.corpus]
        parts = [part for part in parts if part]
        return "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def recipe(row: Row) -> Recipe:
    """How a row is computed. Raises KeyError for one of another paper."""
    if row.paper not in PAPERS:
        raise KeyError(row.paper)
    base, _, more = (part.strip() for part in row.backbone.partition(","))
    base, _, tuned = base.partition("+")
    base, _, supervised = base.partition(" ")
    changes: dict[str, Any] = {}
    if row.method == "slerp" and row.benchmark == "cirr":
        changes["composer.alpha"] = 0.9
    if row.method in ("image_only", "text_only", "image_text", "slerp"):
        changes["backbone"] = BACKBONES[base]
        if more == "tuned on COCO":
            changes["backbone"] = "model_large_retrieval_coco.pth"
        if row.paper == "searle":
            changes["preprocessing"] = "targetpad"
        if tuned == "tat":
            made = f"tat:{'blip_l' if base == 'blip_l' else PRESETS[base]}"
            changed = VARIANTS.get(("tat", row.variant), {})
            name = f"{made} {row.variant}".strip().lower()
            changes["backbone"] = "".join(c if c.isalnum() or c == "_" else "-" for c in name)
            return Recipe(
                f"{row.method}:vit_b32",
                _items(changes),
                made=made,
                made_with=_items(changed),
                corpus="" if changed else row.variant,
            )
        return Recipe(f"{row.method}:vit_b32", _items(changes))
    changes |= VARIANTS.get((row.method, row.variant), {})
    corpus = f"the train split of {row.variant[3:]}" if row.variant.startswith("on ") else ""
    if row.method == "searle_oti":
        return Recipe(
            f"searle_oti:{PRESETS[base]}", _items(changes), beside=(("composer.phrases", PHRASES),)
        )
    if row.method == "isa":
        return Recipe(f"isa:{ISA_ENCODERS[more]}", trained=True)
    if row.method == "compodiff":
        preset = {"clip_rn50": "rn50"}.get(base) or PRESETS[base]
        preset += "_clip_t5" if more == "T5-XL" else ""
        if "stage 1," in row.source:
            changes["stages"] = ("stage1",)
        return Recipe(f"compodiff:{preset}", _items(changes), trained=True)
    if row.method == "artemis":
        return Recipe("artemis:clip_rn50", trained=True)
    if row.method == "combiner":
        if supervised:  # on the training triplets of the benchmark itself
            changes["stage.fuse.data.dataset"] = f"{row.benchmark}_train"
        return Recipe(f"combiner:{PRESETS.get(base, 'rn50')}", _items(changes), trained=True)
    if base == "blip_b":
        changes["backbone"] = BACKBONES[base]
    preset = PRESETS.get(base, "vit_b32")
    if tuned == "rtd":
        return Recipe(f"rtd:{row.method}_{preset}", _items(changes), trained=True)
    released = "" if row.variant else RELEASED.get((row.method, base))
    official = (released,) if released else ()
    return Recipe(
        f"{row.method}:{preset}",
        _items(changes),
        official=official,
        trained=not official,
        corpus=corpus,
    )


def begins_with(made: Recipe) -> str:
    """What RTD's training begins with: released weights, or the config of a run of ours; "" = the
    method is not RTD."""
    name, _, preset = made.config.partition(":")
    if name != "rtd":
        return ""
    inside, _, size = preset.partition("_")
    backbone = {size: base for base, size in PRESETS.items()}[size]
    return RELEASED.get((inside, backbone)) or f"{inside}:{size}"


def _items(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(changes.items())


def known_reason(row: Row) -> str:
    """What is known of a difference from the paper's number, "" = nothing."""
    if row.variant:
        return ""
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
    if "," in row.source:
        return f"the paper's row is marked: {row.source.partition(',')[2].strip()}"
    return ""
