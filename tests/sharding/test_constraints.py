"""Weights are gathered, activations never: what compiled steps move between 8 devices.

Rows, tokens and words are multiples of primes that no width is a multiple of, so that a shape in a
compiled program says what it is made of.
"""

import functools
import importlib
import json
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiments
from cir_jax import composers
from cir_jax.retrieval import encoders, features
from cir_jax.sharding import constraints, hlo, placement
from cir_jax.sharding import mesh as meshes
from cir_jax.training import inversion
from cir_jax.training.step import Step, init_state
from tests import tiny as factory
from tests.sharding import unoptimised
from tests.weights import siglip_worlds, worlds

ROW, WORD, TOKEN = 13, 11, 5
ROWS = 8 * ROW
LENGTH = WORD
MESHES = [(2, 4, 1), (2, 2, 2)]
BOOK = {
    "templates": ["a photo of a {}", "{} and it"],
    "concepts": {"star": ["a star is red", "two star and star"], "circle": ["a circle", "circle"]},
}
SMALL = {
    "depth": 1,
    "heads": 2,
    "dim_head": 8,
    "cross_heads": 2,
    "hidden_dim": 16,
    "projection_dim": 16,
}

IMAGES, WORDS, FEATURES = "images", "words", "features"
# (experiment, stage) -> what its batch holds, and whether its loss compares rows with each other
STAGES = {
    ("pretrain", "contrastive"): ({"target_images": IMAGES, "token_ids": WORDS}, True),
    ("pic2word", "contrastive"): ({"reference_images": IMAGES}, True),
    ("combiner", "fuse"): (
        {"target_images": IMAGES, "reference_images": IMAGES, "token_ids": WORDS},
        True,
    ),
    ("artemis", "match"): (
        {"target_images": IMAGES, "reference_images": IMAGES, "token_ids": WORDS},
        True,
    ),
    ("magiclens", "fuse"): (
        {"target_images": IMAGES, "reference_images": IMAGES, "token_ids": WORDS},
        True,
    ),
    ("isa", "distil"): ({"reference_images": IMAGES, "target_images": IMAGES}, True),
    ("lincir", "smp"): ({"token_ids": WORDS, "masked_token_ids": WORDS}, False),
    ("searle", "distil"): ({"reference_images": IMAGES, "pseudo_words": "token"}, True),
    ("palavra", "invert"): (
        {
            "reference_images": "sets of images",
            "token_ids": "sets of words",
            "augmented_token_ids": "sets of words",
            "label": "number",
            "augmented": "number",
        },
        True,
    ),
    ("rtd", "rtd"): (
        {"reference_token_ids": WORDS, "target_token_ids": WORDS, "token_ids": WORDS},
        True,
    ),
    ("clip4cir", "tune"): (
        {"target_images": IMAGES, "reference_images": IMAGES, "token_ids": WORDS},
        True,
    ),
    ("tat", "anchor"): ({"target_images": IMAGES, "token_ids": WORDS}, True),
    ("compodiff", "stage1"): ({"target_images": IMAGES, "token_ids": WORDS}, False),
    ("compodiff", "stage2"): (
        {
            "target_images": IMAGES,
            "reference_images": IMAGES,
            "has_reference": "truth",
            "token_ids": WORDS,
            "mask": "mask",
        },
        False,
    ),
}


