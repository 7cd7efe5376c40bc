"""Each small network, stopped dead and continued: the numbers of an unbroken run.

One compiled step serves all runs of a method. SEARLE, with its stage of words, is in tests/launch.
"""

import json

import jax
import numpy as np
import pytest

from cir_jax import composers
from cir_jax.errors import ConfigError
from cir_jax.evaluation.runner import trained_params
from cir_jax.experiment import Experiment, of_stage
from cir_jax.loading import read_experiment
from cir_jax.sharding import placement
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import inputs, logs, stages
from tests import tiny as factory

STAGES = {
    "pic2word": "contrastive",
    "lincir": "smp",
    "palavra": "invert",
    "combiner": "fuse",
    "rtd": "rtd",
    "tat": "anchor",
    "clip4cir": "tune",
    "magiclens": "fuse",
    "artemis": "match",
    "isa": "distil",
}
TRIPLETS = ("combiner", "magiclens", "clip4cir", "artemis")
STEPS, LAST = 5, 3  # a checkpoint every 2, the end after LAST


class Killed(BaseException):
    pass


def rows(directory):
    found = logs.read(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "speed"} for row in found]


def triplet_table(count):
    """Triplets of the images of a table of captions, with two texts each."""
    records = factory.caption_table(count).records
    pairs = zip(records, [*records[1:], records[0]], strict=True)
    return factory.MemoryTable(
        [
            {"reference": a["image"], "target": b["image"], "texts": tuple(b["captions"][:2])}
            for a, b in pairs
        ]
    )


def text_triplet_table(count):
    captions = [record["captions"][0] for record in factory.caption_table(count).records]
    return factory.MemoryTable(
        [
            {"reference_caption": a, "target_caption": b, "text": b"is " + b}
            for a, b in zip(captions, [*captions[1:], captions[0]], strict=True)
        ]
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_goes_on_to_the_same_numbers(name, tiny, tiny_blip, tmp_path, monkeypatch):
    config, stage = read_experiment(f"experiments/{name}.py:smoke"), STAGES[name]
    config.log_every, config.checkpoint.every = 1, "2 steps"
    small = {
        "rtd": {"word.hidden_dim": 8},
        "tat": {"rank": 2},
        "lincir": {},
        "clip4cir": {},
        "artemis": {},
        "isa": {"width": 8, "hidden": (8, 8), "dropout": 0.1},
    }
    config.composer.update_from_flattened_dict(small.get(name, {"hidden_dim": 8}))
    recipe = config.stage[stage]
    recipe.batch_size, recipe.duration = 8, f"{STEPS} steps"
    if name == "pic2word":  # the crops are drawn, too
        recipe.data.example, recipe.data.features = "cropped_images", False
    if name == "palavra":
        objects = tmp_path / "objects.json"
        objects.write_text(json.dumps({"star": ["star"], "circle": ["circle"]}))
        recipe.composer.objects, recipe.composer.hidden_dim = str(objects), 8
    if name in TRIPLETS:
        recipe.data.example = "joined_triplets"
    if name == "artemis":  # crops are drawn, and the tower of texts moves
        recipe.data.example, recipe.data.features = "augmented_triplets", False
        config.composer.train_backbone = True
        recipe.optimizer.only = "/(networks|backbone/text)/.*"
    if name == "combiner":
        config.composer.projection_dim = 8
    tables = dict.fromkeys(TRIPLETS, triplet_table) | {"rtd": text_triplet_table}
    table = tables.get(name, factory.caption_table)
    monkeypatch.setattr(inputs, "Table", lambda *_: table(40))
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    backbone, params = tiny_blip if name == "isa" else tiny
    settings = config.composer.to_dict()
    composer = composers.build(settings.pop("name"), backbone, **settings)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    frozen = placement.place(mesh, composer.freeze(params))
    experiment = Experiment(config, mesh, backbone, composer, frozen)
    initial = None
    if name == "rtd":
        initial = composer.take_over(jax.jit(composer.word.init)(jax.random.key(0)), frozen)
    trainer = stages.make_trainer(experiment, stage, initial)

    whole = jax.device_get(trainer.run(tmp_path / "whole"))
    batches = type(trainer.pipeline).batches

    def cut(pipeline, start, stop):
        yield from batches(pipeline, start, LAST)
        raise Killed

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(type(trainer.pipeline), "batches", cut)
        trainer.run(tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3]
    trainer.pipeline = inputs.make_pipeline(of_stage(experiment, stage), stage)
    again = jax.device_get(trainer.run(tmp_path / "killed"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == STEPS
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert trainer.step.traces == 1
    if name == "rtd":  # the words are held, and the first run began where this one does
        jax.tree.map(np.testing.assert_array_equal, whole["word"], jax.device_get(initial["word"]))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole["text"], initial["text"])
        assert min(jax.tree.leaves(moved)) > 0


def test_what_another_methods_stage_trained_is_taken_over(tiny, tmp_path, monkeypatch):
    """RTD begins with the words of Pic2Word's stage, and is Pic2Word until it is trained."""
    config = read_experiment("experiments/rtd.py:smoke")
    config.stage.contrastive.composer.hidden_dim = config.composer.word.hidden_dim = 8
    config.stage.contrastive.batch_size, config.stage.contrastive.duration = 8, "1 steps"
    monkeypatch.setattr(inputs, "Table", lambda *_: factory.caption_table(8))
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    backbone, params = tiny
    settings = config.composer.to_dict()
    composer = composers.build(settings.pop("name"), backbone, **settings)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    frozen = placement.place(mesh, composer.freeze(params))
    experiment = Experiment(config, mesh, backbone, composer, frozen)
    word = stages.make_trainer(experiment, "contrastive", None).run(tmp_path / "contrastive")
    begun = stages.initial_params(experiment, "rtd", tmp_path, None)
    expected = {"word": word, "text": {name: params[name] for name in ("text", "text_projection")}}
    for found in (begun, trained_params(experiment, tmp_path)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    monkeypatch.setattr(stages, "given_params", lambda experiment: begun)
    with pytest.raises(ConfigError, match="stage 'contrastive' trains another method. .*ges=rtd"):
        stages.start(experiment, tmp_path)
    config.stages = ("rtd",)
    assert stages.start(experiment, tmp_path) is begun
