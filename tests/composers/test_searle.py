"""SEARLE's phi: its two losses, the ablations, stored words. Values are in tests/golden."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import losses, official
from cir_jax.composers.losses import cosine_loss
from cir_jax.composers.phrases import Phrases
from cir_jax.composers.searle import Searle
from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input.records import Images, Records
from tests import tiny as factory
from tests.composers import inversion

BOOK = {
    "templates": ["a photo of {}", "{}"],
    "concepts": {
        "red star": ["a photo of red star that is a red star", "red star has two red star"],
        "green circle": ["a photo of green circle that is blue"],
        "blue star": ["a photo of blue star and a circle", "it is a blue star"],
    },
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("phrases") / "book.json"
    file.write_text(json.dumps(BOOK))
    return str(file)


@pytest.fixture(scope="module")
def build(tiny, book, tmp_path_factory):
    """settings -> (composer, params, frozen)"""
    cache = tmp_path_factory.mktemp("cache")
    params = jax.jit(Searle(tiny[0], phrases=book, top_k=2).init)(jax.random.key(0))

    def make(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CIR_JAX_CACHE", str(cache))
            composer = Searle(tiny[0], **({"phrases": book, "top_k": 2} | settings))
            return composer, params, composer.freeze(tiny[1])

    return make


@pytest.fixture(scope="module")
def batch(tiny):
    words = jax.random.normal(jax.random.key(3), (inversion.ROWS, tiny[0].token_dim))
    return {"reference_features": inversion.features(tiny[0]), "pseudo_words": words}


def test_the_loss_does_not_depend_on_devices_or_parts(build, batch):
    inversion.assert_independent_of_devices_and_parts(*build(), batch)


def test_the_loss_is_the_weighted_sum(build, batch):
    composer, params, frozen = build(dropout=0.0, weight_distil=0.5, weight_gpt=0.25)
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    rows = jax.jit(composer.encode)(params, frozen, batch, rngs)
    loss, metrics = jax.jit(composer.objective)(params, rows)
    words = jax.jit(composer.words)(params, batch["reference_features"])
    distil = jax.jit(losses.nt_xent)(batch["pseudo_words"], words, 0.25)
    np.testing.assert_allclose(metrics["distil"], distil, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * distil + 0.25 * metrics["gpt"], rtol=1e-5)
    assert rows["gpt"].shape == (inversion.ROWS,) and (rows["gpt"] > 0).all()


@pytest.mark.slow
def test_phrase_features_from_the_table_are_those_computed_in_the_step(build, batch):
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    found = []
    for cached in (100, 0):
        composer, params, frozen = build(cached_phrases=cached)
        assert (frozen["phrases"].features is not None) == bool(cached)

        def loss(params, frozen, composer=composer):
            return composer.encode(params, frozen, batch, rngs)["gpt"].sum()

        found.append(jax.jit(jax.value_and_grad(loss))(params, frozen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_the_regulariser_overwrites_the_first_placeholder_alone(build, batch):
    """Of "$ has two $" the second stays, as in the release: seen in the value of the loss."""
    composer, params, frozen = build(dropout=0.0, top_k=1)
    backbone, tokenizer = frozen["backbone"], composer.backbone.tokenizer
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    rows = jax.jit(composer.encode)(params, frozen, batch, rngs)
    words = jax.jit(composer.words)(params, batch["reference_features"])
    top = np.asarray(composer.phrases.associate(frozen["phrases"], batch["reference_features"]))

    def both(phrase, concept):
        return tokenizer([phrase.replace(concept, " $ "), phrase], 16)

    names = list(BOOK["concepts"])
    texts = [[both(p, name) for p in BOOK["concepts"][name]] for name in names]
    masked = jnp.asarray([pair[0] for concept in texts for pair in concept])
    whole = jnp.asarray([pair[1] for concept in texts for pair in concept])

    @jax.jit
    def errors(word):
        word = jnp.broadcast_to(word, (len(masked), len(word)))
        target = composer.backbone.encode_text(backbone, whole)
        return cosine_loss(composer.text_features(backbone, masked, word), target)

    owner = [i for i, concept in enumerate(texts) for _ in concept]
    for row in range(inversion.ROWS):
        values = np.asarray(errors(words[row]))
        possible = [v for v, o in zip(values, owner, strict=True) if o == top[row, 0]]
        assert min(abs(np.asarray(possible) - rows["gpt"][row])) < 1e-5


@pytest.mark.parametrize("distillation", ["cosine", "none"])
def test_ablations(build, batch, tiny, distillation):
    composer, params, frozen = build(phrases="", weight_gpt=0, distillation=distillation, dropout=0)
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    rows = jax.jit(composer.encode)(params, frozen, batch, rngs)
    ids = np.repeat(tiny[0].tokenizer(["a photo of $"]), inversion.ROWS, axis=0)

    @jax.jit
    def both(params, rows):
        loss = composer.objective(params, rows)[0]
        words = composer.words(params, batch["reference_features"])
        if distillation == "cosine":
            return loss, cosine_loss(batch["pseudo_words"], words).mean()
        text = composer.text_features(frozen["backbone"], ids, words)
        return loss, losses.nt_xent(batch["reference_features"], text, 0.25)

    np.testing.assert_allclose(*both(params, rows), rtol=1e-5)


def test_nt_xent_is_its_definition():
    nt_xent = jax.jit(losses.nt_xent)
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7))
    z = np.concatenate([a, b])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    s = np.exp(z @ z.T / 0.3)
    rows = [-np.log(s[k, (k + 5) % 10] / (s[k].sum() - s[k, k])) for k in range(10)]
    np.testing.assert_allclose(nt_xent(a, b, 0.3), np.mean(rows), rtol=1e-5)
    groups = np.asarray([3, 0, 3, 1, 3])  # pairs of one group are no negatives of each other
    both, pair = np.concatenate([groups, groups]), [(k + 5) % 10 for k in range(10)]
    kept = [s[k][(both != both[k]) | (np.arange(10) == pair[k])] for k in range(10)]
    rows = [-np.log(s[k, pair[k]] / kept[k].sum()) for k in range(10)]
    np.testing.assert_allclose(nt_xent(a, b, 0.3, groups), np.mean(rows), rtol=1e-5)
    one = jax.grad(lambda x: nt_xent(x, b, 0.3, np.zeros(5, int)))(jnp.asarray(a))
    assert (one == 0).all()  # without negatives
    same = jax.grad(lambda x: nt_xent(x, x, 0.3))(jnp.asarray(a))
    assert np.isfinite(same).all()


def test_missing_words_or_phrases_are_named(build, batch):
    composer, params, frozen = build(phrases="", weight_gpt=0)
    features = {"reference_features": batch["reference_features"]}
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    with pytest.raises(ConfigError, match="needs stored words: set data.tokens"):
        jax.eval_shape(composer.encode, params, frozen, features, rngs)
    composer, params, frozen = build(phrases="")
    with pytest.raises(ConfigError, match="weight_gpt=0.75 needs phrases: set composer.phrases"):
        jax.eval_shape(composer.encode, params, frozen, batch, rngs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation": "cosin"}, "'cosin'. Did you mean 'cosine'"),
        ({"temperature": 0}, "temperature=0"),
        ({"weight_distil": -1}, "weight_distil=-1"),
        ({"top_k": 4}, "top_k=4: .* has 3 concepts"),
    ],
)
def test_mistaken_settings(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_phrases_that_the_weights_spoil_are_not_stored(tiny, book, tmp_path, monkeypatch):
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path))
    composer = Searle(tiny[0], phrases=book, top_k=2)
    message = "text features of [a-z]+: not finite, .*: number 0, number 1, .* with tiny@0: these"
    with pytest.raises(WeightsError, match=message):
        composer.freeze(jax.tree.map(lambda x: x * 1e30, tiny[1]))
    assert not list(tmp_path.rglob("chunk*"))


def test_concepts_without_phrases_are_named(build, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red star\nyellow ring\n")
    with pytest.raises(DataError, match="1 of its 2 concepts have no phrases, such as 'yellow ri"):
        build(names=str(names))


def test_rows_of_the_concept_table_count_as_often_as_they_are_listed(tiny, book, tmp_path):
    """For phi, as released: three of the four nearest rows are "blue star"; for OTI, each once."""
    names = tmp_path / "names.csv"
    listed = ["blue star", "red star", "blue star", "green circle", "blue star "]
    names.write_text("\n".join(["LabelName,DisplayName", *(f"/m/1,{name}" for name in listed)]))
    phi = Phrases.read(book, tiny[0], 4, every=True, names=names)
    oti = Phrases.read(book, tiny[0], 3, names=names)
    assert phi.names == oti.names == ["blue star", "red star", "green circle"]
    concepts = np.asarray([[1, 0], [0.5, 0.5], [0, -1]], np.float32)
    image = jnp.asarray([[2.0, 1.0]])
    top = [np.asarray(p.associate(p.tables.replace(concepts=concepts), image)) for p in (phi, oti)]
    assert top[0].tolist() == [[0, 0, 0, 1]] and top[1].tolist() == [[0, 1, 2]]
    keys = jax.random.split(jax.random.key(0), 400)
    tables = jax.tree.map(jnp.asarray, phi.tables)
    drawn = phi.draw_concept_first(tables, jnp.tile(top[0], (400, 1)), keys)
    of_blue = np.asarray(drawn) < phi.tables.count[0]  # its phrases come first
    assert abs(of_blue.mean() - 0.75) < 0.06
    with pytest.raises(ConfigError, match="top_k=6: .* has 5 concepts"):
        Phrases.read(book, tiny[0], 6, every=True, names=names)
    searle = Searle(tiny[0], phrases=book, names=str(names), top_k=4)
    assert searle.contents() == {"phrases": phi.book.identity}
    names.write_text(names.read_text() + "\n/m/1,blue star")  # as often once more
    assert Searle(tiny[0], phrases=book, names=str(names), top_k=4).contents() != searle.contents()


def test_images_without_a_word_are_left_out():
    words = np.ones((4, 3), np.float32)
    words[1] = np.nan
    table = factory.caption_table(4)
    source = Records(table, (), None, columns={"pseudo_words": words})
    example = Images("features").random_map(source[1] | {"image": words[0]}, None)
    assert source[1]["id"] == 2 and source.corrupt == {1}
    np.testing.assert_array_equal(example["pseudo_words"], np.ones(3))


def test_official_files_come_back(build, tmp_path):
    torch = pytest.importorskip("torch")
    composer, params, frozen = build(phrases="", weight_gpt=0)
    file = tmp_path / "SEARLE_tiny.pt"
    official.save(composer, file, params, frozen)
    stored = torch.load(file, weights_only=True)
    again = official.load(composer, file, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    stored["Phi"].pop("layers.6.bias")
    torch.save(stored, file)
    with pytest.raises(WeightsError, match=r"Missing tensors \(1\): layers.6.bias"):
        official.load(composer, file, frozen)
