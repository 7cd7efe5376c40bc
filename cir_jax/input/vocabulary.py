"""Words of ARTEMIS (naver/artemis): its vocabulary file, and texts as it tokenises them.

`/`, `-` and `\\` become spaces; what is no ASCII letter, parenthesis or space is dropped; lower
case; NLTK's `word_tokenize`, of which on such texts its contractions are left ("cannot" is "can
not") and parentheses as words. A word that is not in the vocabulary is `<unk>`. `<and>` between two
captions is its own token; nothing else in a text becomes a special one.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from cir_jax.errors import WeightsError
from cir_jax.input import pickles
from cir_jax.input.text import Tokenizer
from cir_jax.storage.atomic import write_atomically

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


class _Vocabulary:
    """Stands for the original's class when its file is written."""


class _Pickler(pickle._Pickler):  # the one in C would look for the original's module
    def save_global(self, obj: Any, name: str | None = None) -> None:
        del name
        self.write(pickle.GLOBAL + b"vocab\nVocabulary\n")
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, type: save_global}


def write(path: Path, words: Sequence[str]) -> None:
    """A vocabulary file, which the original reads."""
    made = _Vocabulary()
    made.idx, made.idx2word = len(words), dict(enumerate(words))
    made.word2idx = {word: i for i, word in enumerate(words)}
    write_atomically(path, lambda file: _Pickler(file, protocol=4).dump(made))


def build(captions: Iterable[str]) -> tuple[str, ...]:
    """The words of captions in the order in which they come, behind the special ones: vocab.py.

    Two captions of one image are two here. FashionIQ's own order is that of its training files, of
    each the first captions, then the second ones: 3775 words and the special ones.
    """
    splitter = _splitter({})
    found: dict[str, None] = dict.fromkeys(SPECIAL)
    for caption in captions:
        text = splitter.normalizer.normalize_str(caption)
        found |= dict.fromkeys(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text))
    return tuple(found)


def tokenizer(words: Sequence[str], what: str) -> Tokenizer:
    """Texts -> ids <start> ... <end> <pad> ... Raises WeightsError naming `what`, their file."""
    if tuple(words[: len(SPECIAL)]) != SPECIAL:
        raise WeightsError(
            f"{what}: begins with {', '.join(words[: len(SPECIAL)])}; expected "
            f"{', '.join(SPECIAL)}. {_REMEDY}"
        )
    made = _splitter({word: i for i, word in enumerate(words)})
    # no "special" one: those are text where texts are tokenised
    made.add_tokens([tokenizers.AddedToken("<and>", normalized=False, special=False)])
    start, end, pad = (SPECIAL.index(token) for token in ("<start>", "<end>", "<pad>"))
    return Tokenizer(
        made, context_length=CONTEXT_LENGTH, bos_id=start, eos_id=end, pad_id=pad, cleaned=False
    )


def _splitter(ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    model = tokenizers.models.WordLevel(dict(ids), unk_token="<unk>")
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
    return made


def vectors(path: Path, words: Sequence[str], width: int) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a text file of GloVe that are of `words`: number of the word, float32[width].

    Raises WeightsError naming the file when it cannot be read, or its vectors have another width.
    """
    ids = {word: i for i, word in enumerate(words)}
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                # some of its words have spaces in them
                word, *values = line.rstrip().rsplit(" ", width)
                if word in ids and len(values) == width:
                    yield ids[word], np.asarray(values, np.float32)
                elif number == 1 and len(line.split()) != width + 1:
                    raise WeightsError(
                        f"{path}: {len(line.split()) - 1} numbers of a word, expected {width}. "
                        "Give glove.840B.300d.txt, or vectors of that width."
                    )
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}).") from error
