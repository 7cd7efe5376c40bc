"""Variants of protocols, and the texts they make of captions and composers' prompts."""

import dataclasses

import pytest

from cir_jax.errors import ConfigError
from cir_jax.evaluation import protocols


def pseudo_word(text):
    """The prompt of SEARLE."""
    return f"a photo of $ that {text}" if text else "a photo of $"


def pic2word(text):
    return f"a photo of * , {text}" if text else "a photo of *"


def plain(text):
    return text


def fashioniq(*names):
    return protocols.variant(protocols.FASHIONIQ, names)


CAPTIONS = (" is shiny, and Silver. ", "fit and flare?")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("capitalised", ["Is shiny, and Silver and fit and flare"]),
        ("reversed", ["fit and flare? and  is shiny, and Silver. "]),
        (
            "artemis",
            ["is shiny, and Silver and fit and flare", "fit and flare and is shiny, and Silver"],
        ),
        (
            "artemis_words",
            [
                "is shiny, and Silver <and> fit and flare",
                "fit and flare <and> is shiny, and Silver",
            ],
        ),
        ("bge_vl", [" is shiny, and Silver. , and fit and flare?"]),
        ("magiclens", [" is shiny, and Silver.  and fit and flare?"]),
    ],
)
def test_captions_are_joined_as_each_paper_does(variant, expected):
    assert fashioniq(variant).join(CAPTIONS, "query") == expected


def test_variants_combine_and_their_ids_tell_all_of_them_apart():
    both = fashioniq("small_gallery", "capitalised")
    assert (both.gallery, both.captions) == ("triplets", "capitalised")
    ids = [fashioniq(name).id for name in protocols.VARIANTS["fashioniq"]]
    ids += [protocols.variant(protocols.CIRR, [name]).id for name in protocols.VARIANTS["cirr"]]
    ids += [protocols.variant(protocols.CIRCO, [name]).id for name in protocols.VARIANTS["circo"]]
    ids += [both.id]
    ids += [protocol.id for protocol in protocols.PROTOCOLS.values()]
    assert len(set(ids)) == len(ids)
    assert fashioniq("artemis").remove_reference and not protocols.FASHIONIQ.remove_reference


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ConfigError, match="Did you mean 'small_gallery'"):
        fashioniq("small_galery")
    with pytest.raises(ConfigError, match=r"Valid: \(none\)"):
        protocols.variant(protocols.GENECIS, ["artemis"])


def test_the_shared_concept_stands_before_the_image():
    prompt = protocols.variant(protocols.CIRCO, ["shared_concept"]).prompt
    assert prompt(pseudo_word, "is red", "a cat") == "a photo of a cat $ that is red"
    assert prompt(pic2word, "is red", "a cat") == "a photo of a cat * , is red"
    assert prompt(plain, "is red", "a cat") == "a cat that is red"
    with pytest.raises(ConfigError, match="the concept behind 'a photo of'"):
        prompt(lambda text: f"$ {text}", "is red", "a cat")


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ("bge_vl", "Find a picture that also is of a cat, but is red."),
        ("magiclens", "find is of a cat but is red"),
    ],
)
def test_sentences_say_the_concept_and_the_caption(variant, sentence):
    protocol = protocols.variant(protocols.CIRCO, [variant])
    assert protocol.needs_concept and not protocols.CIRCO.needs_concept
    assert protocol.prompt(plain, "is red", "is of a cat") == sentence
    with pytest.raises(ConfigError, match="a sentence without the image.* 'a photo of [$]' and"):
        protocol.prompt(pseudo_word, "is red", "is of a cat")


def test_objects_are_added_to_the_image():
    prompt = protocols.COCO_OBJECT.prompt
    assert prompt(pseudo_word, "dog and cat and car") == "a photo of $ and dog and cat and car"
    assert prompt(pic2word, "dog and cat") == "a photo of * and dog and cat"
    assert prompt(plain, "dog and cat") == "a photo of dog and cat"


def test_inversion_needs_a_word_for_the_image():
    assert protocols.INVERSION.prompt(pseudo_word, "") == "a photo of $"
    with pytest.raises(ConfigError, match="finds an image by its pseudo-word"):
        protocols.INVERSION.prompt(plain, "")


def test_modifications_are_prompted_by_the_composer_alone():
    assert protocols.CIRCO.prompt(pseudo_word, "is red", "a cat") == "a photo of $ that is red"


def test_the_id_names_what_is_averaged():
    compodiff = protocols.variant(protocols.CIRR, ["compodiff"])
    assert "Avg=R@1+Rs@1" in compodiff.id and "Avg=R@5+Rs@1" in protocols.CIRR.id
    assert dataclasses.replace(compodiff, average=protocols.CIRR.average) == protocols.CIRR
