"""The architecture of the embedded world's CLIP: config, tokenizer and preprocessing, no weights.

    python -m data.shapes.architecture DIR

writes a Hugging Face directory that `experiments/pretrain.py` trains and fills with weights.
"""

import json
import math
import sys
from pathlib import Path

from cir_jax.input.images import ImageTransform
from cir_jax.input.text import word_tokenizer
from cir_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from data.shapes.words import vocabulary

CONTEXT_LENGTH = 24  # the longest text has 22 words


def write(directory: Path) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and preprocessor_config.json."""
    tokenizer = word_tokenizer(vocabulary(), CONTEXT_LENGTH)
    config = ClipConfig(
        text=TextConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        ),
        vision=VisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
        ),
        projection_dim=128,
        logit_scale_init_value=math.log(25),
    )
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
    write(Path(sys.argv[1]))
