"""SigLIP's tokenizers: fixed length, placeholders, and the ids of transformers' own classes."""

import json
import pickle
import random

import numpy as np
import pytest

from cir_jax.errors import DataError, WeightsError
from cir_jax.input import sentencepiece
from cir_jax.input.siglip_text import SiglipTokenizer
from cir_jax.input.text import read_tokenizer
from cir_jax.weights.siglip import read_siglip_tokenizer
from tests.weights import siglip_worlds

TEXTS = [
    "A photo of a Cat!", "", "  ", "costs $5, *now*", "it's red...", "cat " * 100, "x" * 300,
    "ΟΔΟΣ İ ﬁ ½ ＦＵＬＬ 漢字 😀", "a▁cat\n two\tcats\u00a0", "- . ,", "a*b a$b", "<eos> a <pad>",
]  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2])
def tokenizer(request, tmp_path_factory):
    return siglip_worlds.tokenizer(tmp_path_factory.mktemp("tokens"), request.param)


def words(tokenizer, text):
    """The tokens of a text, up to the end."""
    ids = tokenizer([text])[0].tolist()
    vocabulary = {i: word for word, i in tokenizer._tokenizer.get_vocab().items()}
    return [vocabulary[i] for i in ids[: ids.index(tokenizer.eos_id)]]


def test_ids_are_always_of_one_length_with_the_end_in_them(tokenizer):
    ids = tokenizer(["a red cat", "", "cat " * 100])
    assert ids.shape == (3, 64) and ids.dtype == np.int32
    assert (ids == tokenizer.eos_id).any(axis=1).all() and ids[2, 63] == tokenizer.eos_id
    assert ids[1, 0] == tokenizer.eos_id == 1 and (ids[1, 1:] == tokenizer.pad_id).all()
    assert (tokenizer(["a red cat"], 64) == ids[0]).all()
    with pytest.raises(DataError, match="texts of 16 tokens: SigLIP reads the padding, too, .* 64"):
        tokenizer(["a"], 16)


def test_case_is_lost_and_punctuation_in_the_first_version_alone(tokenizer):
    assert words(tokenizer, "A photo OF a cat") == words(tokenizer, "a photo of a cat")
    first = tokenizer.canonical
    expected = ["▁a", "▁red", "▁cat"] if first else ["a", "▁red", ",", "▁cat", "!"]
    assert words(tokenizer, "a red, cat!") == expected


@pytest.mark.parametrize("mark", ["$", "*"])
def test_a_placeholder_is_one_token_between_the_pieces(tokenizer, mark):
    """What stands around it is tokenised as it is without it; no other mark becomes the token."""
    placeholder = tokenizer.id_of(mark)
    assert tokenizer._tokenizer.id_to_token(placeholder) == f"▁{mark}"
    both = [*words(tokenizer, "a photo of"), f"▁{mark}"]
    assert words(tokenizer, f"a photo of {mark} that is red") == [*both, "▁that", "▁is", "▁red"]
    assert words(tokenizer, f"a photo of  {mark}  that is red") == [*both, "▁that", "▁is", "▁red"]
    assert words(tokenizer, f"{mark} is red {mark} {mark}") == [
        f"▁{mark}", "▁is", "▁red", f"▁{mark}", f"▁{mark}",
    ]  # fmt: skip
    rest = words(tokenizer, ", red!" if tokenizer.canonical else " , red!")
    assert words(tokenizer, f"a photo of {mark} , Red!") == both + rest
    if tokenizer.canonical:
        glued = [f"cat{mark}s", f"{mark}5", f"red{mark}", f"({mark})", f"\n{mark}."]
        assert not (tokenizer(glued) == placeholder).any()


def test_marks_of_a_plain_text_are_punctuation(tokenizer):
    text = "a * cat $ of $5 $"
    plain = words(tokenizer, tokenizer.plain(text))
    if tokenizer.canonical:
        assert plain == words(tokenizer, "a cat of 5")
    else:
        assert plain == ["a", "▁*", "▁cat", "▁$", "▁of", "▁$", "5", "▁$"]
        assert words(tokenizer, tokenizer.plain("$ cat")) == ["$", "▁cat"]
    assert tokenizer.plain("two cats, $5") == "two cats, $5"


def test_long_captions_are_shortened(tokenizer):
    short = tokenizer.shorten("Red cat " * 50)
    assert (tokenizer([short]) == tokenizer(["red cat " * 50])).all()
    assert tokenizer.shorten("Red cat!") == "Red cat!"


def test_worker_processes_get_the_same_ids(tokenizer):
    """Grain pickles it."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, "a photo of $ that is <eos>"]
    assert (copy(texts) == tokenizer(texts)).all()


def test_a_tokenizer_without_a_placeholder_says_so():
    tokenizer = siglip_worlds.gemma()
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "$" not in pair]
    state["model"]["vocab"]["instead"] = state["model"]["vocab"].pop("▁$")
    ours = SiglipTokenizer(
        tokenizer.from_str(json.dumps(state)),
        context_length=8,
        eos_id=1,
        pad_id=0,
        canonical=False,
    )
    assert ours.id_of("*") and words(ours, "a $") == ["a", "▁", "$"]
    ours._tokenizer.normalizer = None
    with pytest.raises(WeightsError, match="'cat' is 3 tokens in this tokenizer, expected one"):
        ours.id_of("cat")


def test_a_saved_file_says_all_of_it(tmp_path):
    """What the published ones leave to a class; reading it again adds nothing."""
    siglip_worlds.tokenizer(tmp_path, 1)
    sentencepiece.read(tmp_path / "spiece.model", 0).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").unlink()
    for version in (1, 2):
        if version == 2:
            siglip_worlds.tokenizer(tmp_path, 2).save(tmp_path / "tokenizer.json")
        ours = read_siglip_tokenizer(tmp_path, 64)
        assert ours.canonical == (version == 1)
        assert (ours(TEXTS) == siglip_worlds.tokenizer(tmp_path, version)(TEXTS)).all()
        (tmp_path / "spiece.model").unlink(missing_ok=True)
        ours.save(tmp_path / "tokenizer.json")
        plain = read_tokenizer(tmp_path / "tokenizer.json").encode("A Red cat!").ids
        assert plain == ours(["A Red cat!"])[0, : len(plain)].tolist() and plain[-1] == 1
        read_siglip_tokenizer(tmp_path, 64).save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == (tmp_path / "tokenizer.json").read_text()


@pytest.mark.peer
@pytest.mark.parametrize("version", [1, 2])
def test_equal_to_transformers(tmp_path, version):
    pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    if version == 1:
        (tmp_path / "spiece.model").write_bytes(siglip_worlds.trained_spiece())
        ours = read_siglip_tokenizer(tmp_path, 64)
        theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    else:
        siglip_worlds.tokenizer(tmp_path, 2).save(tmp_path / "tokenizer.json")
        ours = read_siglip_tokenizer(tmp_path, 64)
        theirs = transformers.Siglip2Tokenizer.from_pretrained(tmp_path, padding_side="right")
    rng = random.Random(0)
    letters = list("abcdefghij redcat  XYZÀßΣς0123.,!'\"#%&()-_/\\@[]{}^`~|+=:;?<>$*\t\n½ﬁ漢\u200b")
    drawn = ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(500)]
    # a special token in a text is the token there
    texts = [text for text in TEXTS + drawn if "<eos>" not in text]
    expected = theirs(texts, padding="max_length", max_length=64, truncation=True)["input_ids"]
    got = ours([ours.plain(text) for text in texts])
    for text, one, other in zip(texts, got.tolist(), expected, strict=True):
        assert one == other, text
