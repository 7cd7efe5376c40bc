"""What a config says is what happens: the types of the computation, worker processes; and what the
loop moves between host and devices, it moves on purpose."""

import multiprocessing
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import experiment as experiments
from cir_jax.loading import read_experiment
from cir_jax.retrieval import encoders, features
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import inputs, inversion, stages
from tests import tiny as factory
from tests.training import small
from tests.weights import worlds

TYPES = {"float32": "f32", "bfloat16": "bf16"}
PRODUCT = re.compile(
    r"stablehlo\.dot_general (.*) : \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)"
)


CONVOLUTION = re.compile(r"stablehlo\.convolution\(.*", re.MULTILINE)


def products(lowered):
    """Of each matrix product in a program: the type, and whether the device may not round it."""
    found = [match.groups() for match in PRODUCT.finditer(lowered.as_text())]
    assert all(left == right for _, left, right in found)
    return [(left, "[HIGHEST, HIGHEST]" in how) for how, left, _ in found]


def set_up(name, monkeypatch, **fields):
    """An experiment over a table in memory, with one device; nothing is encoded."""
    monkeypatch.setattr(inputs, "Table", lambda *_: factory.caption_table(40))
    config = read_experiment(f"experiments/{name}.py:smoke")
    config.mesh.data = len(jax.devices())
    config.update_from_flattened_dict(fields)
    for stage in config.stage.values():
        if stage.kind == "train":
            stage.optimizer.name = "adamw"  # has no products of its own, as muon has
    return experiments.setup(config, shapes_only=True)


def shapes(**rows):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in rows.items()}


def training(experiment):
    """The step of the first stage that trains."""
    config = experiment.config
    name = next(n for n in experiments.stage_names(config) if config.stage[n].kind == "train")
    trainer = stages.make_trainer(experiment, name, None, shapes_only=True)
    return trainer.step.lower(trainer.abstract, trainer.frozen, trainer.abstract_batch())


def images(experiment):
    experiment = experiments.for_evaluation(experiment)
    size = experiment.backbone.image_transform.crop
    batch = shapes(image=((8, size, size, 3), np.uint8), unreadable=((8,), bool))
    parameters = experiment.frozen["backbone"]
    given = (experiment.backbone, experiment.mesh, parameters, batch, "encode_image")
    return encoders._encode_images.lower(*given)


def queries(experiment):
    """The method itself, with its parameters as they are drawn."""
    experiment = experiments.for_evaluation(experiment)
    backbone, composer = experiment.backbone, experiment.composer
    params = jax.eval_shape(composer.init, jax.random.key(0)) if composer.trained else {}
    query = shapes(
        token_ids=((8, backbone.context_length), np.int32),
        query_index=((8,), np.int32),
        reference_features=((8, backbone.dim), np.float32),
    )
    seed = jax.ShapeDtypeStruct((), np.uint32)
    where = composer, experiment.mesh, params, experiment.frozen
    return features._compose.lower(*where, query, seed)


def gallery(experiment):
    """Of a method that has tuned the backbone."""
    experiment = experiments.for_evaluation(experiment)
    composer, size = experiment.composer, experiment.backbone.image_transform.crop
    params = jax.eval_shape(composer.init, jax.random.key(0))
    batch = shapes(image=((8, size, size, 3), np.uint8), unreadable=((8,), bool))
    return encoders._embed_gallery.lower(
        composer, experiment.mesh, params, experiment.frozen, batch
    )


