"""SigLIP's tokenizers: always the length of training, as its text tower reads the padding, too.

SigLIP: lower case, ASCII punctuation removed, white space collapsed, then SentencePiece's unigrams;
ids ... </s>, padded with </s>. SigLIP 2: lower case, Gemma's byte-pair encoding; ids ... <eos>,
padded with <pad>. Neither has a start token. Ids are those of transformers' SiglipTokenizer and
Siglip2Tokenizer with padding="max_length" and truncation; "</s>" in a text is text here, as in the
original (there it would be the token).

Placeholders of pseudo-words: a `$` or `*` between white space is its own token, `▁$` or `▁*`, which
SigLIP never makes of a text (punctuation is gone); what stands before and after it becomes the
tokens that it is without it. All other `$` and `*` are punctuation, and so are those of `plain`.
"""

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from cir_jax.errors import DataError
from cir_jax.input.text import Tokenizer

WORD = "▁"
"""What SentencePiece and Gemma write for a space, the beginning of most words."""

_QUOTE = "\ufdd0"  # no character of any text, says Unicode
_PUNCTUATION = tokenizers.Regex(f"[{re.escape(string.punctuation)}]")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer(Tokenizer):
    """Text -> int32 ids `... [end] pad ...`, int32[batch, context_length].

    canonical: texts lose case and punctuation (SigLIP); False = case alone (SigLIP 2).
    lower: False keeps the case of canonical texts (`do_lower_case`).
    model: content of the `spiece.model` that the tokenizer is of, b"" where it is of another file.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        context_length: int,
        eos_id: int,
        pad_id: int,
        canonical: bool,
        lower: bool = True,
        model: bytes = b"",
    ):
        super().__init__(
            tokenizer,
            context_length=context_length,
            bos_id=None,
            eos_id=eos_id,
            pad_id=pad_id,
            cleaned=False,
        )
        self.canonical, self.lower, self.model = canonical, lower, model
        # in the file, too, so that whoever reads a saved one has the ids of training
        gone, normalizer = "A" * lower + "," * canonical, tokenizer.normalizer
        if set(gone) & set(normalizer.normalize_str(gone) if normalizer else gone):
            steps = [tokenizers.normalizers.Lowercase()] if lower else []
            if canonical:
                steps.append(tokenizers.normalizers.Replace(_PUNCTUATION, ""))
            steps += [normalizer] if normalizer else []
            tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
        end = tokenizer.id_to_token(eos_id)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, eos_id)]
        )
        found = {mark: tokenizer.token_to_id(WORD + mark) for mark in "$*"}
        self._placeholders = {mark: token for mark, token in found.items() if token is not None}
        marks = "|".join(map(re.escape, self._placeholders)) or "(?!)"
        self._placeholder = re.compile(rf"\s*(?<!\S)({marks})(?!\S)\s*")

    @property
    def identity(self) -> tuple[Any, ...]:
        """What ids depend on: as of any tokenizer, and what of a text is read."""
        return *super().identity, self.canonical, self.lower

    def plain(self, text: str) -> str:
        """The text, whose `$` and `*` then are no placeholders."""
        return self._placeholder.sub(
            lambda found: found[0].replace(found[1], _QUOTE + found[1]), text
        )

    def canonicalise(self, text: str) -> str:
        """What of a text SigLIP reads."""
        text = text.lower() if self.lower else text
        text = text.replace(WORD, " ").translate(_NO_PUNCTUATION)
        return re.sub(r"\s+", " ", text).strip()

    def save(self, path: Path) -> None:
        """The `spiece.model` beside `path` where there is one, which transformers' class wants."""
        if self.model:
            path.with_name("spiece.model").write_bytes(self.model)
        else:
            super().save(path)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `tokenizer_config.json`."""
        # no attention mask: transformers' model would hide the padding
        values = super().to_dict() | {"model_input_names": ["input_ids"], "padding_side": "right"}
        if self.model:
            values |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": self.lower}
        return values

    def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """int32[batch, context_length], truncated keeping the end token.

        Raises DataError for another length.
        """
        if length not in (None, self.context_length):
            raise DataError(
                f"texts of {length} tokens: SigLIP reads the padding, too, and was trained on "
                f"{self.context_length}. Leave `length` out."
            )
        return super().__call__(texts, self.context_length)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # texts and placeholders in turn; a text behind a placeholder begins with a space
        rows = [self._placeholder.split(text) for text in texts]
        pieces = [
            (f" {piece}" if i and piece else piece).replace(_QUOTE, "")
            for row in rows
            for i, piece in enumerate(row[::2])
        ]
        encoded = iter(
            super()._ids([*map(self.canonicalise, pieces)] if self.canonical else pieces)
        )
        return [
            [
                token
                for i, piece in enumerate(row)
                for token in ([self._placeholders[piece]] if i % 2 else next(encoded))
            ]
            for row in rows
        ]
