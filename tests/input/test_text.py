"""Tokenisation. Equality with CLIP's own ids is a fixture (tests/golden/clip_tokens.json)."""

import gzip
import html
import json
import pickle
import random
import re
import string

import ftfy
import numpy as np
import pytest

from cir_jax.errors import DataError, WeightsError
from cir_jax.input.text import (
    OPENAI_VOCABULARY,
    Tokenizer,
    clean,
    clip_bpe,
    collapse,
    placeholder_positions,
    read_merges,
    word_tokenizer,
)
from tests import parity_core

MERGES = [("a", "t</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>")]
IDS = {"context_length": 12, "bos_id": 516, "eos_id": 517, "pad_id": 0}


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer(clip_bpe(MERGES), **IDS)


def test_cleaning():
    assert clean("  A &amp;amp; B\n\tc ") == "a & b c"
    assert clean("schÃ¶n â€œhiâ€\x9d") == 'schön "hi"'


def test_ascii_needs_no_mending():
    """Such texts skip ftfy and html: they must be what these would make of them."""
    rng = random.Random(0)
    alphabet = string.printable + " <>#;&`'\"" * 3
    lines = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(3000)]
    lines += ["a  red\x1b[31m star", "x\x00y", "&lt;b&gt;", "&amp;#36;", " two\u00a0stars "]
    for line in lines:
        mended = html.unescape(html.unescape(ftfy.fix_text(line)))
        assert collapse(line) == re.sub(r"\s+", " ", mended).strip(), line


def test_ids_by_hand(bpe):
    assert bpe.vocab_size == 518
    # `$` is byte 36, 3 after `!`; at the end of a word 256 more
    assert bpe(["a red cat $ $,"]).tolist() == [[516, 256 + 64, 515, 513, 259, 3, 256 + 11, 517]]
    assert bpe.id_of("$") == 259 and bpe.id_of("*") == 265


def test_padding_truncation_and_buckets(bpe):
    ids = bpe(["cat", "cat " * 20])
    assert ids.shape == (2, 12) and ids.dtype == np.int32
    assert ids[0].tolist() == [516, 513, 517] + [0] * 9
    assert ids[1].tolist() == [516] + [513] * 10 + [517]
    assert bpe(["cat"]).shape == (1, 8) and bpe(["cat " * 7]).shape == (1, 12)
    assert bpe(["cat"], 5).shape == (1, 5) and bpe(["cat " * 9], 5)[0].tolist()[-1] == 517
    assert bpe([""])[0, :2].tolist() == [516, 517] and bpe([]).shape[0] == 0


def test_special_tokens_in_a_text(bpe):
    """As OpenCLIP: its own spelling is the token, Hugging Face's is text."""
    assert bpe(["<start_of_text>cat<end_of_text>"])[0, :5].tolist() == [516, 516, 513, 517, 517]
    row = bpe(["<|endoftext|> cat"], 40)[0]
    assert (row == 517).sum() == 1
    assert pickle.loads(pickle.dumps(bpe))(["<|endoftext|> cat"], 40)[0].tolist() == row.tolist()


def test_the_stored_forms_give_the_same_ids(bpe, tmp_path):
    texts = ["a red cat's $ , isn't it?", "naïve 123 ☃"]
    expected = bpe(texts).tolist()
    lines = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n"
    contents = {"merges.txt": lines.encode(), OPENAI_VOCABULARY: gzip.compress(lines.encode())}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert read_merges(path) == MERGES
        loaded = Tokenizer.from_directory(tmp_path, context_length=12, pad_id=0)
        assert loaded(texts).tolist() == expected and loaded.identity == bpe.identity
        path.unlink()
    bpe.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_directory(tmp_path, context_length=12, pad_id=0)
    assert loaded(texts).tolist() == expected and loaded.identity == bpe.identity