def words(experiment):
    """Of the first stage, which inverts."""
    name = experiments.stage_names(experiment.config)[0]
    experiment = experiments.of_stage(experiment, name, shapes_only=True)
    query = shapes(
        reference_features=((8, experiment.backbone.dim), np.float32),
        query_index=((8,), np.int32),
    )
    where = experiment.composer, experiment.mesh, experiment.frozen
    return inversion._invert.lower(*where, query, jax.ShapeDtypeStruct((), np.uint32))


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("pic2word", training),
        ("pretrain", training),  # without pretrained weights: another way through `setup`
        ("slerp", images),
        ("pic2word", queries),
        ("clip4cir", gallery),
        ("searle", words),  # trained, with a stage that inverts
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_type_of_the_config_is_that_of_the_computation(name, program, dtype, monkeypatch):
    """Of the encoders' products, which are most of all; losses and small networks are float32.

    Training has its type and evaluation its own, in which float32 is not rounded.
    """
    types = {"dtype": dtype, "evaluation.dtype": other(dtype)}
    if program is not training:
        types = {"dtype": other(dtype), "evaluation.dtype": dtype}
    found = products(program(set_up(name, monkeypatch, **types)))
    exact = program is not training and dtype == "float32"
    wanted = TYPES[dtype], exact
    of_type = [product for product in found if product == wanted]
    assert len(found) > 4 and len(of_type) > len(found) / 2, found
    if dtype == "float32":
        assert of_type == found


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_convolutions_of_evaluation_are_not_rounded_in_float32(dtype, exact):
    backbone, params = worlds.make("resnet")
    size = backbone.image_transform.crop
    batch = shapes(image=((8, size, size, 3), np.uint8), unreadable=((8,), bool))
    lowered = encoders._encode_images.lower(
        backbone.with_dtype(dtype), make_mesh({"data": -1}), params, batch, "encode_image"
    )
    found = CONVOLUTION.findall(lowered.as_text())
    assert len(found) > 4
    assert all(("precision HIGHEST" in line) == exact for line in found), found


def other(dtype):
    return next(name for name in TYPES if name != dtype)


def test_what_trains_in_bfloat16_is_evaluated_in_float32():
    """The papers' presets, as the papers do; released weights, too."""
    for name in ("searle", "lincir", "pic2word", "compodiff"):
        config = read_experiment(f"experiments/{name}.py:vit_l14")
        assert config.dtype == "bfloat16" and experiments.evaluation_dtype(config) == "float32"


def test_concepts_are_chosen_in_float32(monkeypatch):
    """A step in bfloat16 reads float32 features to choose by, if the method has concepts."""
    read = {}

    def image_features(backbone, *_, **__):
        read[stage] = backbone.dtype.name
        return np.zeros((40, backbone.dim), np.float32)

    monkeypatch.setattr(inputs, "stored_features", image_features)
    for name, stage in (("searle", "distil"), ("pic2word", "contrastive")):
        experiment = set_up(name, monkeypatch, dtype="bfloat16")
        inputs.make_pipeline(experiments.of_stage(experiment, stage, shapes_only=True), stage)
    assert read == {"distil": "float32", "contrastive": "bfloat16"}


def test_the_workers_of_the_config_read(monkeypatch):
    """As many processes as asked for, and none without; the batches are the same."""
    read = {}
    for count in (0, 2):
        experiment = set_up("pretrain", monkeypatch, workers=count)
        trainer = stages.make_trainer(experiment, "contrastive", None)
        batches = trainer.pipeline.batches(0, 100)  # so many that none of them is done
        read[count] = next(batches)
        assert len(multiprocessing.active_children()) == count
        batches.close()
    jax.tree.map(np.testing.assert_array_equal, read[0], read[2])


# --- device to host


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """JAX guards no reading of a CPU's memory: here it does, where the guard is closed."""
    kind, asked = type(jnp.zeros(())), []
    device_get, value = jax.device_get, kind._value

    def explicitly(tree):
        asked.append(tree)
        try:
            return device_get(tree)
        finally:
            asked.pop()

    def guarded(array):
        if jax.config.jax_transfer_guard_device_to_host == "disallow" and not asked:
            raise RuntimeError("Disallowed device-to-host transfer")
        return value.fget(array)

    monkeypatch.setattr(jax, "device_get", explicitly)
    monkeypatch.setattr(kind, "_value", property(guarded))


def test_the_loop_reads_devices_on_purpose_only(tmp_path, as_on_an_accelerator, monkeypatch):
    trainer = small.trainer()
    trainer.run(tmp_path / "whole")
    step = trainer.step

    def reads(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        return state, metrics | {"loss": metrics["loss"] * float(metrics["loss"])}

    monkeypatch.setattr(trainer, "step", reads)
    reads.state_shardings = step.state_shardings
    with pytest.raises(RuntimeError, match="Disallowed device-to-host transfer"):
        trainer.run(tmp_path / "reads")
