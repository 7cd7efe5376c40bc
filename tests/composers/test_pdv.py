"""PDV-F: its formula, and the method inside."""

import jax
import numpy as np
import pytest

from cir_jax.composers import build
from cir_jax.errors import ConfigError
from tests.composers import inversion

WORDS = {
    "lincir": {"name": "lincir"},
    "rtd": {"name": "rtd", "word": {"name": "lincir"}},
    "searle_oti": {"name": "searle_oti", "iterations": 2, "cached_phrases": 0},
}


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("word", WORDS)
def test_the_formula(tiny, word):
    """And with beta = alpha_text = 1 the method inside, by whatever text encoder it has."""
    backbone, backbone_params = tiny
    inside = build(**{"backbone": backbone, **WORDS[word]})
    frozen = inside.freeze(backbone_params)
    params = jax.jit(lambda key: inside.init(key))(jax.random.key(0))  # RTD's: another encoder
    raw = inversion.features(backbone, 4)
    ids = {
        text: backbone.tokenizer([inside.prompt(text)] * 4, length=16) for text in ("is red", "")
    }
    composed, plain = (
        jax.jit(inside.compose)(
            params, frozen, {"reference_features": raw, "token_ids": x}, jax.random.key(0)
        )
        for x in ids.values()
    )
    query = {"reference_features": raw, "token_ids": ids["is red"]}

    def ours(**settings):
        composer = build("pdv", backbone, word=WORDS[word], **settings)
        return jax.jit(composer.compose)(params, frozen, query, jax.random.key(0))

    np.testing.assert_allclose(ours(beta=1.0), composed, atol=1e-6)
    direction = np.asarray(composed) - plain
    expected = 0.3 * (unit(raw) + 1.4 * direction) + 0.7 * (plain + 0.6 * direction)
    settings = {"alpha_image": 1.4, "alpha_text": 0.6, "beta": 0.7}
    np.testing.assert_allclose(ours(**settings), unit(expected), atol=1e-5)


def test_parameters_are_those_of_the_method_inside(tiny):
    composer = build("pdv", tiny[0], word=WORDS["lincir"])
    frozen = composer.freeze(tiny[1])
    given = composer.word.init(jax.random.key(0))
    assert composer.take_over(given, frozen) is given and set(frozen) == {"backbone"}
    assert jax.tree.structure(composer.init(jax.random.key(0))) == jax.tree.structure(given)
    around_rtd = build("pdv", tiny[0], word=WORDS["rtd"])
    assert set(around_rtd.take_over(given, frozen)) == {"word", "text"}
    assert "Phi" in composer.official_format


def test_around_an_optimised_word_nothing_is_trained_and_its_phrases_are_given_away(tiny, tmp_path):
    composer = build("pdv", tiny[0], word=WORDS["searle_oti"])
    assert not composer.trained and build("pdv", tiny[0], word=WORDS["lincir"]).trained
    assert composer.write_files(tmp_path) == {"word.phrases": "phrases.json", "word.names": ""}
    assert (tmp_path / "phrases.json").is_file()


def test_mistakes_are_named(tiny):
    for settings, message in (
        ({"word": {"name": "slerp"}}, "word.name='slerp': PDV is put around a method whose query"),
        ({"word": {}}, "expected the name of a pseudo-word method"),
        ({"word": WORDS["lincir"], "beta": 1.5}, "beta=1.5; the share of the text"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("pdv", tiny[0], **settings)
