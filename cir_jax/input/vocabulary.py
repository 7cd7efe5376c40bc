"""Words of ARTEMIS (naver/artemis): its vocabulary file, and texts as it tokenises them.

`/`, `-` and `\\` become spaces; what is no ASCII letter, parenthesis or space is dropped; lower
case; NLTK's `word_tokenize`, of which on such texts its contractions are left ("cannot" is "can
not") and parentheses as words. A word that is not in the vocabulary is `<unk>`. `<and>` between two
captions is its own token; nothing else in a text becomes a special one.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from cir_jax.errors import WeightsError
from cir_jax.input import pickles
from cir_jax.input.text import Tokenizer

SPECIAL = ("<pad>", "<start>", "<and>", "<end>", "<unk>")
"""The first words of every vocabulary."""

CONTEXT_LENGTH = 128
"""Tokens of the longest text: the original has no limit; the longest of CIRR has about 60."""

# NLTK's NLTKWordTokenizer; those with an apostrophe have lost it
_CONTRACTIONS = ("can not", "gim me", "gon na", "got ta", "lem me", "wan na")

_REMEDY = "Make it with the original's vocab.py from the annotations that the model was trained on."


class _Reader(pickles.Reader):
    def named(self, module: str, name: str) -> Any:
        if name != "Vocabulary":  # of `vocab`, or of `__main__`, which wrote it
            return super().named(module, name)
        return pickles.Global(module, name)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        return pickles.Object(function)


def read(path: Path) -> tuple[str, ...]:
    """The words of an official NAME_vocab.pkl in the order of their ids; nothing in it is run.

    Raises WeightsError naming the file when it is missing, no vocabulary, or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); the ids of words are in it. {_REMEDY}"
        ) from error
    try:
        found = _Reader(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise WeightsError(f"{path}: no readable vocabulary ({reason[:200]}). {_REMEDY}") from error
    words = found.state.get("word2idx") if isinstance(found, pickles.Object) else None
    if not isinstance(words, Mapping) or not all(isinstance(word, str) for word in words):
        raise WeightsError(f"{path}: expected a Vocabulary with word2idx. {_REMEDY}")
    ids = sorted(words.values()) if all(type(i) is int for i in words.values()) else []
    if ids != list(range(len(words))):
        raise WeightsError(
            f"{path}: the ids of its {len(words)} words are not 0 to {len(words) - 1}. {_REMEDY}"
        )
    return tuple(sorted(words, key=words.__getitem__))


def tokenizer(words: Sequence[str], what: str) -> Tokenizer:
    """Texts -> ids <start> ... <end> <pad> ... Raises WeightsError naming `what`, their file."""
    if tuple(words[: len(SPECIAL)]) != SPECIAL:
        raise WeightsError(
            f"{what}: begins with {', '.join(words[: len(SPECIAL)])}; expected "
            f"{', '.join(SPECIAL)}. {_REMEDY}"
        )
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[/\-\\]"), " "),
            normalizers.Replace(Regex(r"[^(a-zA-Z) ]"), ""),
            normalizers.Lowercase(),
            *(
                normalizers.Replace(Regex(rf"\b{pair.replace(' ', '')}\b"), pair)
                for pair in _CONTRACTIONS
            ),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[()]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    # no "special" one: those are text where texts are tokenised
    made.add_tokens([tokenizers.AddedToken("<and>", normalized=False, special=False)])
    start, end, pad = (SPECIAL.index(token) for token in ("<start>", "<end>", "<pad>"))
    return Tokenizer(
        made, context_length=CONTEXT_LENGTH, bos_id=start, eos_id=end, pad_id=pad, cleaned=False
    )
