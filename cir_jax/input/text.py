"""Tokenisation: ids from a Hugging Face `tokenizer.json`; for CLIP with its text cleaning."""

import gzip
import html
import json
import re
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers

from cir_jax.errors import DataError, WeightsError, unknown
from cir_jax.input import sentencepiece

BUCKET = 8
"""Batches are padded to a multiple of this, so that few lengths, and few programs, occur."""

OPENAI_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
"""The vocabulary file of the openai/CLIP repository; may lie beside an OpenAI .pt file."""

CLIP_MERGES = 49152 - 256 - 2
"""Merges of CLIP's vocabulary; OpenAI's file holds more than are used."""

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")

_NAMES = ("bos_token", "eos_token", "pad_token")
_END_OF_WORD = "</w>"
_CONFIG = "tokenizer_config.json"


def collapse(text: str) -> str:
    """ftfy, HTML entities twice, white space collapsed."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())  # nothing to mend, and a fifth of the time of an example
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def clean(text: str) -> str:
    """The same in lower case: as CLIP's tokenizer."""
    return collapse(text).lower()


def canonicalize(text: str) -> str:
    """The same without punctuation: as big_vision's."""
    text = collapse(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

CLEANING = {"lower": clean, "whitespace": collapse, "canonicalize": canonicalize}
"""OpenCLIP's name of a way to clean texts -> the function."""


class Tokenizer:
    """Text -> int32 ids `[start] ... [end] pad ...`.

    bos_id: None = no start token (T5). cleaned: texts are cleaned as CLIP's tokenizer does; False
    leaves them to the `tokenizer.json` (BERT, T5). cleaning: how, a key of CLEANING;
    only the way of CLIP's tokenizer ("lower") leaves names of tokens such as `<end_of_text>`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        context_length: int,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        cleaned: bool = True,
        cleaning: str = "lower",
    ):
        self._tokenizer = tokenizer
        # some files ask for them; both are done here
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.context_length = context_length
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.cleaned, self.cleaning = cleaned, cleaning

    @classmethod
    def from_file(cls, path: Path, **kwargs: Any) -> "Tokenizer":
        """From a `tokenizer.json`; `kwargs` as the constructor's."""
        return cls(read_tokenizer(path), **kwargs)

    @classmethod
    def by_tokens(
        cls,
        path: Path,
        *,
        context_length: int,
        bos: str | None,
        eos: str,
        pad: str,
        remedy: str = "Copy it from where the weights come from.",
    ) -> "Tokenizer":
        """From the directory `path`, whose tokenizer knows the ids of its special tokens.

        Reads tokenizer.json, BERT's vocab.txt or T5's spiece.model; texts are not cleaned. `remedy`
        is said when none is there, or a token is not in it (WeightsError).
        """
        other = {path / "vocab.txt": wordpiece, path / "spiece.model": sentencepiece.read}
        file = path / "tokenizer.json"
        if not file.is_file():
            file = next((each for each in other if each.is_file()), file)
        tokenizer = other[file](file) if file in other else read_tokenizer(file, remedy)
        ids = {token: tokenizer.token_to_id(token) for token in (bos, eos, pad) if token}
        if absent := [token for token, found in ids.items() if found is None]:
            raise WeightsError(
                f"{file}: no token {', '.join(absent)}, so it belongs to another model. {remedy}"
            )
        return cls(
            tokenizer,
            context_length=context_length,
            bos_id=ids[bos] if bos else None,
            eos_id=ids[eos],
            pad_id=ids[pad],
            cleaned=False,
        )

    @classmethod
    def from_directory(
        cls, path: Path, *, context_length: int, pad_id: int | None = None
    ) -> "Tokenizer":
        """CLIP's, from what lies beside weights: tokenizer.json, merges.txt, or OpenAI's file.

        Start, end and padding are the tokens that the tokenizer's own files name, see
        `special_tokens`, whatever ids a model's config says: published ones say 0 and 2.
        pad_id overrules the padding. Raises WeightsError for tokens that are not in the vocabulary.
        """
        file = path / "tokenizer.json"
        merges = [f for f in (path / "merges.txt", path / OPENAI_VOCABULARY) if f.is_file()]
        if file.is_file() or not merges:
            tokenizer = read_tokenizer(file)
        else:
            file = merges[0]
            tokenizer = clip_bpe(read_merges(file))
        tokens = dict(zip(_NAMES, (*_SPECIAL, _SPECIAL[1]), strict=True)) | special_tokens(path)
        ids = [tokenizer.token_to_id(token) for token in tokens.values()]
        if pad_id is not None:
            ids[2] = pad_id
        if absent := [t for t, found in zip(tokens.values(), ids, strict=True) if found is None]:
            raise WeightsError(
                f"{file}: no token {', '.join(absent)}, which start, end or pad a text. Copy "
                "tokenizer.json and tokenizer_config.json from where the weights come from."
            )
        ours = _read_config(path / _CONFIG).get("cir_jax") if (path / _CONFIG).is_file() else None
        cleaning = (ours or {}).get("cleaning", "lower")
        if cleaning not in CLEANING:
            raise WeightsError(f"{path / _CONFIG}: {unknown('cleaning', cleaning, CLEANING)}")
        bos, eos, pad = ids
        return cls(
            tokenizer,
            context_length=context_length,
            bos_id=bos,
            eos_id=eos,
            pad_id=pad,
            cleaning=cleaning,
        )

    def save(self, path: Path) -> None:
        """A `tokenizer.json` with which transformers makes the same ids, start and end included."""
        saved = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        around = [i for i in (self.bos_id, self.eos_id) if i is not None]
        if saved.encode("").ids != around:
            names = [saved.id_to_token(i) for i in around]
            start = "".join(f"{name} " for name in names[:-1])
            saved.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{start}$A {names[-1]}",
                special_tokens=list(zip(names, around, strict=True)),
            )
        saved.save(str(path))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What ids depend on: the tokens around a text, the cleaning, the words (a checksum)."""
        words = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        checksum = zlib.crc32(json.dumps(words).encode())
        cleaning = self.cleaning if self.cleaned else None
        return self.bos_id, self.eos_id, self.pad_id, cleaning, checksum

    @property
    def words(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        ids = self._tokenizer.get_vocab()
        return tuple(sorted(ids, key=ids.__getitem__))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `tokenizer_config.json`."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            **{name: self._tokenizer.id_to_token(i) for name, i in ids.items() if i is not None},
            # what that format cannot say
            **({} if self.cleaning == "lower" else {"cir_jax": {"cleaning": self.cleaning}}),
        }

    def token_id(self, token: str) -> int | None:
        """The id of a token that is in the vocabulary as it stands; None = it is not."""
        return self._tokenizer.token_to_id(token)

    def id_of(self, token: str) -> int:
        """The id of a single token, such as the placeholder `$`."""
        ids = self._ids([token])[0]
        if len(ids) != 1:
            raise WeightsError(f"{token!r} is {len(ids)} tokens in this tokenizer, expected one")
        return ids[0]

    def plain(self, text: str) -> str:
        """The text with nothing in it that is read as a placeholder, where that can be told."""
        return text

    def shorten(self, text: str) -> str:
        """The text, without what the text tower has no room for."""
        ids, room = self._ids([text])[0], self.context_length - 1 - (self.bos_id is not None)
        if len(ids) <= room:
            return text
        return self._tokenizer.decode(ids[:room]).replace(_END_OF_WORD, " ").strip()

    def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """int32[batch, length], truncated keeping the end token.

        length: None pads to the longest text, rounded up to a multiple of BUCKET.
        Raises DataError for anything but a list of strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"tokenizer({texts!r:.60}): expected a list of strings, tokenizer(['a red car'])."
            )
        limit = min(length or self.context_length, self.context_length)
        start = [] if self.bos_id is None else [self.bos_id]
        room = limit - len(start) - 1
        rows = [[*start, *ids[:room], self.eos_id] for ids in self._ids(texts)]
        if length is None:
            longest = max(map(len, rows), default=1)
            length = min(-(-longest // BUCKET) * BUCKET, self.context_length)
        out = np.full((len(rows), length), self.pad_id, np.int32)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return out

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # `<|endoftext|>` in a text is text, and `<end_of_text>` is the token, as in OpenCLIP
        # (OpenAI's code has it the other way round). Set here: pickling to workers loses it
        self._tokenizer.encode_special_tokens = True
        texts = [CLEANING[self.cleaning](text) for text in texts] if self.cleaned else list(texts)
        if not self.cleaned or self.cleaning != "lower":
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            return [row.ids for row in encoded]
        named = {"<start_of_text>": self.bos_id, "<end_of_text>": self.eos_id}
        pieces = [re.split("(<start_of_text>|<end_of_text>)", text) for text in texts]
        plain = [piece for row in pieces for piece in row if piece not in named]
        encoded = iter(self._tokenizer.encode_batch(plain, add_special_tokens=False))
        return [
            [
                token
                for piece in row
                for token in ([named[piece]] if piece in named else next(encoded).ids)
            ]
            for row in pieces
        ]


class JoinedTokenizer:
    """Ids of two tokenizers, one behind the other: each text's of the first, then of the second.

    Special tokens are those of the first. Texts always have their whole length.
    """

    def __init__(self, first: Tokenizer, second: Tokenizer):
        self.first, self.second = first, second
        self.bos_id, self.eos_id, self.pad_id = first.bos_id, first.eos_id, first.pad_id
        self.context_length = first.context_length + second.context_length

    @property
    def identity(self) -> tuple[Any, ...]:
        """See `Tokenizer.identity`."""
        return self.first.identity, self.second.identity

    def token_id(self, token: str) -> int | None:
        """See `Tokenizer.token_id`."""
        return self.first.token_id(token)

    def plain(self, text: str) -> str:
        """See `Tokenizer.plain`."""
        return self.first.plain(text)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """int32[batch, context_length]."""
        del length
        ids = [part(texts, part.context_length) for part in (self.first, self.second)]
        return np.concatenate(ids, axis=1)


def read_tokenizer(
    path: Path, remedy: str = "Copy tokenizer.json from where the weights come from."
) -> tokenizers.Tokenizer:
    """A `tokenizer.json`. Raises WeightsError when it is missing (and the remedy), or is none."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing: a tokenizer belongs to the weights. {remedy}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise WeightsError(
            f"{path}: not a tokenizer ({error}). Download or copy it again."
        ) from error


def special_tokens(directory: Path) -> dict[str, str]:
    """{"bos_token": "<|startoftext|>", ...} as the files beside a tokenizer name them.

    As in transformers: special_tokens_map.json outweighs tokenizer_config.json, unless that lists
    its tokens itself (added_tokens_decoder). Raises WeightsError for settings that change ids and
    are not built here.
    """
    config, legacy = (
        _read_config(directory / name) if (directory / name).is_file() else {}
        for name in (_CONFIG, "special_tokens_map.json")
    )
    other = {
        name: config[name]
        for name, usual in _ONE_VALUE.items()
        if config.get(name, usual) not in (None, usual)
    }
    if other:
        raise WeightsError(
            f"{directory / _CONFIG}: {other}: only {_ONE_VALUE} is built here. "
            "Correct the file, or give another model."
        )
    found = config if "added_tokens_decoder" in config else config | legacy
    named = {}
    for name in _NAMES:
        token = found.get(name)
        named[name] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(named[name], str | None):
            raise WeightsError(f"{directory}: {name} {token!r}: expected a string. Copy it again.")
    return {name: token for name, token in named.items() if token}


_ONE_VALUE = {"padding_side": "right", "truncation_side": "right", "do_lower_case": True}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not valid JSON ({error}). Download or copy it again."
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected a JSON object. Download or copy it again.")
    return config


def wordpiece(path: Path) -> tokenizers.Tokenizer:
    """BERT's lower-case tokenizer from its vocab.txt: one token per line."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: unreadable ({error}). Download or copy it again.") from error
    model = tokenizers.models.WordPiece(
        {word: i for i, word in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=100
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    special = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word in words]
    tokenizer.add_special_tokens(special)
    if {"[CLS]", "[SEP]"} <= set(special):
        tokenizer.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", words.index("[SEP]")), ("[CLS]", words.index("[CLS]"))
        )
    return tokenizer


def placeholder_positions(
    token_ids: np.ndarray, placeholder_id: int, *, every: bool = False
) -> np.ndarray:
    """Where pseudo-words go in int32[batch, length]: see `models.clip.overwrite_tokens`.

    int32[batch], the first placeholder of each row (SEARLE, Pic2Word), or with `every`
    bool[batch, length], all of them (LinCIR, RTD).
    Raises DataError naming the first row without one.
    """
    found = np.asarray(token_ids) == placeholder_id
    if (missing := ~found.any(axis=1)).any():
        raise DataError(
            f"row {int(np.argmax(missing))}: no placeholder (token {placeholder_id}) in the text. "
            "Put ` $ ` or ` * `, with the spaces, where the image's pseudo-word belongs, and check "
            "that truncation did not cut it off."
        )
    return found if every else found.argmax(axis=1).astype(np.int32)


def clip_bpe(merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE, which its merges determine; equal to Hugging Face's tokenizer.json.

    Ids: the bytes, the bytes at the end of a word, the merges, start and end of text.
    """
    # printable bytes first, in this order; see `bytes_to_unicode` of openai/gpt-2
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(s + _END_OF_WORD for s in symbols), *map("".join, merges), *_SPECIAL]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {word: i for i, word in enumerate(words)},
            list(merges),
            unk_token=_SPECIAL[1],
            end_of_word_suffix=_END_OF_WORD,
        )
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split, normalizer = tokenizers.pre_tokenizers, tokenizers.normalizers
    tokenizer.normalizer = normalizer.Sequence(
        [
            normalizer.NFC(),
            normalizer.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizer.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(pattern), behavior="removed", invert=True),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    start, end = len(words) - 2, len(words) - 1
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        (_SPECIAL[1], end), (_SPECIAL[0], start), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt` or of OpenAI's vocabulary file: a header, then pairs."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        lines = text.strip().split("\n")[1 : CLIP_MERGES + 1]
        return [(first, second) for first, second in (line.split() for line in lines)]
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not a list of merges ({error}). Download or copy it again."
        ) from error


def word_tokenizer(words: Sequence[str], context_length: int, blip: bool = False) -> Tokenizer:
    """A tokenizer with one token per word, for worlds with a closed vocabulary.

    Ids of a CLIP's: end (also padding) 0, start 1, unknown 2, the placeholders `$` and `*`, then
    `words`. blip: padding 0, start 1, end 2, unknown 3, the placeholders, `words`, and behind them
    [DEC] and [ENC], which no text has.
    """
    if blip:
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        (pad, start, end, unknown), last = special, ["[DEC]", "[ENC]"]
    else:
        start, end, unknown = "<|startoftext|>", "<|endoftext|>", "<unk>"
        special, pad, last = [end, start, unknown], end, []
    vocabulary = {word: i for i, word in enumerate([*special, "$", "*", *words, *last])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    tokenizer.add_special_tokens([*dict.fromkeys((end, start, pad)), *last])
    ids = {"bos_id": vocabulary[start], "eos_id": vocabulary[end], "pad_id": vocabulary[pad]}
    return Tokenizer(tokenizer, context_length=context_length, cleaned=not blip, **ids)
