"""Sizes of published backbones, which a program can be compiled of without their files.

As their files say them; tests hold them to these (`tests/weights/published.py`). Words are those of
the embedded world: programs depend on how many there can be and on the length of a text, no more.
"""

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp

from cir_jax.input import images
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.blip import Blip, BlipConfig
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import positions, t5
from cir_jax.weights.backbones import load_architecture, pair, with_t5
from cir_jax.weights.blip import CONTEXT_LENGTH

WORDS = {"clip": "data/shapes/clip", "blip": "data/shapes/blip"}
"""Family -> backbone of the embedded world."""


def _text(width: int, layers: int = 12, act: str = "quick_gelu") -> TextConfig:
    return TextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
    )


def _vision(
    width: int, layers: int, heads: int, patch: int, hidden: int = 0, act: str = "quick_gelu"
) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        intermediate_size=hidden or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        hidden_act=act,
    )


SIZES: dict[str, ClipConfig | BlipConfig | T5Config] = {
    "openai/clip-vit-base-patch32": ClipConfig(_text(512), _vision(768, 12, 12, 32), 512),
    "openai/clip-vit-base-patch16": ClipConfig(_text(512), _vision(768, 12, 12, 16), 512),
    "openai/clip-vit-large-patch14": ClipConfig(_text(768), _vision(1024, 24, 16, 14), 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ClipConfig(
        _text(1024, 24, "gelu"), _vision(1280, 32, 16, 14, act="gelu"), 1024
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ClipConfig(
        _text(1280, 32, "gelu"), _vision(1664, 48, 16, 14, 8192, "gelu"), 1280
    ),
    "timm/resnet50_clip.openai": ClipConfig(_text(512), ResNetConfig(), 1024),
    "timm/resnet50x4_clip.openai": ClipConfig(
        _text(640), ResNetConfig((4, 6, 10, 6), 80, 40, 288), 640
    ),
    "model_base.pth": BlipConfig.published("base"),
    "model_large.pth": BlipConfig.published("large"),
    "google/t5-v1_1-xl": T5Config(
        d_model=2048,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        dense_act_fn="gelu_new",
        is_gated_act=True,
    ),
}
"""Name in the experiments' presets -> sizes."""


def architecture(name: str, dtype: Any = jnp.float32, image_size: int | None = None) -> Backbone:
    """As `load_architecture`, which it is for names that are not in `SIZES`.

    Raises WeightsError as that does.
    """
    *first, last = name.split("+")
    if first and all(half in SIZES for half in (*first, last)):
        towers = [_single(half, dtype, image_size) for half in first]
        if isinstance(config := SIZES[last], T5Config):
            made = T5Encoder(config, dtype), _words("clip", t5.CONTEXT_LENGTH)
            return with_t5(towers, *made, f"{last}@untrained")
        return pair(*towers, _single(last, dtype, image_size))
    if name in SIZES:
        return _single(name, dtype, image_size)
    return load_architecture(name, dtype, image_size=image_size)


def _single(name: str, dtype: Any, image_size: int | None) -> Backbone:
    config = SIZES[name]
    blip = isinstance(config, BlipConfig)
    length = config.text.max_position_embeddings
    tokenizer = _words("blip" if blip else "clip", CONTEXT_LENGTH if blip else length)
    if blip:
        ids = {"sep_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        make, transform = Blip, images.blip
    else:
        ids = {f"{end}_token_id": getattr(tokenizer, f"{end}_id") for end in ("bos", "eos", "pad")}
        make, transform = Clip, images.clip
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **ids))
    made = Backbone(
        make(config, dtype), tokenizer, transform(config.vision.image_size), f"{name}@untrained"
    )
    return positions.for_images(made, image_size) if image_size else made


def _words(family: str, context_length: int) -> Tokenizer:
    tokenizer = copy.copy(load_architecture(WORDS[family]).tokenizer)
    tokenizer.context_length = context_length
    return tokenizer