def shapes_of(batch, backbone, rows):
    """Shapes of a global batch. Three images or texts are a set."""
    size = backbone.config.vision.image_size
    known = {
        IMAGES: ((size, size, 3), np.uint8),
        "sets of images": ((3, size, size, 3), np.uint8),
        WORDS: ((LENGTH,), np.int32),
        "sets of words": ((3, LENGTH), np.int32),
        "number": ((), np.int32),
        "truth": ((), np.bool_),
        "mask": ((64, 64), np.bool_),
        FEATURES: ((backbone.dim,), np.float32),
        "token": ((backbone.token_dim,), np.float32),
    }
    return {
        name: jax.ShapeDtypeStruct((rows, *known[what][0]), known[what][1])
        for name, what in batch.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    contents = {"phrases": BOOK, "objects": {"star": ["red"], "circle": ["blue"]}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in contents}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Family -> (backbone, params): 5 or 25 tokens of an image, 11 of a text."""

    @functools.cache
    def make(family):
        if family == "clip":
            return factory.backbone(context_length=LENGTH)
        folder = tmp_path_factory.mktemp(family)
        if family == "siglip":
            return siglip_worlds.make(folder, 2, image_size=40, context_length=LENGTH)
        return worlds.make_blip(folder) if family == "blip" else worlds.make("resnet")

    return make


def composer_of(config, stage, backbone, files):
    """The composer of a stage's smoke preset, its networks small, its files ours."""
    recipe = config.stage[stage]
    settings = recipe.composer.to_dict() or config.composer.to_dict()
    settings |= {name: size for name, size in SMALL.items() if name in settings}
    settings |= {name: path for name, path in files.items() if name in settings}
    if backbone.family == "blip" and "scale" in settings:
        settings["scale"] = 100.0
    if backbone.family != "blip" and "local_weight" in settings:
        settings["local_weight"] = 0.0  # pairs that do not match are of rows that devices exchange
    return composers.build(settings.pop("name"), backbone, **settings)


def lower(name, stage, sizes, backbone, params, files, microbatches=1):
    """The stage's step, lowered from shapes."""
    config = importlib.import_module(f"experiments.{name}").get_config("smoke")
    composer = composer_of(config, stage, backbone, files)
    recipe = config.stage[stage]
    mesh = meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)))
    frozen = jax.eval_shape(lambda: composer.freeze(params, shapes_only=True))
    optimizer = optax.adam(1e-3)  # any: it sees no rows
    ema = recipe.ema > 0
    state = jax.eval_shape(lambda: init_state(composer, optimizer, seed=0, ema=ema))
    step = Step(
        mesh,
        state,
        frozen,
        composer=composer,
        optimizer=optimizer,
        ema_decay=recipe.ema,
        microbatches=microbatches,
    )
    batch, _ = STAGES[name, stage]
    return step.lower(state, frozen, shapes_of(batch, backbone, microbatches * ROWS))


def moved(text, sizes, compares=True, kinds=("all-reduce",)):
    """Collectives of rows that should not be there.

    compares: whether the loss compares rows with each other, so that [rows, dim] are exchanged.
    kinds: what may happen within the groups of the tensor axis.
    """
    tensor, found = sizes[2], []
    for collective in hlo.collectives(text):
        within = all(len({device // tensor for device in g}) == 1 for g in collective.groups)
        for shape in collective.shapes:
            size = int(np.prod(shape))
            if size % ROW:
                continue  # of parameters
            if len(shape) > 2 or not size % (ROW * WORD) or not size % (ROW * TOKEN):
                right = tensor > 1 and within and collective.kind in kinds
            else:  # [rows, width]: weights that the tensor axis splits cost more than these
                right = compares or tensor > 1
            if not right:
                found.append(f"{collective.kind} {shape} {collective.groups} {collective.line}")
    return found


def in_loops(text):
    """Collectives that a program makes in each iteration of a loop; there is one."""
    programs, bodies = hlo.computations(text), re.findall(r"\bbody=%?([\w.\-]+)", text)
    assert bodies
    return [found for name in bodies for found in hlo.collectives("\n".join(programs[name]))]


def check(lowered, *args, loops_stay=False):
    compiled = unoptimised.compiled(lowered, loops_stay)
    assert not moved(compiled.as_text(), *args)
    return compiled


def test_every_training_stage_is_here():
    found = set()
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name != "base":
            config = importlib.import_module(f"experiments.{module.name}").get_config()
            own = config.composer.name  # the stages of another method are in its own experiment
            for name, stage in config.stage.items():
                if stage.kind == "train" and stage.composer.get("name", own) == own:
                    found.add((module.name, name))
    assert found == set(STAGES)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_steps_move_no_activations(name, stage, sizes, backbones, files):
    lowered = lower(name, stage, sizes, *backbones("clip"), files)
    # the denoiser's keys and values, and the halves of its gates, are columns of one weight each
    kinds = hlo.KINDS if name == "compodiff" else ("all-reduce",)
    compiled = check(lowered, sizes, STAGES[name, stage][1], kinds)
    if name == "isa":
        return  # split, XLA counts a depthwise convolution's gradient 30 times
    whole, of_device = (made.cost_analysis()["flops"] for made in (lowered, compiled))
    # the tensor axis halves what follows its rules; the optimiser's work does not follow the rows
    assert of_device < (1.1 if sizes[2] == 1 else 0.7) * whole / (sizes[0] * sizes[1])


def test_without_constraints_they_do(backbones, files, monkeypatch):
    """What the tests above would find."""
    monkeypatch.setattr(constraints, "_constrain", lambda x, spec: x)
    for name, stage in (("pic2word", "contrastive"), ("compodiff", "stage2")):
        lowered = lower(name, stage, (2, 4, 1), *backbones("clip"), files)
        text = unoptimised.compiled(lowered).as_text()
        assert len(moved(text, (2, 4, 1), STAGES[name, stage][1])) > 5


@pytest.mark.parametrize("family", ["siglip", "blip", "resnet"])
def test_other_backbones_move_no_activations(family, backbones, files):
    lowered = lower("pic2word", "contrastive", (2, 4, 1), *backbones(family), files)
    check(lowered, (2, 4, 1))


def test_layers_computed_again_in_parts_move_none_either(backbones, files):
    backbone, params = backbones("clip")
    model = (backbone.with_remat(), params)
    lowered = lower("pic2word", "contrastive", (2, 4, 1), *model, files, microbatches=2)
    text = check(lowered, (2, 4, 1)).as_text()
    assert " while(" in text and "checkpoint" in text  # both are in it


def abstract(mesh, tree):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s),
        tree,
        placement.parameter_shardings(mesh, tree),
    )


def queries(mesh, backbone, **what):
    shardings = meshes.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings)
        for name, x in shapes_of(what, backbone, ROWS).items()
    }


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_features_of_images_move_no_activations(sizes, backbones):
    backbone, params = backbones("clip")
    mesh = meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)))
    batch = queries(mesh, backbone, image=IMAGES, unreadable="truth")
    check(
        encoders._encode_images.lower(
            backbone, mesh, abstract(mesh, params), batch, "encode_image"
        ),
        sizes,
    )


