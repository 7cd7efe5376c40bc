"""Phrase books, lists of concepts, and generation with a tiny random language model."""

import json
import pickle

import pytest

from cir_jax.errors import DataError, WeightsError
from cir_jax.input import generation, phrases

CONCEPTS = {"cat": ["a photo of cat that sleeps", "a cat and a cat"], " dog ": ["dog"]}


def test_both_forms_give_the_same_book(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"concepts": CONCEPTS}))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(CONCEPTS))
    books = [phrases.read(tmp_path / name) for name in ("b.json", "b.pkl")]
    assert books[0].concepts == books[1].concepts
    assert list(books[0].concepts) == ["cat", "dog"]
    assert books[0].templates == phrases.TEMPLATES and len(phrases.TEMPLATES) == 24
    assert books[0].identity == books[1].identity != books[0].without_suffix().identity
    phrases.write(tmp_path / "c.json", books[0])
    assert phrases.read(tmp_path / "c.json").identity == books[0].identity


def test_the_rule_which_concepts_are_discarded():
    book = phrases.PhraseBook(
        ("{}",),
        {
            "cat": ("a cat", "cats"),
            "dog": ("a dog", "a Dog"),  # another case: not contained
            "pay": ("a $ 5 note",),  # a dollar of its own satisfies the rule
        },
    )
    assert book.discarded == {"dog"}
    assert phrases.with_placeholder("a cat and cat", "cat") == "a  $  and cat"
    assert phrases.with_placeholder("a cat and cat", "cat", every=True) == "a  $  and  $ "


class Hostile:
    def __reduce__(self):
        return (open, ("/dev/null", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"cat": [Hostile()]}), r"UnpicklingError: it names (io|_io)\.open"),
        (b"\x80\x04garbled", "not a phrase book"),
        (pickle.dumps({"cat": [1]}), "concept 'cat': must be a list of strings"),
        (pickle.dumps([]), "expected a dictionary of concepts"),
        (pickle.dumps({"cat": []}), "concept 'cat' has no phrases"),
        (pickle.dumps({"": ["x"]}), "a concept's name is ''"),
    ],
)
def test_pickles_that_are_no_phrase_books(tmp_path, content, message):
    file = tmp_path / "concept_to_phrases.pkl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        phrases.read(file)
    assert "concept_to_phrases.pkl" in str(caught.value)


def test_json_that_is_no_phrase_book(tmp_path):
    file = tmp_path / "b.json"
    with pytest.raises(DataError, match="no phrases .*launch/phrases.py"):
        phrases.read(file)
    for content, message in (
        ("{", "not a phrase book"),
        ('{"templates": ["a photo"], "concepts": {"cat": ["cat"]}}', "contain {} exactly once"),
        ('{"templates": [], "concepts": {"cat": ["cat"]}}', "no templates"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            phrases.read(file)


def test_lists_of_concepts(tmp_path):
    classes, lines = tmp_path / "classes.csv", tmp_path / "names.txt"
    classes.write_text('LabelName,DisplayName\n/m/1, Cat \n/m/2,"Dog, big"\n/m/3,Cat\n')
    lines.write_text("Cat\n\nDog, big\n")
    assert phrases.read_names(lines) == ["Cat", "Dog, big"]
    assert phrases.read_names(classes) == ["Cat", "Dog, big", "Cat"]  # as often as listed
    classes.write_text("a,b\n")
    with pytest.raises(DataError, match="no column DisplayName"):
        phrases.read_names(classes)
    lines.write_text("\n")
    with pytest.raises(DataError, match="no concept names"):
        phrases.read_names(lines)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A random GPT-2 of two words' width, with a tokenizer of single characters."""
    pytest.importorskip("torch")
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("gpt")
    letters = [*"abcdefghijklmnopqrstuvwxyz ", "<|endoftext|>"]
    model = tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, [])
    plain = tokenizers.Tokenizer(model)
    plain.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=len(letters), n_positions=64, n_embd=8, n_layer=1, n_head=1,
        bos_token_id=27, eos_token_id=27,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return str(directory)


def test_phrases_are_generated_and_a_killed_run_goes_on(tmp_path, language_model, monkeypatch):
    output, options = tmp_path / "b.json", {"model": language_model, "count": 3, "batch_size": 2}
    names = ["cat", "dog", "owl"]
    whole = generation.generate(names, tmp_path / "whole.json", **options)
    assert all(len(found) == 3 for found in whole.concepts.values())
    assert all(p.startswith("a photo of cat that") for p in whole.concepts["cat"])
    assert len(set(whole.concepts["cat"])) > 1
    generation.generate(names[:1], output, **options)
    assert not (tmp_path / "b.json.part").exists()

    class Killed(BaseException):
        pass

    sample = generation._Sampler.__call__

    def dies(self, concept, *args):
        if concept == "owl":
            raise Killed
        return sample(self, concept, *args)

    monkeypatch.setattr(generation._Sampler, "__call__", dies)
    with pytest.raises(Killed):
        generation.generate(names, output, **options)
    part = tmp_path / "b.json.part"
    part.write_bytes(part.read_bytes()[:-5])  # the kill cut the last line off
    monkeypatch.setattr(generation._Sampler, "__call__", sample)
    with pytest.raises(DataError, match="of another run"):
        generation.generate(names, output, **(options | {"count": 4}))
    assert generation.generate(names, output, **options).concepts == whole.concepts
    assert phrases.read(output).concepts == whole.concepts


def test_generation_without_a_model(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(WeightsError, match="no causal language model"):
        generation.generate(["cat"], tmp_path / "b.json", model=str(tmp_path / "none"))
    with pytest.raises(DataError, match="count=0"):
        generation.generate(["cat"], tmp_path / "b.json", model="x", count=0)


def test_line_breaks_and_dots():
    assert generation.tidy("a\n\nb...c.") == "a. b.c."
