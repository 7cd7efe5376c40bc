"""SentencePiece's unigram models (`spiece.model` of SigLIP and of T5 v1.1).

The file is a protocol buffer; the few fields that are needed are read directly, so that neither
sentencepiece nor protobuf is. Fields: sentencepiece's `sentencepiece_model.proto`.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from cir_jax.errors import WeightsError

UNIGRAM, BYTE = 1, 6  # of TrainerSpec.model_type, and of a piece's type
UNKNOWN, CONTROL = 2, 3
EXTRA_IDS = 100
"""Sentinels that T5 puts behind the pieces; they are in its embedding table."""


def read(path: Path, extra_ids: int = EXTRA_IDS) -> tokenizers.Tokenizer:
    """The tokenizer of a `spiece.model`. Raises WeightsError when it is no unigram model.

    extra_ids: sentinels behind its pieces; only T5 has them.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer, normalizer = (
            dict(_fields(next((value for number, value in fields if number == n), b"")))
            for n in (2, 3)
        )
        vocabulary = [
            (piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]) for piece in pieces
        ]
        types = [piece.get(3, 1) for piece in pieces]
        unknown = types.index(UNKNOWN)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise WeightsError(
            f"{path}: not a SentencePiece model ({error}). Download or copy it again."
        ) from error
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise WeightsError(
            f"{path}: expected a unigram model, as T5's. Give its tokenizer.json: "
            "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
        )
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    # of models with bytes (multilingual SigLIP), a text with "<0x41>" in it would get that piece
    unigrams = tokenizers.models.Unigram(vocabulary, unknown, byte_fallback=BYTE in types)
    tokenizer = tokenizers.Tokenizer(unigrams)
    if charsmap := normalizer.get(2):
        tokenizer.normalizer = tokenizers.normalizers.Precompiled(charsmap)
    # no piece spans two words, so that splitting first changes nothing
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    special = [name for (name, _), kind in zip(vocabulary, types, strict=False) if kind == CONTROL]
    special += [vocabulary[unknown][0], *(f"<extra_id_{i}>" for i in range(extra_ids))]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's message: int, or bytes of all other types."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else -1)
        if not 0 <= size <= len(data) - at:
            raise ValueError(f"field {number} of wire type {wire} at byte {at}")
        yield number, data[at : at + size]
        at += size
