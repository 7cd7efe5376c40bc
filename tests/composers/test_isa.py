"""ISA: its equations, its losses, what a step leaves. No code was released to compare with."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from PIL import Image

from cir_jax import composers
from cir_jax.composers import base, isa, matching
from cir_jax.composers.isa import Isa, TokenLearner
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation import attention_maps
from cir_jax.models import light
from cir_jax.retrieval.search import Searcher, find
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training.step import init_state, train_step
from tests.composers import inversion
from tests.tiny import drawn

SIZES = {"tokens": 3, "width": 8, "hidden": (6, 10)}
LIGHT = {"query_encoder": "shapes", "pretrained": False, **SIZES}
TOWER = {"query_encoder": "", **SIZES}


def pictures(rows=4, seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 255, (rows, size, size, 3), np.uint8)


@functools.cache
def compiled(function):
    return jax.jit(function)


@pytest.fixture(scope="module")
def made(tiny_blip):
    composer = Isa(tiny_blip[0], **LIGHT)
    frozen = composer.freeze(tiny_blip[1])
    return composer, drawn(composer.init), frozen


@pytest.fixture(scope="module")
def symmetric(tiny_blip):
    composer = Isa(tiny_blip[0], **TOWER)
    frozen = composer.freeze(tiny_blip[1])
    return composer, drawn(composer.init), frozen


@pytest.fixture(scope="module")
def batch():
    return {"reference_images": pictures(8), "target_images": pictures(8, seed=1)}


def transcribed(params, f, width, parts, axis):
    """Equations (1) to (4) for one image, token by token; axis 0 = over tokens, 1 = over keys."""
    erf = np.vectorize(math.erf)

    def dense(x, p):
        return x @ np.float64(p["kernel"]) + np.float64(p.get("bias", 0))

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def attention(p, x, context):
        query, key = dense(x, p["query"]), dense(context, p["key"])
        logits = np.array([[q @ k / np.sqrt(len(q)) for k in key] for q in query])
        return scipy.special.softmax(logits, axis=axis) @ dense(context, p["value"])

    f = np.float64(f)
    f = dense(f, params["reduce"]) if width else f
    a = np.array([scipy.special.softmax(dense(pixel, params["groups"])) for pixel in f])
    z = np.array([(a[:, t, None] * f).sum(0) / a[:, t].sum() for t in range(a.shape[1])])
    if "self" in parts:
        z = z + attention(params["self"], z, z)
        z = z + dense(gelu(dense(z, params["refine1"])), params["refine2"])
    if "cross" in parts:
        z = z + attention(params["cross"], z, f)
        z = z + dense(gelu(dense(z, params["select1"])), params["select2"])
    return dense(z, params["out"]), a.T


@pytest.mark.parametrize(
    ("width", "parts", "softmax"),
    [
        (8, ("self", "cross"), "keys"),
        (0, ("self", "cross"), "tokens"),
        (8, ("self",), "keys"),
        (8, ("cross",), "tokens"),
        (8, (), "keys"),
    ],
)
def test_the_token_learner_is_the_equations(width, parts, softmax):
    learner = TokenLearner(3, 5, width, (6, 10), "self" in parts, "cross" in parts, softmax)
    rng = np.random.default_rng(0)
    maps = np.float32(rng.standard_normal((2, 9, 7)))
    shapes = jax.eval_shape(learner.init, jax.random.key(0), maps)["params"]
    params = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape) / 2), shapes)
    words, seen = jax.jit(learner.apply)({"params": params}, maps)
    for i, f in enumerate(maps):
        expected, groups = transcribed(params, f, width, parts, {"keys": 1, "tokens": 0}[softmax])
        np.testing.assert_allclose(words[i], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen["groups"][i], groups, rtol=1e-4)
    assert ("cross" in seen) == ("cross" in parts)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("efficientnet_b0", 5.3),
        ("efficientvit_m2", 5.0),
        ("mobilenetv2_100", 3.5),
        ("mobilevitv2_100", 5.5),
        ("efficientnet_b2", None),  # printed 8.5, here 9.0
    ],
)
def test_parameters_are_those_of_table_1(name, printed):
    model = light.create(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    encoder = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    maps = jax.ShapeDtypeStruct((1, 49, model.config.num_features), jnp.float32)
    learner = jax.eval_shape(TokenLearner(6, 768).init, jax.random.key(0), maps)["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves((encoder, learner)))
    assert f"{count / 1e6:.1f}" == f"{printed or 9.0}"


def test_a_sentence_stands_where_its_words_would(made):
    """U of the embeddings of words gives the feature of the text with these words."""
    composer, _, frozen = made
    backbone = frozen["backbone"]
    tokenizer = composer.backbone.tokenizer
    assert composer.prompt("is red") == "a photo of $ $ $ that is red"
    assert composer.prompt("") == "a photo of $ $ $"
    inside = tokenizer(["two green star"])[0, 1:4]
    prompts = tokenizer([composer.prompt("is red")])
    plain = tokenizer(["a photo of two green star that is red"])

    @jax.jit
    def both(backbone):
        words = composer.backbone.embed_tokens(backbone, inside[None])
        ours = composer.text_features(backbone, prompts, words)
        return ours, composer.backbone.encode_text(backbone, plain)

    np.testing.assert_allclose(*both(backbone), atol=1e-5)


def test_the_loss_is_distillation_and_matching(made, batch, monkeypatch):
    composer, params, frozen = made
    backbone = composer.backbone
    every, wrong = np.arange(8), np.array([3, 0, 1, 7, 2, 4, 5, 6])  # instead of what is drawn
    pairs = ((every, every, 1), (every, wrong, 0), (wrong, every, 0))
    ids = np.repeat(backbone.tokenizer([composer.prompt("")]), 8, axis=0)

    @jax.jit
    def run(params, frozen, batch):
        """The loss, and what it is made of."""
        given, towers = [], frozen["backbone"]
        monkeypatch.setattr(matching, "wrong_ones", lambda scores, _: given.append(scores) or wrong)
        loss, metrics = composer.loss(params, frozen, batch, jax.random.key(3))
        variables = {"params": params["encoder"], "batch_stats": params["statistics"]}
        maps, statistics = composer.encoder.train_feature_map(variables, batch["reference_images"])
        words, _ = composer.sentence(params, maps.reshape(8, -1, composer.encoder.dim))
        text = composer.text_features(towers, ids, words)
        image = backbone.encode_image(towers, batch["target_images"])
        tokens = backbone.visual_tokens(towers, batch["target_images"])
        sentence = composer.embed_words(towers, ids, words)
        found = [
            backbone.match(towers, ids, tokens[images], sentence[texts])
            for texts, images, _ in pairs
        ]
        return loss, metrics, given, statistics, text, image, found

    loss, metrics, given, statistics, text, image, found = run(params, frozen, batch)
    text, image = np.float64(text), np.float64(image)
    cosine = [[t @ v / np.linalg.norm(t) / np.linalg.norm(v) for v in image] for t in text]
    logits = np.array(cosine) / 0.07
    expected = -np.mean(
        [scipy.special.log_softmax(way, axis=1).diagonal() for way in (logits, logits.T)]
    )
    np.testing.assert_allclose(metrics["global"], expected, rtol=1e-4)
    np.testing.assert_allclose(given[0], logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(given[1], logits.T, rtol=1e-3, atol=1e-3)
    answers = [
        scipy.special.log_softmax(np.float64(side), axis=1)[:, label]
        for side, (_, _, label) in zip(found, pairs, strict=True)
    ]
    np.testing.assert_allclose(metrics["local"], -np.mean(answers), rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["global"] + metrics["local"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        metrics["statistics"],
        statistics,
    )


def test_weights_and_negatives_are_heeded(tiny_blip, symmetric, batch, monkeypatch):
    one = Isa(tiny_blip[0], **TOWER, local_weight=0.0, global_weight=2.0)
    random = Isa(tiny_blip[0], **TOWER, negatives="random")

    @jax.jit
    def run(params, frozen, batch):
        given = []
        monkeypatch.setattr(
            matching, "wrong_ones", lambda scores, _: given.append(scores) or np.arange(8)[::-1]
        )
        both = random.loss(params, frozen, batch, jax.random.key(0))[1]
        return both, one.loss(params, frozen, batch, jax.random.key(0)), given

    both, (loss, metrics), given = run(*symmetric[1:], batch)
    assert "local" not in metrics
    np.testing.assert_allclose(loss, 2 * both["global"], rtol=1e-6)
    assert len(given) == 2 and not np.any(given)


def test_a_step_leaves_the_running_statistics(tiny_blip, made, batch):
    """As PyTorch's: not the optimizer's, and with what was seen in this batch."""
    _, params, frozen = made
    composer = Isa(tiny_blip[0], **LIGHT, local_weight=0.0)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3))
    state = init_state(composer, optimizer, seed=0, ema=False, params=params)
    step = functools.partial(
        train_step,
        mesh=make_mesh({"data": 1}, jax.devices()[:1]),
        composer=composer,
        optimizer=optimizer,
        ema_decay=0.0,
        microbatches=1,
    )
    after, metrics = jax.device_get(jax.jit(step)(state, frozen, batch))
    assert all(np.ndim(x) == 0 for x in metrics.values())
    variables = {"params": params["encoder"], "batch_stats": params["statistics"]}
    images = batch["reference_images"]
    _, expected = jax.jit(composer.encoder.train_feature_map)(variables, images)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after.params["statistics"],
        expected,
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, params)
    assert min(jax.tree.leaves(moved["encoder"])) > 0
    # queries are seen by the running ones, one like many
    query = {"reference_images": images}
    several = compiled(composer.invert)(after.params, frozen, query, rng=jax.random.key(0))
    first = {"reference_images": images[:1]}
    alone = compiled(composer.invert)(after.params, frozen, first, rng=jax.random.key(0))
    np.testing.assert_allclose(several[:1], alone, atol=1e-5)


def test_stored_views_are_what_the_tower_sees(symmetric, batch):
    composer, params, frozen = symmetric
    images, towers = batch["target_images"], frozen["backbone"]
    stored = {
        "reference_images": batch["reference_images"],
        "target_features": compiled(composer.backbone.encode_image)(towers, images),
        "target_tokens": compiled(composer.backbone.visual_tokens)(towers, images),
    }

    @jax.jit
    def losses(*batches):
        rng = jax.random.key(1)
        return [composer.loss(params, frozen, batch, rng)[0] for batch in batches]

    np.testing.assert_allclose(*losses(stored, batch), rtol=1e-5)


def test_symmetric_is_independent_of_devices_and_parts(symmetric):
    composer, params, frozen = symmetric
    batch = {
        "reference_images": pictures(inversion.ROWS),
        "target_images": pictures(inversion.ROWS, seed=1),
    }
    inversion.assert_independent_of_devices_and_parts(composer, params, frozen, batch, 2e-4)


@pytest.mark.slow
def test_a_light_encoder_is_trained_on_many_devices(tiny_blip, made):
    """Its batch norms see the global batch; the parts of one would be batches of their own."""
    _, params, frozen = made
    composer = Isa(tiny_blip[0], **LIGHT, local_weight=0.0)  # with matching: the test above
    batch = {
        "reference_images": pictures(inversion.ROWS),
        "target_images": pictures(inversion.ROWS, seed=1),
    }
    expected = inversion.loss_and_gradient(composer, params, frozen, batch)
    sharded = inversion.on_devices(composer, params, frozen, batch)
    inversion.assert_same(sharded, expected, 1e-3)


def test_a_trained_tower_begins_as_the_backbones_and_the_gallery_keeps_it(tiny_blip, batch):
    plain = Isa(tiny_blip[0], **TOWER)
    composer = Isa(tiny_blip[0], **TOWER, train_tower=True)
    frozen = composer.freeze(tiny_blip[1])
    params = jax.jit(composer.start)(jax.random.key(0), frozen)
    query = {"reference_images": batch["reference_images"]}
    jax.tree.map(
        np.testing.assert_array_equal, params["vision"], {"vision": tiny_blip[1]["vision"]}
    )
    invert = compiled(composer.invert)
    same = compiled(plain.invert)(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(invert(params, frozen, query, jax.random.key(0)), same, atol=1e-6)
    moved = params | {"vision": jax.tree.map(lambda x: x + 0.1, params["vision"])}
    assert np.abs(invert(moved, frozen, query, jax.random.key(0)) - same).max() > 1e-3
    embed = compiled(composer.embed_gallery)
    gallery = [embed(each, frozen, batch["target_images"]) for each in (params, moved)]
    np.testing.assert_array_equal(*gallery)


def test_attention_lies_on_the_image(made, symmetric):
    images = pictures(2)
    maps = compiled(made[0].attention)(*made[1:], images)
    assert {name: x.shape for name, x in maps.items()} == dict.fromkeys(
        ("groups", "cross"), (2, 3, 2, 2)
    )
    np.testing.assert_allclose(maps["groups"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(maps["cross"].sum(axis=(2, 3)), 1, rtol=1e-5)
    # the tower's tokens without the class, row by row
    composer, params, frozen = symmetric

    @jax.jit
    def both(params, frozen):
        tokens = composer.backbone.visual_tokens(frozen["backbone"], images)[:, 1:]
        return composer.attention(params, frozen, images), composer.sentence(params, tokens)[1]

    found, seen = (maps["cross"] for maps in both(params, frozen))
    np.testing.assert_allclose(found, seen.reshape(2, 3, 2, 2), atol=1e-6)


def test_search_sees_the_reference_itself(made, tmp_path):
    composer, params, frozen = made
    (tmp_path / "images").mkdir()
    shown = pictures(3)
    for i, pixels in enumerate(shown):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    search = Searcher(composer, params, frozen, mesh=make_mesh({"data": 1}, jax.devices()[:1]))
    search.index(tmp_path / "images")
    found = {path.name: score for path, score in search.search(shown[1], "is red", k=3)}
    ids = composer.backbone.tokenizer([composer.prompt("is red")])
    query = {"reference_images": shown[1:2], "token_ids": ids}
    composed = compiled(composer.compose)(params, frozen, query, jax.random.key(0))
    gallery = compiled(composer.embed_gallery)(params, frozen, shown)
    for i, score in enumerate((composed @ gallery.T)[0]):
        np.testing.assert_allclose(found[f"{i}.png"], score, atol=1e-5)


def test_pdv_is_put_around_it(made, batch):
    composer, params, frozen = made
    word = {"name": "isa", **LIGHT}
    pdv = composers.build("pdv", composer.backbone, word=word, alpha_image=0.5, beta=0.4)
    assert pdv.reads_images
    tokenizer = composer.backbone.tokenizer
    query = {"reference_images": batch["reference_images"]}
    texts = [np.repeat(tokenizer([composer.prompt(text)]), 8, axis=0) for text in ("is red", "")]

    @jax.jit
    def parts(params, frozen):
        words = composer.invert(params, frozen, query, jax.random.key(0))
        unit = [base.normalise(composer.text_features(frozen["backbone"], t, words)) for t in texts]
        image = composer.backbone.encode_image(frozen["backbone"], query["reference_images"])
        return *unit, base.normalise(image)

    red, plain, image = parts(params, frozen)
    d = red - plain
    expected = base.normalise(0.6 * (image + 0.5 * d) + 0.4 * (plain + d))
    query["token_ids"] = np.repeat(tokenizer([pdv.prompt("is red")]), 8, axis=0)
    found = jax.jit(pdv.compose)(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_is_drawn_and_exported(made, tiny, tmp_path):
    composer, params, frozen = made
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(pictures(2, size=40)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    search = Searcher(composer, params, frozen, mesh=mesh)
    paths = find(folder)
    drawn, numbers = attention_maps.write(search, paths, tmp_path / "out")
    found = np.load(numbers)
    seen = np.stack([composer.backbone.image_transform(Image.open(path)) for path in paths])
    for name, expected in compiled(composer.attention)(params, frozen, seen).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    assert [Path(name).name for name in found["names"]] == ["0.png", "1.png"]
    # a row of each kind for each image: the image as it is seen, then its tokens
    picture = np.asarray(Image.open(drawn), np.int32)
    tile, left, top = attention_maps.TILE, attention_maps.MARGIN, attention_maps.MARGIN
    shown = Image.fromarray(seen[0]).resize((tile, tile), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture[top : top + tile, left : left + tile], shown)
    weights = found["groups"][0, 0]
    first = picture[top : top + tile, left + tile + attention_maps.GAP :][:, :tile]
    warm = (first[..., 0] - first[..., 2]) - (np.asarray(shown, int) @ [1, 0, -1]) / 2
    quarter = warm.reshape(2, tile // 2, 2, tile // 2).mean(axis=(1, 3))
    assert quarter.argmax() == weights.argmax() and quarter.argmin() == weights.argmin()
    slerp = composers.build("slerp", tiny[0])
    other = Searcher(slerp, {}, slerp.freeze(tiny[1]), mesh=mesh)
    with pytest.raises(ConfigError, match="Slerp has no tokens that attend.*experiments/isa.py"):
        attention_maps.attention_maps(other, paths)


def test_text_regularisation_reads_phrases_with_the_sentence(tiny_blip, symmetric, batch, tmp_path):
    book = tmp_path / "phrases.json"
    # far from what the sentence replaces
    book.write_text('{"templates": ["a photo of {}"], "concepts": {"star": ["star"]}}')
    composer = Isa(tiny_blip[0], **TOWER, phrase_weight=0.5, phrases=str(book), top_k=1)
    frozen = jax.tree.map(jnp.asarray, composer.freeze(tiny_blip[1]))
    tokenizer = composer.backbone.tokenizer
    ids = np.repeat(tokenizer(["$ $ $"]), 8, axis=0)

    @jax.jit
    def run(params, frozen):
        rng, towers = jax.random.key(0), frozen["backbone"]
        rows = composer.encode(params, frozen, batch, jax.random.split(rng, 8))
        ours = composer.text_features(towers, ids, rows["words"])
        plain = composer.backbone.encode_text(towers, tokenizer(["star"]))
        return *composer.loss(params, frozen, batch, rng), ours, plain

    loss, metrics, ours, plain = map(jax.device_get, run(symmetric[1], frozen))
    cosine = ours @ plain[0] / np.linalg.norm(ours, axis=1) / np.linalg.norm(plain)
    np.testing.assert_allclose(metrics["phrase"], np.mean(1 - cosine), atol=1e-7)
    expected = metrics["global"] + metrics["local"] + 0.5 * metrics["phrase"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_weights_of_a_light_encoder_are_where_training_begins(
    tiny_blip, made, tmp_path, monkeypatch
):
    given = {"params": made[1]["encoder"], "batch_stats": made[1]["statistics"]}
    encoder = isa.encoders.untrained("shapes")
    asked = []
    monkeypatch.setattr(isa, "_loaded", lambda name: asked.append(name) or (encoder, given))
    composer = Isa(tiny_blip[0], query_encoder="timm's", **SIZES)
    params = jax.jit(composer.start)(jax.random.key(0), composer.freeze(tiny_blip[1]))
    assert asked == ["timm's"]
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], given["params"])
    jax.tree.map(np.testing.assert_array_equal, params["statistics"], given["batch_stats"])
    assert composer.contents() == {"query_encoder": encoder.weights_id}
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="nowhere"):
        Isa(tiny_blip[0], query_encoder=str(tmp_path / "nowhere"))


def test_a_clip_learns_by_distillation_alone(tiny, symmetric, batch):
    with pytest.raises(ConfigError, match="LAR needs the matching encoder.*local_weight=0"):
        Isa(tiny[0], **TOWER)
    composer = Isa(tiny[0], **TOWER, local_weight=0.0)
    frozen = composer.freeze(tiny[1])
    params = symmetric[1]  # of the same sizes: the backbone has no share in them
    loss, metrics = jax.jit(composer.loss)(params, frozen, batch, jax.random.key(0))
    assert np.isfinite(loss) and "local" not in metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mapping": "token"}, "mapping 'token'. Did you mean 'tokens'"),
        ({"softmax": "key"}, "softmax 'key'. Did you mean 'keys'"),
        ({"negatives": "easy"}, "negatives 'easy'"),
        ({"tokens": 0}, "tokens=0, width=8"),
        ({"temperature": 0.0}, "temperature=0.0: expected more than 0"),
        ({"global_weight": 0.0, "local_weight": 0.0}, "all 0, nothing to learn"),
        ({"local_weight": -1.0}, "local_weight=-1.0: expected 0 or more"),
        ({"train_tower": True}, "query_encoder='shapes' is another"),
        ({"phrase_weight": 1.0}, "needs phrases: set --config.composer.phrases"),
        ({"query_encoder": "efficientnet_b9"}, "'efficientnet_b9'. Did you mean"),
    ],
)
def test_settings_that_cannot_work(tiny_blip, settings, message):
    with pytest.raises(ConfigError, match=message):
        Isa(tiny_blip[0], **(LIGHT | settings))
