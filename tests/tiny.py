"""Small things that many tests need: a random CLIP, an in-memory table."""

import io
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from cir_jax.input.images import ImageTransform
from cir_jax.input.text import word_tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import Blip, BlipConfig, BlipVisionConfig
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig

WORDS = "a photo of that is red blue green star circle make it and has no two".split()


def backbone(context_length: int = 16, seed: int = 0) -> tuple[Backbone, Any]:
    """A random CLIP of 16 x 16 images, dim 24, and its parameters (numpy)."""
    tokenizer = word_tokenizer(WORDS, context_length)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = ClipConfig(
        text=TextConfig(
            hidden_size=32,
            intermediate_size=64,
            vocab_size=5 + len(WORDS),
            max_position_embeddings=context_length,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            **shared,
        ),
        vision=VisionConfig(
            hidden_size=48, intermediate_size=96, image_size=16, patch_size=8, **shared
        ),
        projection_dim=24,
    )
    transform = ImageTransform(resize=16, crop=16)
    made = Backbone(Clip(config), tokenizer, transform, weights_id=f"tiny@{seed}")
    return made, jax.device_get(jax.jit(made.init)(jax.random.key(seed)))


def blip(context_length: int = 16, seed: int = 0) -> tuple[Backbone, Any]:
    """A random BLIP of 16 x 16 images, dim 24, and its parameters (numpy)."""
    tokenizer = word_tokenizer(WORDS, context_length, blip=True)
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = BertConfig(
        hidden_size=32,
        vocab_size=tokenizer.vocab_size,
        encoder_hidden_size=48,
        max_position_embeddings=context_length,
        bos_token_id=tokenizer.vocab_size - 2,
        sep_token_id=tokenizer.eos_id,
        **shared,
    )
    vision = BlipVisionConfig(hidden_size=48, image_size=16, patch_size=8, **shared)
    transform = ImageTransform(resize=16, crop=16)
    made = Backbone(
        Blip(BlipConfig(text, vision, 24)), tokenizer, transform, weights_id=f"tiny_blip@{seed}"
    )
    return made, jax.device_get(jax.jit(made.init)(jax.random.key(seed)))


def drawn(init: Callable[[jax.Array], Any], seed: int = 0) -> Any:
    """Parameters of the shapes that `init` makes of a key; nothing is compiled.

    About as large as it makes them; biases are not 0, and scales and variances about 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        deviation = math.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.1
        about = path[-1].key in ("scale", "var")
        return (about + deviation * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def png(rng: np.random.Generator, size: int = 20) -> bytes:
    """An encoded random image."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class MemoryTable:
    """Records in memory with the interface of `cir_jax.input.tables.Table`."""

    def __init__(self, records: list[dict[str, Any]], name: str = "memory"):
        self.records, self.name = records, name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self.records[int(index)]

    def column(self, name: str) -> np.ndarray:
        return np.asarray([record[name] for record in self.records])

    def mark(self) -> dict[str, Any]:
        return {}

    def contents(self) -> dict[str, Any]:
        return {"records": len(self)}

    def __repr__(self) -> str:
        return f"MemoryTable({self.name})"


def caption_table(count: int = 64, seed: int = 0) -> MemoryTable:
    """Image-caption records: {id, image, captions}."""
    rng = np.random.default_rng(seed)
    records = [
        {
            "id": i,
            "image": png(rng),
            "captions": [
                " ".join(rng.choice(WORDS, rng.integers(2, 9))).encode() for _ in range(3)
            ],
        }
        for i in range(count)
    ]
    return MemoryTable(records)
