"""Small SigLIPs of both versions, their tokenizers made by hand."""

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from cir_jax.input import sentencepiece
from cir_jax.input.images import ImageTransform
from cir_jax.input.siglip_text import SiglipTokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.siglip import Siglip, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from cir_jax.weights import convert
from tests.input.test_sentencepiece import model

WORDS = "a photo of that is red blue cat cats star make it and has two item".split()
HALF = (0.5, 0.5, 0.5)


def spiece() -> bytes:
    """SigLIP's: words, letters and, as in the published one, placeholders."""
    pieces = {"<pad>": (0.0, 3), "</s>": (0.0, 3), "<unk>": (0.0, 2), "▁": (-3.0, 1)}
    pieces |= {f"▁{word}": (-2.0, 1) for word in (*WORDS, "$", "*")}
    return model(pieces | {letter: (-4.0, 1) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"})


def trained_spiece() -> bytes:
    """One of the library's own, with the normalisation and the special ids of SigLIP's."""
    import sentencepiece

    written = io.BytesIO()
    texts = [" ".join([*WORDS[i:], *WORDS[:i], "$ * , . 0123456789"]) for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 8),
        model_writer=written,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


def gemma() -> tokenizers.Tokenizer:
    """SigLIP 2's: bytes, characters, and merges that make the words out of them."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += list("abcdefghijklmnopqrstuvwxyz0123456789$*,.!")
    merges = {}  # ordered
    for word in (*WORDS, "$", "*"):
        for i in range(len(word)):
            merges[f"▁{word[:i]}", word[i]] = None
    pieces += list(dict.fromkeys("".join(pair) for pair in merges))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            list(merges),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def tokenizer(folder: Path, version: int = 1, context_length: int = 64) -> SiglipTokenizer:
    """folder: where its spiece.model is written."""
    if version == 2:
        return SiglipTokenizer(
            gemma(), context_length=context_length, eos_id=1, pad_id=0, canonical=False
        )
    (folder / "spiece.model").write_bytes(spiece())
    return SiglipTokenizer(
        sentencepiece.read(folder / "spiece.model", extra_ids=0),
        context_length=context_length,
        eos_id=1,
        pad_id=1,
        canonical=True,
        model=spiece(),
    )


def make(
    folder: Path, version: int = 1, seed: int = 0, image_size: int = 18, context_length: int = 64
) -> tuple[Backbone, Any]:
    """A random SigLIP, whose patches of 8 do not fill its images: (backbone, params)."""
    words = tokenizer(folder, version, context_length)
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    text = SiglipTextConfig(
        hidden_size=24,
        vocab_size=words.vocab_size,
        max_position_embeddings=context_length,
        projection_size=32,
        **shared,
    )
    vision = SiglipVisionConfig(hidden_size=32, image_size=image_size, patch_size=8, **shared)
    network = Siglip(SiglipConfig(text, vision))
    rng = np.random.default_rng(seed)
    shapes = convert.joint_shapes(network)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)
    filters = {1: 3, 2: 2}  # bicubic, bilinear
    transform = ImageTransform(
        *(image_size, image_size, HALF, HALF),
        squash=True,
        resample=filters[version],
        processor="SiglipImageProcessor",
    )
    return Backbone(network, words, transform, f"siglip@{version}"), params
