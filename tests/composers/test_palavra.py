"""PALAVRA: the set encoder, its losses, the steps at query time, sets of objects."""

import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.composers import losses, official
from cir_jax.composers.base import normalise
from cir_jax.composers.palavra import Palavra
from cir_jax.errors import CheckpointError, ConfigError, DataError, WeightsError
from cir_jax.input import objects
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.records import Records
from cir_jax.loading import read_experiment
from cir_jax.training import inputs, optimizers
from cir_jax.training import workdir as workdirs
from data.shapes.objects import objects as world_objects
from experiments import base
from tests import tiny as factory
from tests.composers import inversion

CLASSES = {"star": ["red"], "circle": ["green", "blue"]}
SIZE = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("objects") / "objects.json"
    file.write_text(json.dumps(CLASSES))
    return str(file)


@pytest.fixture(scope="module")
def build(tiny, file):
    """settings -> (composer, params, frozen)"""

    @functools.cache
    def parameters(hidden_dim):
        composer = Palavra(tiny[0], hidden_dim=hidden_dim)
        return jax.jit(composer.init)(jax.random.key(0))

    def make(**settings):
        templates = ("a photo of a {}", "{} has no {}".format("{}", "two"))
        defaults = {"objects": file, "templates": templates, "hidden_dim": 16, "coarse": "a star"}
        composer = Palavra(tiny[0], **(defaults | settings))
        return composer, parameters(composer.set_encoder.hidden_dim), composer.freeze(tiny[1])

    return make


@pytest.fixture(scope="module")
def batch(tiny):
    rng = np.random.default_rng(0)
    rows, dim = inversion.ROWS, tiny[0].dim
    return {
        "reference_features": rng.normal(size=(rows, SIZE, dim)).astype(np.float32),
        "label": rng.integers(0, 5, rows).astype(np.int32),
        "augmented": rng.integers(0, 5, rows).astype(np.int32),
        "token_ids": np.stack([tiny[0].tokenizer(["a star", "it", "two"], 16)] * rows),
        "augmented_token_ids": np.stack(
            [tiny[0].tokenizer(["a red star", "it", "two"], 16)] * rows
        ),
    }


def test_the_loss_does_not_depend_on_devices_or_parts(build, batch):
    inversion.assert_independent_of_devices_and_parts(*build(), batch)


def test_the_map_learns_beside_the_set_encoder_from_its_own_loss(build, batch, tiny):
    composer, params, frozen = build()
    gradient = inversion.loss_and_gradient(composer, params, frozen, batch)[1]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["set"]))
    # captions as they are, un-normalised
    text = jax.jit(tiny[0].encode_text)(tiny[1], batch["token_ids"][0])

    def error(layer):
        mapped = normalise(text + text @ layer["kernel"] + layer["bias"][None])
        return jnp.square(mapped[None] - normalise(batch["reference_features"])).mean()

    expected = jax.jit(jax.grad(error))(params["map"]["linear"])
    inversion.assert_same(gradient["map"]["linear"], expected, rtol=1e-4)


def test_the_losses_are_their_definitions(build, batch, tiny):
    composer, params, frozen = build(dropout=0.0, weight_object=3.0)
    rngs = jax.random.split(jax.random.key(0), inversion.ROWS)
    given = batch | {"template": np.ones(inversion.ROWS, np.int32)}
    assert composer.objects.words == ["star", "red", "circle", "green", "blue"]
    tokenizer = tiny[0].tokenizer
    ids = np.repeat(tokenizer(["* has no two"]), inversion.ROWS, axis=0)

    @jax.jit
    def run(params, towers):
        """The loss, and of each kind of sets the definitions: cycle, without classes, object."""
        rows = composer.encode(params, frozen, given, rngs)
        # f reads T as it is at this step
        text = composer.visual(params, tiny[0].encode_text(towers, batch["augmented_token_ids"][0]))
        sets = {
            "image": (normalise(batch["reference_features"]), batch["label"]),
            "text": (jnp.repeat(text[None], inversion.ROWS, axis=0), batch["augmented"]),
        }
        expected = {}
        for name, (of_set, number) in sets.items():
            labels = [f"{composer.objects.words[i]} has no two" for i in number]
            label = tiny[0].encode_text(towers, tokenizer(labels))
            words = composer._words(params, of_set)
            text = composer.text_features(towers, ids, words)
            first = [tokenizer.id_of(composer.objects.words[i]) for i in number]
            first = tiny[0].embed_tokens(towers, np.asarray(first)[:, None])[:, 0]
            expected[name] = (
                losses.nt_xent(label, text, 0.25, batch["label"]),
                losses.nt_xent(label, text, 0.25),
                jnp.square(normalise(first) - normalise(words)).mean(),
            )
        return *composer.objective(params, rows), expected

    loss, metrics, expected = run(params, tiny[1])
    # sets of one class are no negatives of each other, whatever word stands for it
    assert len(set(batch["label"])) < inversion.ROWS
    for name, (cycle, without_classes, error) in expected.items():
        assert cycle < without_classes - 0.1
        np.testing.assert_allclose(metrics[f"cycle_{name}"], cycle, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"object_{name}"], error, rtol=1e-4)
    of_sets = [metrics[f"cycle_{name}"] + 3 * metrics[f"object_{name}"] for name in expected]
    np.testing.assert_allclose(loss, metrics["map"] + sum(of_sets) / 2, rtol=1e-5)


