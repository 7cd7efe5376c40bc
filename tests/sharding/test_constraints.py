"""Weights are gathered, activations never: what compiled steps move between 8 devices.

Rows, tokens and words are multiples of primes that no width is a multiple of, so that a shape in a
compiled program says what it is made of.
"""

import functools
import importlib
import json
import pkgutil

import jax
import numpy as np
import optax
import pytest

import experiments
from cir_jax import composers
from cir_jax.sharding import mesh as meshes
from cir_jax.training.step import Step, init_state
from tests import tiny
from tests.sharding import hlo
from tests.weights import siglip_worlds, worlds

ROW, WORD, TOKEN = 13, 11, 5
ROWS = 8 * ROW
LENGTH = WORD
MESHES = [(2, 4, 1), (2, 2, 2)]
# what makes the same program for the devices in a third of the time
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
BOOK = {
    "templates": ["a photo of a {}", "{} and it"],
    "concepts": {"star": ["a star is red", "two star and star"], "circle": ["a circle", "circle"]},
}
SMALL = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2, "hidden_dim": 16}

IMAGES, WORDS, FEATURES = "images", "words", "features"
# (experiment, stage) -> what its batch holds, and whether its loss compares rows with each other
STAGES = {
    ("pretrain", "contrastive"): ({"target_images": IMAGES, "token_ids": WORDS}, True),
    ("pic2word", "contrastive"): ({"reference_images": IMAGES}, True),
    ("lincir", "smp"): ({"token_ids": WORDS, "masked_token_ids": WORDS}, False),
    ("searle", "distil"): ({"reference_images": IMAGES, "pseudo_words": "token"}, True),
    ("palavra", "map"): ({"target_images": IMAGES, "token_ids": WORDS}, False),
    ("palavra", "invert"): (
        {
            "reference_images": "sets of images",
            "augmented_token_ids": "sets of words",
            "label": "number",
            "augmented": "number",
        },
        True,
    ),
    ("compodiff", "stage1"): ({"target_images": IMAGES, "token_ids": WORDS}, False),
    ("compodiff", "stage2"): (
        {
            "target_images": IMAGES,
            "reference_images": IMAGES,
            "has_reference": "truth",
            "token_ids": WORDS,
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
            return tiny.backbone(context_length=LENGTH)
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
    kinds: of collectives within the groups of the tensor axis, for activations of towers.
    """
    tensor = sizes[2]
    found = []
    for collective in hlo.collectives(text):
        aside = all(len({device // tensor for device in g}) == 1 for g in collective.groups)
        for shape in collective.shapes:
            size = int(np.prod(shape))
            if size % ROW:
                continue  # of parameters
            tower = size % (ROW * WORD) == 0 or size % (ROW * TOKEN) == 0
            if tower or len(shape) > 2:
                # partial sums of a block whose weights are split over the tensor axis
                right = tensor > 1 and aside and (collective.kind in kinds or not tower)
            else:
                right = compares or tensor > 1
            if not right:
                found.append(f"{collective.kind} {shape} {collective.groups} {collective.line}")
    return found


def check(lowered, *args):
    compiled = lowered.compile(compiler_options=OPTIONS)
    assert not moved(compiled.as_text(), *args)
    return compiled


def test_every_training_stage_is_here():
    found = set()
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name != "base":
            config = importlib.import_module(f"experiments.{module.name}").get_config("smoke")
            stages = ((name, config.stage[name]) for name in config.stage)
            found |= {(module.name, name) for name, stage in stages if stage.kind == "train"}
    assert found == set(STAGES)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_steps_move_no_activations(name, stage, sizes, backbones, files):
    lowered = lower(name, stage, sizes, *backbones("clip"), files)
    # the denoiser's keys and values, and the halves of its gates, are columns of one weight each
    kinds = hlo.KINDS if name == "compodiff" else ("all-reduce",)
    compiled = check(lowered, sizes, STAGES[name, stage][1], kinds)
    whole, of_device = (made.cost_analysis()["flops"] for made in (lowered, compiled))
    # the tensor axis halves what follows its rules; the optimiser's work does not follow the rows
    assert of_device < (1.1 if sizes[2] == 1 else 0.7) * whole / (sizes[0] * sizes[1])