@pytest.mark.parametrize("name", ["compodiff", "palavra"])
def test_queries_move_no_activations(name, backbones, files):
    """Sampling steps and refinement are loops in the compiled program: they exchange nothing, and
    weights are gathered once."""
    backbone, params = backbones("clip")
    config = importlib.import_module(f"experiments.{name}").get_config("smoke")
    composer = composer_of(config, config.stages[-1], backbone, files)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    trees = jax.eval_shape(composer.init, jax.random.key(0)), composer.freeze(params)
    batch = queries(mesh, backbone, reference_images=IMAGES, token_ids=WORDS, query_index="number")
    seed = jax.ShapeDtypeStruct((), np.uint32)
    made = (abstract(mesh, tree) for tree in trees)
    lowered = features._compose.lower(composer, mesh, *made, batch, seed)
    text = check(lowered, (2, 4, 1), loops_stay=True).as_text()
    assert not in_loops(text)
    (kind, each), *others = hlo.traffic(text).items()
    read = (trees[0], params["vision"], params["text"])
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    assert kind == "all-gather" and not others and each.bytes < 1.1 * weights


def test_inversion_moves_no_activations(backbones, files):
    backbone, params = backbones("clip")
    composer = composers.build("searle_oti", backbone, phrases=files["phrases"], top_k=2)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    frozen = abstract(mesh, composer.freeze(params))
    batch = queries(mesh, backbone, reference_features=FEATURES, query_index="number")
    lowered = inversion._invert.lower(composer, mesh, frozen, batch, np.uint32(0))
    text = check(lowered, (2, 4, 1)).as_text()
    # weights are gathered, once; left to XLA, iterations exchange what they look up in them
    (kind, each), *others = hlo.traffic(text).items()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["text"]))
    assert kind == "all-gather" and not others and each.bytes < 1.5 * weights


def test_models_see_no_devices_outside_of_a_step(tiny):
    backbone, params = tiny
    ids = jnp.ones((8, 16), jnp.int32)

    def program(mesh):
        def encode(params, ids):
            with constraints.rows_over(mesh):
                return backbone.encode_text(params, ids)

        return str(jax.make_jaxpr(encode)(params, ids))

    outside = str(jax.make_jaxpr(backbone.encode_text)(params, ids))
    assert "sharding_constraint" not in outside
    assert program(meshes.make_mesh({}, jax.devices()[:1])) == outside
    assert program(meshes.make_mesh({"data": -1})).count("sharding_constraint") > 3
    assert constraints._mesh.get() is None


def test_rows_that_do_not_divide_lie_whole_on_each_device():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})

    @jax.jit
    def make(x):
        with constraints.rows_over(mesh):
            return constraints.split_rows({"one": x[:1], "all": x, "none": None})

    made = make(jnp.ones((8, 3)))
    assert made["one"].sharding.is_fully_replicated and made["none"] is None
    assert made["all"].sharding.shard_shape((8, 3)) == (1, 3)


def test_each_row_draws_what_it_draws_alone():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    keys, rows = jax.random.split(jax.random.key(0), 8), jnp.arange(24.0).reshape(8, 3)

    def of_row(key, x):
        return constraints.split_rows(x * 2) + jax.random.normal(key, x.shape)

    @jax.jit
    def on_mesh(keys, rows):
        with constraints.rows_over(mesh):
            return constraints.each_row(of_row)(keys, rows)

    made = on_mesh(keys, rows)
    np.testing.assert_array_equal(made, jax.vmap(of_row)(keys, rows))
    assert made.sharding.shard_shape((8, 3)) == (1, 3)