def test_sets_have_no_order_and_no_size(build, batch):
    composer, params, _ = build()

    @jax.jit
    def run(images):
        images = normalise(images)
        sets = (images, images[:, ::-1], jnp.concatenate([images, images], 1), images[:, :1])
        return [composer._words(params, each) for each in sets]

    words, turned, twice, one = run(batch["reference_features"])
    np.testing.assert_allclose(turned, words, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(twice, words, rtol=1e-4, atol=1e-6)
    assert np.abs(one - words).max() > 1e-4


def test_steps_at_query_time(build, tiny):
    composer, params, frozen = build(refine_steps=20)
    still = build(refine_steps=0)[0]
    features = inversion.features(tiny[0], 4)
    ids = tiny[0].tokenizer([composer.prompt("is red")] * 4)
    query = {"reference_features": features, "token_ids": ids}
    star = np.repeat(tiny[0].tokenizer(["*"]), 4, axis=0)

    compose = jax.jit(composer.compose)
    together = compose(params, frozen, query, jax.random.key(0))
    for i in (0, 3):
        alone = compose(params, frozen, {k: v[i : i + 1] for k, v in query.items()}, None)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-4, atol=1e-5)

    def closeness(made, params, frozen):
        words = made.invert(params, frozen, query, None)
        text = normalise(made.text_features(frozen["backbone"], star, words))
        return jnp.sum(text * normalise(features), axis=-1)

    both = jax.jit(lambda *args: [closeness(made, *args) for made in (composer, still)])
    refined, plain = both(params, frozen)
    assert (refined > plain).all()


def test_prompt(build):
    assert build()[0].prompt("is red") == "a photo of a star * that is red"
    assert build()[0].prompt("") == "a photo of a star *"


def test_official_directory_comes_back(build, tmp_path):
    torch = pytest.importorskip("torch")
    composer, params, frozen = build()
    official.save(composer, tmp_path / "palavra", params, frozen)
    (set_file,) = (tmp_path / "palavra").glob("deep_set_model_first_save_*")
    stored = torch.load(set_file, weights_only=True)
    assert set(stored) == {
        *(f"phi.{i}.{name}" for i in (0, 2, 4) for name in ("Gamma.weight", "Gamma.bias")),
        *(f"phi.{i}.Lambda.weight" for i in (0, 2, 4)),
        *(f"ro.{i}.{name}" for i in (1, 4) for name in ("weight", "bias")),
    }
    again = official.load(composer, tmp_path / "palavra", frozen)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    with pytest.raises(WeightsError, match="set/fc/kernel .*wrong shapes|wrong shapes"):
        official.load(build(hidden_dim=8)[0], tmp_path / "palavra", frozen)
    (tmp_path / "palavra" / "deep_set_model_other").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"one file deep_set_model\*; has deep_set_model_first"):
        official.load(composer, tmp_path / "palavra", frozen)


def test_sets_of_objects(tiny, file):
    found = objects.Objects.read(file)
    assert found.named("a blue thing") == ["circle"] and found.named("redder stars") == []
    assert found.renamed("a green circle", "circle", "blue") == "a blue blue"
    # captions are read in lower case, whatever the case of the classes
    assert objects.Objects({"Dog": ("Dog", "Puppy")}).named("a puppy") == ["Dog"]
    table = factory.caption_table(12)
    for i, text in enumerate([b"a red star", b"it has two", b"a circle and a star", b"green"] * 3):
        table.records[i]["captions"][0] = text
    features = np.arange(12, dtype=np.float32)[:, None].repeat(24, axis=1)
    source = Records(table, ("image",), None, {"image": features})
    members = objects.members(source, found)
    assert members["star"].tolist() == [0, 2, 4, 6, 8, 10]
    assert members["circle"].tolist() == [2, 3, 6, 7, 10, 11]
    sets = objects.ObjectSets(tiny[0].tokenizer, objects.Labels(source, found), "features", 4)
    rng, drawn = np.random.default_rng(0), set()
    for record in table.records:
        record["captions"][1:] = [b"no star or circle", b"make it two"]
    for name in ["star", "circle"] * 3:
        row = sets.random_map(name, rng)
        assert found.words[row["label"]] == name
        word = found.words[row["augmented"]]
        assert word in found.classes[name]
        rows = row["reference_features"][:, 0].astype(int)
        assert set(rows) <= set(members[name].tolist())
        for i, *ids in zip(rows, row["token_ids"], row["augmented_token_ids"], strict=True):
            # a caption of this image that names the class, and the same one with the word
            texts = [text.decode() for text in table.records[i]["captions"][:2]]
            pairs = [[text, found.renamed(text, name, word)] for text in texts]
            same = [np.array_equal(tiny[0].tokenizer(pair, 16), ids) for pair in pairs]
            assert any(same)
            drawn.add(same.index(True))
    assert drawn == {0, 1}
    for record in table.records:
        record["captions"][0] = b"nothing"
    with pytest.raises(DataError, match="no first caption names one of the classes star, circle"):
        objects.members(source, found)


