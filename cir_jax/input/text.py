"""Tokenisation: text cleaning as OpenAI's CLIP, ids from a Hugging Face `tokenizer.json`."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers

from cir_jax.errors import WeightsError

BUCKET = 8
"""Batches are padded to a multiple of this, so that few lengths, and few programs, occur."""


def clean(text: str) -> str:
    """ftfy, HTML entities twice, white space collapsed, lower case: as CLIP's tokenizer."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """Text -> int32 ids `[start] ... [end] pad ...`."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        context_length: int,
        bos_id: int,
        eos_id: int,
        pad_id: int,
    ):
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    @classmethod
    def from_file(cls, path: Path, **kwargs: int) -> "Tokenizer":
        """From a `tokenizer.json`; `kwargs` as the constructor's."""
        if not path.is_file():
            raise WeightsError(
                f"{path} is missing: a tokenizer belongs to the weights. "
                "Copy tokenizer.json from where the weights come from."
            )
        return cls(tokenizers.Tokenizer.from_file(str(path)), **kwargs)

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `tokenizer_config.json`."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            **{name: self._tokenizer.id_to_token(i) for name, i in ids.items()},
        }

    def id_of(self, token: str) -> int:
        """The id of a single token, such as the placeholder `$`."""
        ids = self._ids([token])[0]
        if len(ids) != 1:
            raise WeightsError(f"{token!r} is {len(ids)} tokens in this tokenizer, expected one")
        return ids[0]

    def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """int32[batch, length], truncated keeping the end token.

        length: None pads to the longest text, rounded up to a multiple of BUCKET.
        """
        limit = min(length or self.context_length, self.context_length)
        rows = [[self.bos_id, *ids[: limit - 2], self.eos_id] for ids in self._ids(texts)]
        if length is None:
            longest = max(map(len, rows), default=1)
            length = min(-(-longest // BUCKET) * BUCKET, self.context_length)
        out = np.full((len(rows), length), self.pad_id, np.int32)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return out

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(
            [clean(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]


def word_tokenizer(words: Sequence[str], context_length: int) -> Tokenizer:
    """A tokenizer with one token per word, for worlds with a closed vocabulary.

    Ids: end (also padding) 0, start 1, unknown 2, the placeholders `$` and `*`, then `words`.
    """
    special = ["<|endoftext|>", "<|startoftext|>", "<unk>", "$", "*"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 0)],
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftext|>"])
    return Tokenizer(tokenizer, context_length=context_length, bos_id=1, eos_id=0, pad_id=0)
