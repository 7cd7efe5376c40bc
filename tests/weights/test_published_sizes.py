"""Sizes of published backbones are those of their files."""

import dataclasses
import importlib
import pkgutil

import jax
import pytest

import experiments
from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models.backbone import Pair
from cir_jax.models.clip import ClipConfig
from cir_jax.weights import open_clip
from cir_jax.weights import published as sizes
from tests.weights import published
from tests.weights.test_published_open_clip import SAME

L14 = "openai/clip-vit-large-patch14"
OPEN_CLIP = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": "ViT-bigG-14",
    "timm/resnet50_clip.openai": "RN50-quickgelu",
    "timm/resnet50x4_clip.openai": "RN50x4-quickgelu",
}


def without_tokens(config):
    """No ids, which the words of a tokenizer decide, and no start of the temperature."""
    ids = {f"{end}_token_id": 0 for end in ("bos", "eos", "pad")}
    text = dataclasses.replace(config.text, **ids)
    return dataclasses.replace(config, text=text, logit_scale_init_value=0.0)


CLIPS = [name for name, config in sizes.SIZES.items() if isinstance(config, ClipConfig)]
"""The others are `BlipConfig.published`, which loads salesforce's files."""


@pytest.mark.parametrize("name", CLIPS)
def test_sizes_are_those_of_the_files(name):
    if name.startswith("openai/"):
        files = published.CLIP[name.replace("/", "__")]
        file = next(files[file] for file in files if file.startswith("config."))
        theirs = ClipConfig.from_dict(file)
    else:
        theirs = open_clip.from_open_clip(SAME[OPEN_CLIP[name]])
    assert without_tokens(sizes.SIZES[name]) == without_tokens(theirs)


def test_backbones_of_presets_that_train_are_known():
    """So that they can be compiled without files."""
    missing = set()
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name != "base":
            experiment = importlib.import_module(f"experiments.{module.name}")
            configs = map(experiment.get_config, experiment.PRESETS)
            for name in {c.backbone for c in configs if c.stages}:
                halves = [
                    half for half in name.split("+") if not half.startswith(("data/", "runs/"))
                ]
                halves = [half for half in halves if not half.startswith(("data/", "runs/"))]
                missing |= {(module.name, half) for half in halves if half not in sizes.SIZES}
    assert missing == {("artemis", "")}  # its release's own, of the user's files


def test_an_architecture_without_files():
    backbone = sizes.architecture(L14)
    assert (backbone.dim, backbone.context_length) == (768, 77)
    assert backbone.tokenizer(["a red circle"], 77).shape == (1, 77)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    assert shapes["vision"]["position_embedding"].shape == (257, 1024)
    assert sizes.architecture(L14, image_size=336).config.vision.image_size == 336
    blip = sizes.architecture("model_base.pth")
    assert blip.family == "blip" and blip.context_length == 35


def test_pairs_and_names_that_are_on_disk():
    pair = sizes.architecture(f"{L14}+laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")
    assert isinstance(pair, Pair) and (pair.dim, pair.token_dim) == (768, 1280)
    texts = sizes.architecture(f"{L14}+{L14}+google/t5-v1_1-xl")
    assert texts.text_widths == (768, 2048) and texts.context_length == 2 * 77
    shapes = jax.eval_shape(texts.init, jax.random.key(0))["t5"]
    # words, positions and a norm, and of each layer 4 + 3 matrices and 2 norms
    layer = 4 * 2048**2 + 3 * 2048 * 5120 + 2 * 2048
    expected = 32128 * 2048 + 32 * 32 + 2048 + 24 * layer
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    world = "data/shapes/clip"
    assert sizes.architecture(world).config == weights.load_architecture(world).config
    with pytest.raises(WeightsError, match="'nowhere': no such directory"):
        sizes.architecture("nowhere")