def test_the_padding_token_that_the_tokenizer_names(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    config, legacy = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"

    def pad():
        return Tokenizer.from_directory(tmp_path, context_length=12).pad_id

    assert pad() == 517
    for token, i in (("!", 0), ({"content": "$"}, 3), (None, 517)):
        config.write_text(json.dumps({"pad_token": token}))
        assert pad() == i
    # as transformers: the older file outweighs the newer, unless that lists its tokens
    legacy.write_text(json.dumps({"pad_token": "!"}))
    config.write_text(json.dumps({"pad_token": "$"}))
    assert pad() == 0
    config.write_text(json.dumps({"pad_token": "$", "added_tokens_decoder": {}}))
    assert pad() == 3
    legacy.unlink()
    for content, message in (
        (
            {"pad_token": "[PAD]"},
            r"tokenizer.json: no token \[PAD\], which start, end or pad a text",
        ),
        ({"bos_token": 7}, "bos_token 7: expected a string"),
        ({"padding_side": "left"}, "tokenizer_config.json: {'padding_side': 'left'}: only"),
        ({"do_lower_case": False}, "'do_lower_case': False"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            pad()


def test_a_text_is_not_a_list_of_texts(bpe):
    for given in ("a red cat", ["a", None]):
        with pytest.raises(DataError, match=r"expected a list of strings, tokenizer\(\['a red car"):
            bpe(given)


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(WeightsError, match="tokenizer.json is missing"):
        Tokenizer.from_directory(tmp_path, context_length=12)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="tokenizer.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path, context_length=12)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("#version\nonly-one\n")
    with pytest.raises(WeightsError, match="merges.txt: not a list of merges"):
        Tokenizer.from_directory(tmp_path, context_length=12)


def test_placeholders_are_found():
    tokenizer = word_tokenizer(["a", "photo", "of"], 8)
    dollar = tokenizer.id_of("$")
    ids = tokenizer(["a $ of $", "$ photo"])
    assert placeholder_positions(ids, dollar).tolist() == [2, 1]
    every = placeholder_positions(ids, dollar, every=True)
    assert every.dtype == bool and np.argwhere(every).tolist() == [[0, 2], [0, 4], [1, 1]]
    with pytest.raises(DataError, match="row 1: no placeholder .token 3. in the text"):
        placeholder_positions(tokenizer(["$", "a photo"]), dollar)


def test_berts_words_and_texts_left_as_they_are(tmp_path):
    """vocab.txt and tokenizer.json give the same ids; CLIP's cleaning is not applied."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] naive cat ##s & ; amp $ * , !".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    kwargs = {"context_length": 12, "bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]"}
    tokenizer = Tokenizer.by_tokens(tmp_path, **kwargs)
    texts = ["Na\u00efve  CATS!", "cat &amp; $, [SEP] cats", "dog"]
    ids = tokenizer(texts, 12)
    spelt = [" ".join(words[i] for i in row if i) for row in ids]
    assert spelt[0] == "[CLS] naive cat ##s ! [SEP]"
    # a special token in a text is text, and an HTML entity stays one
    assert spelt[1].startswith("[CLS] cat & amp ; $ , [UNK]") and spelt[1].count("[SEP]") == 1
    assert spelt[2] == "[CLS] [UNK] [SEP]"
    assert tokenizer.id_of("$") == words.index("$") and tokenizer([""])[0, :2].tolist() == [2, 3]
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").unlink()
    assert Tokenizer.by_tokens(tmp_path, **kwargs)(texts, 12).tolist() == ids.tolist()
    none = Tokenizer.by_tokens(tmp_path, **(kwargs | {"bos": None}))
    assert none(["cat"], 4).tolist() == [[6, 3, 0, 0]] and "bos_token" not in none.to_dict()
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again(texts, 12).tolist() == ids.tolist()
    with pytest.raises(WeightsError, match="tokenizer.json: no token </s>, so it belongs to anoth"):
        Tokenizer.by_tokens(tmp_path, **(kwargs | {"eos": "</s>"}))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer.json is missing: .* Copy it from"):
        Tokenizer.by_tokens(tmp_path, **kwargs)


@pytest.mark.peer
def test_wordpiece_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat red ##d ##s $ * , ! ' - 2 ##2 un ##able".split()
    words += [*letters, *(f"##{letter}" for letter in letters), "\u4eba"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    kwargs = {"context_length": 35, "bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]"}
    texts = [
        "A photo of $ that IS red, un-able!",
        "  \t caf\u00e9\u200b na\u00efve\n", "\u4eba\u4eba cat", "",
        "it's 2222 $* \u2014 \u00bd", "x" * 120, "the cats " * 30,
    ]  # fmt: skip
    ours = Tokenizer.by_tokens(tmp_path, **kwargs)(texts, 35)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=35)["input_ids"]
    assert ours.tolist() == expected


def test_clip_ids_of_placeholders():
    """With CLIP's vocabulary: `$,` is one chunk, and not a placeholder."""
    merges = parity_core.installed_clip_merges()
    if merges is None:
        pytest.skip("CLIP's vocabulary is not installed")
    tokenizer = Tokenizer(clip_bpe(merges), context_length=77, bos_id=49406, eos_id=49407, pad_id=0)
    assert [tokenizer.id_of(x) for x in ("$", "*", "!")] == [259, 265, 256]
    ids = tokenizer(["a photo of $ that is red", "a photo of $, that"])
    assert placeholder_positions(ids[:1], 259).tolist() == [4]
    with pytest.raises(DataError, match="row 1"):
        placeholder_positions(ids, 259)
