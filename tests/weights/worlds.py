"""Small models in each of the formats people have, for the tests of loading."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from cir_jax.input import images
from cir_jax.input.text import Tokenizer, clip_bpe, wordpiece
from cir_jax.models.backbone import Backbone
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import Blip, BlipConfig, BlipVisionConfig
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights import blip, convert, open_clip

MERGES = [("a", "t</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>")]
VOCABULARY = 512 + len(MERGES) + 2
TEXTS = ["a red cat", "$ that is red"]


def make(
    kind: str = "vit", act: str = "quick_gelu", seed: int = 0, text_width: int = 64
) -> tuple[Backbone, Any]:
    """A random CLIP whose heads are 64 wide, as OpenAI's are: (backbone, params)."""
    shared = {"num_hidden_layers": 1, "hidden_act": act}
    text = TextConfig(
        hidden_size=text_width,
        num_attention_heads=text_width // 64,
        intermediate_size=4 * text_width,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=open_clip.ARGMAX,
        pad_token_id=0,
        **shared,
    )
    if kind == "vit":
        vision: Any = VisionConfig(
            hidden_size=128,
            num_attention_heads=2,
            intermediate_size=512,
            image_size=16,
            patch_size=8,
            **shared,
        )
    else:
        # heads: width * 32 / 64
        vision = ResNetConfig(layers=(1, 1, 1, 1), width=4, num_attention_heads=2, image_size=32)
    # as a config file says it: OpenCLIP's have no initial temperature
    config = ClipConfig(text, vision, 24)
    tokenizer = Tokenizer(
        clip_bpe(MERGES),
        context_length=16,
        bos_id=VOCABULARY - 2,
        eos_id=VOCABULARY - 1,
        pad_id=0,
    )
    backbone = Backbone(Clip(config), tokenizer, images.clip(vision.image_size), "tiny@0")
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    # positive, because variances are among them
    params = jax.tree.map(lambda x: np.float32(rng.uniform(0.01, 0.1, x.shape)), shapes)
    return backbone, params


# [PAD], [CLS] and [SEP] have the ids of bert-base-uncased, which BLIP's files count on
WORDPIECES = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDPIECES += "$ * , . a photo of that is red blue cat star ##s make it and has two".split()


def make_blip(folder: Path, seed: int = 0, image_size: int = 32) -> tuple[Backbone, Any]:
    """A random BLIP whose heads are 64 wide, as the published are: (backbone, params).

    folder: where its vocab.txt is written.
    """
    (folder / "vocab.txt").write_text("\n".join(WORDPIECES) + "\n")
    shared = {"intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = BlipVisionConfig(
        hidden_size=64, layer_norm_eps=1e-6, image_size=image_size, patch_size=16, **shared
    )
    text = BertConfig(
        hidden_size=64,
        vocab_size=len(WORDPIECES) + 2,  # [DEC], [ENC]
        encoder_hidden_size=64,
        max_position_embeddings=48,
        bos_token_id=len(WORDPIECES),
        **shared,
    )
    model = Blip(BlipConfig(text, vision, projection_dim=16))
    tokenizer = Tokenizer(
        wordpiece(folder / "vocab.txt"),
        context_length=blip.CONTEXT_LENGTH,
        bos_id=101,
        eos_id=102,
        pad_id=0,
        cleaned=False,
    )
    rng = np.random.default_rng(seed)
    shapes = convert.joint_shapes(model)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)
    return Backbone(model, tokenizer, images.blip(image_size), "blip@0"), params


def openai_tensors(backbone: Backbone, params: Any) -> dict[str, np.ndarray]:
    """Under OpenAI's and OpenCLIP's names."""
    return convert.to_source(params, open_clip.names(backbone.config))


def write_merges(path: Path) -> None:
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n")


def write_open_clip(path: Path, backbone: Backbone, params: Any) -> Path:
    """A directory as on the hub: another library's config.json lies there too."""
    path.mkdir()
    save_file(openai_tensors(backbone, params), path / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.to_open_clip(backbone.config), "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text('{"architecture": "vit_tiny", "num_classes": 0}')
    write_merges(path)
    return path


def features(backbone: Backbone, params: Any) -> list[np.ndarray]:
    """Image and text features of fixed inputs."""
    size = backbone.config.vision.image_size
    pixels = np.random.default_rng(1).integers(0, 255, (2, size, size, 3), np.uint8)
    ids = backbone.tokenizer(TEXTS)
    return encode(backbone, params, pixels, ids)


def encode(backbone: Backbone, params: Any, pixels: Any, ids: Any) -> list[np.ndarray]:
    """Image and text features. Compiled once and run once: compiling is what takes time."""
    both = jax.jit(
        lambda p, x, i: (backbone.encode_image(p, x), backbone.encode_text(p, i)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return [np.asarray(one) for one in both(params, pixels, ids)]