def test_an_epoch_is_one_set_of_each_class(tiny):
    """Not one of each image; a batch has a class once where there are enough of them."""
    table = factory.caption_table(64)
    classes = objects.Objects({word: (word,) for word in [*factory.WORDS[-8:], "nowhere"]})
    source = Records(table, ("image",), None, {"image": np.ones((64, 24), np.float32)})
    data = types.SimpleNamespace(features=True, set_size=2)
    composer = types.SimpleNamespace(objects=classes)
    experiment = types.SimpleNamespace(composer=composer, backbone=tiny[0])
    example = inputs.EXAMPLES["object_sets"]
    labels = example.items(experiment, source)
    part = Part("captions", labels, example.make(experiment, data, labels))

    def numbers(rows, stop):
        pipeline = Pipeline(parts=(part,), batch_size=rows, seed=0)
        assert pipeline.epoch_examples == 8
        return [batch["label"].tolist() for batch in pipeline.batches(0, stop)]

    found = numbers(4, 4)
    assert all(sorted(found[i] + found[i + 1]) == list(range(8)) for i in (0, 2))
    assert found[:2] != found[2:]
    # fewer classes than rows: each as often as any other
    assert sorted(numbers(24, 1)[0]) == sorted([*range(8)] * 3)
    composer.objects = None
    with pytest.raises(ConfigError, match="sets of objects need a composer with classes"):
        example.items(experiment, source)


def test_workdirs_with_a_stage_of_the_map_are_refused(tmp_path):
    config = read_experiment("palavra:smoke")
    assert config.stages == ("invert",)
    workdirs.claim(tmp_path, config)
    older = json.loads((tmp_path / workdirs.CONFIG_FILE).read_text())
    older["stage"]["map"] = dict(older["stage"]["invert"])
    older["stage"]["invert"]["after"] = "map"
    (tmp_path / workdirs.CONFIG_FILE).write_text(json.dumps(older))
    with pytest.raises(
        CheckpointError,
        match=r"differ: stage.invert.after \(was 'map', is ''\); "
        r"stage.map \(was \{...\}, is None\). Use a new --workdir",
    ):
        workdirs.claim(tmp_path, config)


def test_a_run_goes_on_with_the_same_words(build, file, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(Path(file).read_text().replace("blue", "azure"))
    read = [build(objects=str(path))[0].contents() for path in (file, file, other)]
    assert read[0] == read[1] != read[2] and list(read[0]) == ["objects"]
    assert build(objects="")[0].contents() == {}


def test_classes_of_the_embedded_world():
    stored = objects.Objects.read("data/shapes/objects.json")
    assert {name: list(words) for name, words in stored.classes.items()} == world_objects()


def test_mistakes_are_named(build, tmp_path, batch):
    with pytest.raises(ConfigError, match="templates: 'a photo' must contain {} exactly once"):
        build(templates=("a photo",))
    composer, params, frozen = build(objects="")
    with pytest.raises(ConfigError, match="set composer.objects of the stage"):
        jax.eval_shape(composer.loss, params, frozen, batch, jax.random.key(0))
    with pytest.raises(DataError, match="none.json: no classes of objects"):
        build(objects=str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match="bad.json: not a dictionary of classes"):
        build(objects=str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text('{"dog": "puppy"}')  # not the words p, u, y
    with pytest.raises(DataError, match="bad.json: .*the words of 'dog' are no list"):
        build(objects=str(tmp_path / "bad.json"))


def test_step_schedule():
    fields = base.OPTIMIZER | {"learning_rate": 1.0, "schedule": "step", "drop": 0.2}

    def steps(value, **kwargs):
        return int(str(value).split()[0])

    made = optimizers.schedule(fields | {"drop_every": "10 steps"}, 100, steps)
    np.testing.assert_allclose([made(9), made(10), made(20)], [1, 0.2, 0.04], rtol=1e-5)
    with pytest.raises(ConfigError, match="drop_every: schedule 'step' needs"):
        optimizers.schedule(fields, 100, steps)
