"""Texts as ARTEMIS tokenises them. Expected words are those of NLTK's word_tokenize."""

import pytest

from cir_jax.input import vocabulary

SAID = "is more red can not gim me gon na got ta lem me wan na t shirt long sleeves has cannots and"
WORDS = tuple(dict.fromkeys([*vocabulary.SPECIAL, "(", ")", *SAID.split()]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is more RED.", "is more red"),
        ("has long-sleeves/t\\shirt", "has long sleeves t shirt"),
        ("is (more)red 100%", "is ( more ) red"),
        ("CANNOT, gimme! gonna gotta lemme wanna", "can not gim me gon na got ta lem me wan na"),
        ("cannots (wanna)", "cannots ( wan na )"),
        ("is\tred\nmore", "<unk>"),  # other white space is dropped, too
        ("is caf\u00e9 red", "is <unk> red"),
        ("is red <and> has sleeves", "is red <and> has sleeves"),
        ("is < and> red <pad> <end>", "is and red <unk> <unk>"),  # no special tokens in a text
        ("", ""),
    ],
)
def test_texts_become_the_originals_words(text, expected):
    ids = list(vocabulary.tokenizer(WORDS, "words")([text], 32)[0])
    assert ids[0] == 1 and set(ids[ids.index(3) + 1 :]) <= {0}
    assert [WORDS[i] for i in ids[1 : ids.index(3)]] == expected.split()


def test_a_vocabulary_has_the_words_of_captions_as_they_come():
    captions = ["Is RED, cannot.", "red (and) t-shirt"]
    built = vocabulary.build(captions)
    assert built == (*vocabulary.SPECIAL, "is", "red", "can", "not", "(", "and", ")", "t", "shirt")
