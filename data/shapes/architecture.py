"""The architectures of the embedded world's CLIP and BLIP: config, tokenizer, preprocessing.

    python -m data.shapes.architecture DIR clip

writes a Hugging Face directory that `experiments/pretrain.py` trains and fills with weights;
`blip` instead of `clip` one for `experiments/pretrain.py:blip`.
"""

import json
import math
import sys
from pathlib import Path

from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer, word_tokenizer
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import BlipConfig, BlipVisionConfig
from cir_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from data.shapes.words import vocabulary

CONTEXT_LENGTH = 24  # the longest text has 22 words


TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": CONTEXT_LENGTH}
IMAGES = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4}


def clip() -> tuple[ClipConfig, Tokenizer]:
    """2.5 million parameters."""
    tokenizer = word_tokenizer(vocabulary(), CONTEXT_LENGTH)
    config = ClipConfig(
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            **TEXT,
        ),
        vision=VisionConfig(
            hidden_size=192, intermediate_size=768, num_attention_heads=3, **IMAGES
        ),
        projection_dim=128,
        logit_scale_init_value=math.log(25),
    )
    return config, tokenizer


def blip() -> tuple[BlipConfig, Tokenizer]:
    """1.8 million parameters: its texts meet its images once more, in the matching encoder."""
    tokenizer = word_tokenizer(vocabulary(), CONTEXT_LENGTH, blip=True)
    config = BlipConfig(
        text=BertConfig(
            vocab_size=tokenizer.vocab_size,
            encoder_hidden_size=128,
            pad_token_id=tokenizer.pad_id,
            sep_token_id=tokenizer.eos_id,
            bos_token_id=tokenizer.vocab_size - 2,
            **TEXT,
        ),
        vision=BlipVisionConfig(
            hidden_size=128, intermediate_size=512, num_attention_heads=2, **IMAGES
        ),
        projection_dim=128,
    )
    return config, tokenizer


def write(directory: Path, kind: str = "clip") -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and preprocessor_config.json."""
    config, tokenizer = {"clip": clip, "blip": blip}[kind]()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    files = {
        "config.json": config.to_dict(),
        "preprocessor_config.json": ImageTransform(resize=32, crop=32).to_dict(),
        "tokenizer_config.json": tokenizer.to_dict(),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), *sys.argv[2:])
