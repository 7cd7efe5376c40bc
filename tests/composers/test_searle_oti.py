"""SEARLE-OTI and the phrase regulariser; the numbers of the released code: tests/golden."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import composers
from cir_jax.composers import searle_oti
from cir_jax.composers.phrases import Phrases
from cir_jax.composers.searle_oti import SearleOti
from cir_jax.composers.suffixes import Split, Suffixes
from cir_jax.errors import ConfigError, DataError, MeshError
from cir_jax.evaluation import evaluate, protocols
from cir_jax.input.phrases import PhraseBook
from cir_jax.retrieval.features import image_features, unit
from cir_jax.sharding import placement
from cir_jax.weights import oti_tokens
from data.shapes.phrases import phrase_book as shapes_phrases
from tests.evaluation import worlds
from tests.tiny import backbone as tiny_backbone

BOOK = {
    "templates": ["a photo of {}", "{} that is red", "make it {}"],
    "concepts": {
        "red star": ["a photo of red star that is blue", "a photo of red star"],
        "circle": ["a photo of circle that has no star and two circle", "two circle", "circle"],
        "blue": ["a blue photo of a green circle that is red and has no star"],
        "green circle": ["make it red"],  # does not contain its concept
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def book_file(tmp_path):
    file = tmp_path / "phrases.json"
    file.write_text(json.dumps(BOOK))
    return str(file)


@pytest.fixture
def make(tiny, book_file):
    """(composer, frozen) with settings; three iterations."""

    def build(**settings):
        settings = {"phrases": book_file, "top_k": 3, "iterations": 3} | settings
        composer = composers.build("searle_oti", tiny[0], **settings)
        return composer, jax.tree.map(jnp.asarray, composer.freeze(tiny[1]))

    return build


def query(n=5, seed=0):
    features = np.random.default_rng(seed).standard_normal((n, 24), np.float32)
    return {"reference_features": jnp.asarray(features), "query_index": jnp.arange(n)}


def invert(composer, frozen, rows):
    return np.asarray(jax.jit(composer.invert)({}, frozen, rows, jax.random.key(3)))


def test_the_tables_of_a_book(make, tiny, capsys):
    composer, frozen = make()
    phrases, tables = composer.phrases, composer.phrases.tables
    assert phrases.names == ["red star", "circle", "blue", "green circle"]
    assert tables.count.tolist() == [2, 3, 1, 0] and tables.first.tolist() == [0, 2, 5, 6]
    assert phrases.dropped == 1
    assert "1 concepts discarded" in capsys.readouterr().out
    placeholder = tiny[0].tokenizer.id_of("$")
    beginnings = tables.replaced.prefixes, tables.replaced.prefix_lengths
    beginnings = {tuple(map(int, ids[:n])) for ids, n in zip(*beginnings, strict=True)}
    start = [int(x) for x in tiny[0].tokenizer(["a photo of $"])[0][:4]]
    assert beginnings == {(), (1,), tuple(start), (1, start[1]), (1, 20)}  # 20: two
    assert (tables.replaced.ids[:, 0] == placeholder).all()
    # the second circle of a phrase stays in OTI, and becomes a placeholder for phi
    assert (tables.replaced.ids == placeholder).sum() == 6
    book = PhraseBook(tuple(BOOK["templates"]), {k: tuple(v) for k, v in BOOK["concepts"].items()})
    every = Phrases.tokenise(book, tiny[0], 3, every=True).tables.replaced.ids
    assert (every == placeholder).sum() == 7
    norms = np.linalg.norm(frozen["phrases"].concepts, axis=1)
    assert frozen["phrases"].concepts.shape == (4, 24) and np.allclose(norms, 1)
    with pytest.raises(MeshError, match="/phrases/original/ids;"):  # rules see the fields' names
        placement.parameter_shardings(worlds.mesh(1), {"phrases": frozen["phrases"]}, ())


def test_concept_features_are_the_mean_over_the_templates(make, tiny):
    _, frozen = make()
    model, params = tiny
    ids = model.tokenizer([text.format("circle") for text in BOOK["templates"]])
    features = np.asarray(jax.jit(model.encode_text)(params, ids))
    mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(frozen["phrases"].concepts[1], expected, atol=1e-5)
    top = make()[0].phrases.associate(frozen["phrases"], 7 * jnp.asarray(expected)[None])
    assert top[0, 0] == 1 and top.shape == (1, 3)


def test_shapes_alone_encode_nothing(make, tiny, tmp_path):
    composer, frozen = make()
    cache = tmp_path / "cache"
    stored = sorted(cache.rglob("*"))
    for file in stored:
        if file.is_file():
            file.unlink()
    shapes = composer.freeze(tiny[1], shapes_only=True)
    assert stored and not any(path.is_file() for path in cache.rglob("*"))
    assert not shapes["phrases"].features.any() and not shapes["phrases"].concepts.any()
    of = functools.partial(jax.tree.map, lambda x: (jnp.shape(x), jnp.asarray(x).dtype))
    assert of(shapes) == of(frozen)


def test_texts_from_the_placeholder_on_have_the_features_of_whole_ones(tiny):
    composer, (model, params) = tiny_composer(tiny), tiny
    params = jax.tree.map(jnp.asarray, params)
    texts = ["a photo of $ that is red and has no star", "$", "make it $ and $", "a photo of $"]
    ids = model.tokenizer(texts, 16)  # the whole context
    split = Split.of(ids, composer.placeholder_id, model.tokenizer.eos_id)
    words = jax.random.normal(jax.random.key(0), (len(texts), model.token_dim))
    reader, length = Suffixes(composer, params, split), int(split.lengths.max())
    assert length == 9 and len(split.prefixes) == 4

    @jax.jit
    def cut(words):
        return reader.features(jnp.arange(len(texts)), words, length)

    @jax.jit
    def whole(words):
        return composer.text_features(params, jnp.asarray(ids), words)

    np.testing.assert_allclose(
        cut(words), whole(words), atol=1e-5 * float(jnp.abs(whole(words)).max())
    )
    gradients = [
        jax.jit(jax.grad(lambda w, f=f: jnp.sum(jnp.sin(f(w)))))(words) for f in (cut, whole)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-5 * float(jnp.abs(gradients[1]).max()))
    with_past = np.asarray(split.prefix) > 0
    assert with_past.tolist() == [True, True, True, True]  # "$" begins with the start token
    whole_texts = Split.of(ids, composer.placeholder_id, model.tokenizer.eos_id, causal=False)
    np.testing.assert_array_equal(whole_texts.ids, ids)
    assert not whole_texts.prefix.any()
    # texts without a word: cut where they begin alike, whole where they do not
    others = ["a photo of green things that are red", "a star", "made $ and $", "a photo of"]
    ids = model.tokenizer(others, 16)
    alike = split.like(ids, model.tokenizer.eos_id)
    assert [bool(row) for row in alike.prefix] == [True, True, False, True]
    assert alike.lengths.tolist() == [6, 3, 6, 1]
    longest = int(alike.lengths.max())
    found = jax.jit(lambda: reader.without_words(alike, jnp.arange(4), longest))()
    expected = jax.jit(model.encode_text)(params, jnp.asarray(ids))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def tiny_composer(tiny):
    from cir_jax.composers.pseudo_word import PseudoWord

    return PseudoWord(tiny[0])


def test_the_scan_is_the_plain_loop_over_whole_texts(make):
    composer, frozen = make()
    rows = query()
    features = rows["reference_features"]
    top = composer.phrases.associate(frozen["phrases"], features)
    rngs = jax.random.split(jax.random.key(1), len(features))
    words = composer.initial_words(rngs)
    state, losses = jax.jit(composer.optimise)(frozen, words, features, top, rngs)
    tokenizer = composer.backbone.tokenizer
    templates = jnp.asarray(tokenizer([t.format(" $ ") for t in BOOK["templates"]], 16))
    pairs = [(p, c) for c, ps in BOOK["concepts"].items() for p in ps if c in p]
    masked = jnp.asarray(tokenizer([p.replace(c, " $ ", 1) for p, c in pairs], 16))
    plain = jnp.asarray(tokenizer([p for p, _ in pairs], 16))

    @jax.jit
    def step(ours, i):
        text = functools.partial(composer.text_features, frozen["backbone"])
        which, phrase = composer.draw(frozen["phrases"], top, rngs, i)
        target = composer.backbone.encode_text(frozen["backbone"], plain[phrase])
        template, replaced = (
            functools.partial(text, t) for t in (templates[which], masked[phrase])
        )
        ours, found, _ = searle_oti.update(
            composer.recipe,
            ours,
            searle_oti.image_term(composer.recipe, ours.words, template, features),
            searle_oti.phrase_term(composer.recipe, ours.words, replaced, target),
        )
        return ours, found

    ours = searle_oti.start(composer.recipe, words)
    for i in range(3):
        ours, found = step(ours, i)
        np.testing.assert_allclose(losses.total[i], found.total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.average, ours.average, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(state.words) - ours.average).max() > 1e-3


def test_alone_an_image_gets_the_word_it_gets_in_a_batch(make):
    composer, frozen = make(starts=2)
    rows = query()
    together = invert(composer, frozen, rows)
    for i in (0, 3):
        one = {name: values[i : i + 1] for name, values in rows.items()}
        alone = invert(composer, frozen, one)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-5)
    moved = rows | {"query_index": rows["query_index"] + 1}  # another key, other texts
    assert np.abs(invert(composer, frozen, moved) - together).max() > 1e-3


def test_of_several_starts_the_word_of_the_lowest_last_losses_is_kept(make, monkeypatch):
    monkeypatch.setattr(searle_oti, "COMPARED", 2)
    composer, frozen = make(starts=3, iterations=6, learning_rate=0.5)
    rows = query()
    features = rows["reference_features"]
    kept = invert(composer, frozen, rows)
    top = composer.phrases.associate(frozen["phrases"], features)
    rngs = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(rows["query_index"])
    begins = composer.initial_words(rngs).reshape(len(features), 3, -1)
    run = jax.jit(make(iterations=6, learning_rate=0.5)[0].optimise)
    each = [run(frozen, begins[:, i], features, top, rngs) for i in range(3)]
    losses = np.stack([found.total[-2:].mean(axis=0) for _, found in each])
    everything = np.stack([found.total.mean(axis=0) for _, found in each])
    words = np.stack([state.average for state, _ in each])
    best = losses.argmin(axis=0)
    assert len(set(best.tolist())) > 1 and (best != everything.argmin(axis=0)).any()
    np.testing.assert_allclose(kept, words[best, np.arange(len(kept))], rtol=1e-4, atol=1e-5)


def test_a_start_that_diverges_is_not_kept(make, monkeypatch):
    composer, frozen = make(starts=2)
    initial = composer.initial_words

    def first_diverges(rngs):
        return initial(rngs).at[::2].set(jnp.nan)

    monkeypatch.setattr(composer, "initial_words", first_diverges)
    assert np.isfinite(invert(composer, frozen, query())).all()


def test_the_learning_rate_ends_at_zero_on_a_cosine(make):
    recipes = [make(schedule=name, iterations=4)[0].recipe for name in ("constant", "cosine")]
    word, gradient = jnp.ones((1, 3)), jnp.asarray([[1.0, -1.0, 2.0]])
    steps = []
    for recipe in recipes:
        state = recipe.optimizer.init(word)
        moves = []
        for _ in range(5):
            update, state = recipe.optimizer.update(gradient, state, word)
            moves.append(float(jnp.abs(update[0, 1])))
        steps.append(moves)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4))
    np.testing.assert_allclose(steps[1], np.asarray(steps[0]) * cosine, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_phrase_features_from_the_table_are_those_computed_in_the_iteration(make):
    cached, computed = (invert(*make(cached_phrases=n), query()) for n in (100, 0))
    np.testing.assert_allclose(cached, computed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_long_phrases_take_another_branch_to_the_same_result(make):
    composer, frozen = make(cached_phrases=0)
    expected = invert(composer, frozen, query())
    tables = composer.phrases.tables
    longest = tables.original.ids.shape[1], tables.replaced.ids.shape[1]
    for usual in ((8, 4), (longest[0] - 1, longest[1] - 1)):
        composer.phrases = dataclasses.replace(composer.phrases, usual=usual)
        got = invert(composer, frozen, query())
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_it_lowers_its_own_loss(make):
    composer, frozen = make(iterations=60, regulariser="none")
    rows = query()
    features = rows["reference_features"]
    top = composer.phrases.associate(frozen["phrases"], features)
    rngs = jax.random.split(jax.random.key(0), len(features))
    words = composer.initial_words(rngs)
    losses = np.asarray(jax.jit(composer.optimise)(frozen, words, features, top, rngs)[1].total)
    assert (losses[-10:].mean(axis=0) < losses[:3].mean(axis=0) - 0.02).all()


@pytest.mark.slow
def test_the_ablations_of_table_4(make):
    words = {
        name: invert(*make(**settings), query())
        for name, settings in {
            "searle": {},
            "l2": {"image_loss": "l2"},
            "concept": {"regulariser": "concept"},
            "random": {"regulariser": "random"},
            "none": {"regulariser": "none"},
            "weight 0": {"weight_gpt": 0.0},
        }.items()
    }
    np.testing.assert_allclose(words["none"], words["weight 0"], rtol=1e-4, atol=1e-5)
    different = [words[name] for name in ("searle", "l2", "concept", "random", "none")]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(one - other).max() > 1e-4
    composer, _ = make(regulariser="concept")
    assert composer.phrases.book.concepts["circle"] == ("a photo of circle",)


def test_draws_are_uniform(make):
    composer, frozen = make()
    tables, top = frozen["phrases"], jnp.tile(jnp.asarray([[0, 3, 1]]), (4000, 1))
    rngs = jax.random.split(jax.random.key(0), len(top))
    rows = np.asarray(composer.phrases.draw(tables, top, rngs))
    assert np.allclose(np.bincount(rows, minlength=6) / 4000, [0.2] * 5 + [0], atol=0.03)
    rows = np.asarray(composer.phrases.draw_concept_first(tables, top, rngs))
    expected = [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6, 0]  # the discarded concept 3 is passed over
    assert np.allclose(np.bincount(rows, minlength=6) / 4000, expected, atol=0.03)
    rows = np.asarray(composer.phrases.draw_any(tables, top, rngs))
    assert np.allclose(np.bincount(rows, minlength=6) / 4000, [1 / 6] * 6, atol=0.03)


def test_an_image_without_a_usable_concept_takes_the_nearest_one_with_phrases(make):
    composer, frozen = make(top_k=1)
    tables = frozen["phrases"]
    features = 5 * tables.concepts[jnp.asarray([3, 0])]  # all phrases of 3 are discarded
    nearest = int(jnp.argsort(-(tables.concepts @ features[0]))[1])
    top = composer.phrases.associate(tables, features)
    assert nearest != 3 and top.tolist() == [[nearest], [0]]
    # with a usable one among the top two, the discarded one keeps its place
    two = make(top_k=2)[0].phrases.associate(tables, features)
    assert two[0].tolist() == [3, nearest]
    draws = (composer.phrases.draw, composer.phrases.draw_concept_first)
    for draw in draws:
        rows = draw(tables, top, jax.random.split(jax.random.key(0), 2))
        first, count = (of[top[:, 0]] for of in (tables.first, tables.count))
        assert (rows >= first).all() and (rows < first + count).all()
    words = invert(composer, frozen, query(2) | {"reference_features": features})
    assert np.isfinite(words).all()


def test_stored_words_answer_a_benchmark_by_the_names_of_its_images(tiny, tmp_path):
    pytest.importorskip("torch")
    benchmark = worlds.benchmark(protocols.FASHIONIQ)
    for record in benchmark.gallery:
        record["name"] = f"image {record['id']}".encode()
    rng = np.random.default_rng(0)
    words = rng.standard_normal((45, 32), np.float32)
    order = rng.permutation(45)
    names = [f"image {i}" for i in order]
    oti_tokens.write(tmp_path / "words", names, words[order], {})
    composer = composers.build("searle_oti", tiny[0], phrases="nowhere", words=tmp_path / "words")
    frozen = composer.freeze(tiny[1])
    seen = []
    invert = composer.invert
    composer.invert = lambda p, f, q, r: seen.append(q["word_row"].shape) or invert(p, f, q, r)
    result = evaluate.evaluate(composer, {}, frozen, benchmark, mesh=worlds.mesh(4), batch_size=8)
    assert seen == [(8,)]
    # by hand: both orders of the captions, each normalised
    first = benchmark.queries[0]
    texts = protocols.FASHIONIQ.join(first.texts, "x")
    ids = tiny[0].tokenizer([composer.prompt(text) for text in texts])
    both = composer.text_features(tiny[1], ids, np.stack([words[first.reference]] * 2))
    composed = unit(unit(np.asarray(both)).mean(axis=0))
    gallery = image_features(tiny[0], tiny[1], benchmark.gallery, mesh=worlds.mesh(1))
    np.testing.assert_allclose(
        result.scores[0][:3], unit(gallery)[result.top[0][:3]] @ composed, rtol=1e-4
    )
    benchmark.gallery[first.reference]["name"] = b"another"
    with pytest.raises(DataError, match="1 of the benchmark's reference .* such as 'another'"):
        evaluate.evaluate(composer, {}, frozen, benchmark, mesh=worlds.mesh(4), batch_size=8)
    with pytest.raises(ConfigError, match="Set words='' to invert images"):
        jax.eval_shape(invert, {}, frozen, query(), jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations=0; it must be 1 or more"),
        ({"starts": 0}, "starts=0; it must be 1 or more"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"top_k": 5}, r"top_k=5: .* has 4 concepts"),
        ({"top_k": 0}, "must be in 1..4"),
        ({"image_loss": "cosin"}, "Did you mean 'cosine'"),
        ({"regulariser": "phrase"}, "Did you mean 'phrases'"),
        ({"ema": 1.0}, r"in \[0, 1\)"),
        ({"weight_cos": 0.0, "weight_gpt": 0.0}, "nor both 0"),
        ({"weight_gpt": -1.0}, "neither may be negative"),
    ],
)
def test_settings_that_cannot_work(tiny, book_file, settings, message):
    with pytest.raises(ConfigError, match=message):
        SearleOti(tiny[0], **({"phrases": book_file, "top_k": 2} | settings))


def test_books_that_cannot_work(tiny, tmp_path):
    nothing, cut = tmp_path / "nothing.json", tmp_path / "cut.json"
    nothing.write_text(json.dumps({"concepts": {"star": ["a circle"]}}))
    with pytest.raises(DataError, match="no concept is left"):
        SearleOti(tiny[0], str(nothing), top_k=1)
    late = "red " * 15 + "star"
    cut.write_text(json.dumps({"concepts": {"star": [late], "red": ["red"]}}))
    phrases = Phrases.read(str(cut), tiny[0], 1)
    assert phrases.cut == 1 and phrases.tables.count.tolist() == [0, 1]
    names = tmp_path / "names.csv"
    names.write_text("LabelName,DisplayName\n/m/1, red \n/m/2,boat\n")
    with pytest.raises(DataError, match="1 of its 2 concepts have no phrases, such as 'boat'"):
        Phrases.read(str(cut), tiny[0], 1, names=str(names))


def test_the_embedded_worlds_phrases_are_in_its_vocabulary_and_as_committed():
    from cir_jax import weights
    from cir_jax.input import phrases as files

    model, _ = weights.load_architecture("data/shapes/clip", jnp.float32), None
    book = files.read("data/shapes/phrases.json")
    made = shapes_phrases()
    assert (book.templates, dict(book.concepts)) == (made.templates, made.concepts)
    assert not book.discarded
    unknown = model.tokenizer._tokenizer.token_to_id("<unk>")
    texts = [phrase for phrases in book.concepts.values() for phrase in phrases]
    texts += [template.format(" $ ") for template in book.templates]
    assert not (model.tokenizer(texts) == unknown).any()
    assert (model.tokenizer(["zebra"]) == unknown).any()


@pytest.mark.slow
def test_mixed_precision_keeps_words_and_concepts_in_float32(book_file):
    model, params = tiny_backbone()
    words, concepts = {}, {}
    for name in ("float32", "bfloat16"):
        composer = SearleOti(model.with_dtype(name), book_file, top_k=3, iterations=3)
        frozen = composer.freeze(params)
        concepts[name] = frozen["phrases"].concepts
        words[name] = invert(composer, jax.tree.map(jnp.asarray, frozen), query())
    np.testing.assert_array_equal(concepts["bfloat16"], concepts["float32"])
    assert words["bfloat16"].dtype == np.float32
    difference = np.abs(words["bfloat16"] - words["float32"])
    assert 0 < difference.mean() < 0.02
