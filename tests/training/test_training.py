"""The train step and its loop: independent of mesh, of microbatches, of interruptions."""

import functools
import json

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cir_jax.composers.clip_pretraining import ClipPretraining
from cir_jax.errors import CheckpointError, MeshError
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.records import CaptionPairs, Records, TrimText
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import logs
from cir_jax.training.checkpoints import Checkpoints, load_scored
from cir_jax.training.loop import NanLoss, Stage, Trainer, describe
from tests import tiny as factory
from tests.training import small

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@functools.cache
def table():
    return factory.caption_table()


def make_trainer(tiny, sizes=ONE, steps=4, batch_size=16, trim=False, **stage):
    backbone, _ = tiny
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    source = Records(table(), ("image",), backbone.image_transform)
    pipeline = Pipeline(
        parts=(Part("captions", source, CaptionPairs(backbone.tokenizer, "images")),),
        batch_size=batch_size,
        seed=3,
        trim=TrimText(backbone.tokenizer.eos_id, 8) if trim else None,
    )
    defaults = {"optimizer": optax.adamw(1e-3), "log_every": 1, "checkpoint_every": 2}
    stage = Stage("contrastive", steps, seed=0, **(defaults | stage))
    return Trainer(stage, ClipPretraining(backbone), {}, pipeline, mesh)


def losses(directory):
    return [row["loss"] for row in logs.read(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference_run(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    params = make_trainer(tiny).run(directory)
    return losses(directory), jax.device_get(params)


def test_losses_do_not_depend_on_the_mesh(tiny, tmp_path, reference_run):
    trainer = make_trainer(tiny, {"data": 2, "fsdp": 2, "tensor": 2})
    trainer.run(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), reference_run[0], rtol=1e-5)
    assert trainer.step.traces == 1


def test_fsdp_and_tensor_axes_really_split_parameters(tiny):
    trainer = make_trainer(tiny, {"data": 2, "fsdp": 2, "tensor": 2})
    kernel = trainer.step.state_shardings.params["text"]["layers_0"]["fc1"]["kernel"]
    assert kernel.shard_shape((32, 64)) == (16, 32)
    momentum = trainer.step.state_shardings.opt_state[0].mu["text"]["layers_0"]["fc2"]["kernel"]
    assert momentum.shard_shape((64, 32)) == (32, 16)


def test_at_most_two_steps_are_under_way(tmp_path, monkeypatch):
    """The host neither runs ahead of the devices without end nor waits for each step."""
    trainer, done = small.trainer(steps=6, log_every=100, checkpoint_every=100), []
    step, block = trainer.step, jax.block_until_ready

    def dispatched(*args):
        state, metrics = step(*args)
        done.append(("dispatched", id(metrics["loss"]), metrics["loss"]))
        return state, metrics

    def waited(x):
        done.append(("waited", id(x), x))
        return block(x)

    monkeypatch.setattr(trainer, "step", dispatched)
    trainer.step.state_shardings = step.state_shardings
    trainer.step.frozen_shardings = step.frozen_shardings
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", waited)
        trainer.run(tmp_path)
    losses = [number for what, number, _ in done if what == "dispatched"]
    of_losses = [(what, losses.index(number)) for what, number, _ in done if number in losses]
    assert len(losses) == 6 and of_losses[:8] == [
        ("dispatched", 0),
        ("dispatched", 1),
        ("waited", 0),
        ("dispatched", 2),
        ("waited", 1),
        ("dispatched", 3),
        ("waited", 2),
        ("dispatched", 4),
    ]


def test_microbatches_keep_all_negatives(tiny, tmp_path, reference_run):
    make_trainer(tiny, microbatches=4).run(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), reference_run[0], rtol=1e-5)


def test_resumed_equals_unbroken(tiny, tmp_path, reference_run):
    make_trainer(tiny, steps=2).run(tmp_path)
    params = make_trainer(tiny, steps=4).run(tmp_path)
    assert losses(tmp_path) == reference_run[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), reference_run[1])


def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, caplog):
    """A step whose loss was the last finite one may be saved, its parameters spoilt."""
    spoils = optax.chain(
        optax.sgd(1e-3),
        optax.scale_by_schedule(lambda step: jax.numpy.where(step == 3, jax.numpy.inf, 1.0)),
    )
    trainer = small.trainer(optimizer=spoils)
    trainer.run(tmp_path)
    directory = tmp_path / "checkpoints"
    tree, position = load_scored(directory, trainer.abstract.params)
    assert position["next_batch"] == 2 and np.isfinite(tree["scale"])
    assert "4/params is not readable (not finite: scale)" in caplog.text
    caplog.clear()
    with Checkpoints(directory) as checkpoints:
        _, position = checkpoints.restore(trainer.abstract_state())
    assert position["next_batch"] == 2
    assert "checkpoints/4 is not readable (not finite: scale)" in caplog.text


def test_checkpoint_of_one_mesh_restores_on_another(tiny, tmp_path, reference_run):
    make_trainer(tiny, {"data": 1, "fsdp": 8, "tensor": 1}, steps=2).run(tmp_path)
    make_trainer(tiny, ONE).run(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), reference_run[0], rtol=1e-5)


def test_averaged_parameters_are_scored(tmp_path):
    steps, start = {"steps": 1, "optimizer": optax.sgd(0.5)}, 1.0
    last = small.trainer(**steps).run(tmp_path / "last")["scale"]
    averaged = small.trainer(ema=0.75, **steps).run(tmp_path / "averaged")["scale"]
    assert abs(last - start) > 0.1
    np.testing.assert_allclose(averaged, 0.75 * start + 0.25 * last, rtol=1e-6)


def test_one_compilation_per_text_bucket(tiny, tmp_path):
    trainer = make_trainer(tiny, trim=True, steps=12, batch_size=8)
    lengths = {b["token_ids"].shape[1] for b in trainer.pipeline.batches(0, 12)}
    trainer.run(tmp_path)
    assert lengths <= {8, 16}
    assert trainer.step.traces == len(lengths)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    exploding = optax.chain(
        optax.adamw(1e-3),
        optax.scale_by_schedule(lambda step: jax.numpy.where(step >= 2, jax.numpy.nan, 1.0)),
    )
    trainer = small.trainer(steps=6, optimizer=exploding, log_every=6)
    with pytest.raises(NanLoss, match="at step 4 the loss is nan.*step 2 in"):
        trainer.run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["2"]


def test_batch_that_does_not_divide(tiny):
    with pytest.raises(MeshError, match=r"stage.contrastive.batch_size=12 .*= 8.*multiple of 8"):
        make_trainer(tiny, {"data": 8, "fsdp": 1, "tensor": 1}, batch_size=12)


def test_mesh_larger_than_the_devices():
    with pytest.raises(MeshError, match="needs 32 devices, there are 8"):
        make_mesh({"data": 4, "fsdp": 8, "tensor": 1})
    with pytest.raises(MeshError, match="8 devices are not divisible by 3"):
        make_mesh({"data": -1, "fsdp": 3, "tensor": 1})


def test_other_data_in_the_same_directory_is_refused(tmp_path):
    small.trainer(steps=2).run(tmp_path)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        small.trainer(batch_size=16).run(tmp_path)


def test_other_contents_under_the_same_names_are_refused(tmp_path, monkeypatch):
    contents = {"records": 64, "shards": {"a": 3}, "stamp": "one"}
    book = {"phrases": "one"}
    trainer = small.trainer(steps=2)
    monkeypatch.setattr(factory.MemoryTable, "contents", lambda table: contents)
    monkeypatch.setattr(type(trainer.composer), "contents", lambda composer: book)
    trainer.run(tmp_path)
    book = {"phrases": "two"}
    with pytest.raises(CheckpointError, match=r"composer's files: phrases \(was 'one', is 'two'\)"):
        small.trainer().run(tmp_path)
    contents = contents | {"records": 60, "shards": {"a": 3, "b": 1}, "stamp": "two"}
    name = r"MemoryTable\(memory\)"
    message = (
        rf"other data of the same name; .* differ: {name}.records \(was 64, is 60\); {name}.shards"
        rf".b \(was None, is 1\); {name}.stamp \(was 'one', is 'two'\). Use a new --work"
    )
    with pytest.raises(CheckpointError, match=message):
        small.trainer().run(tmp_path)
    # a checkpoint of an earlier version does not say, and has no digests
    (tmp_path / "checkpoints" / "2" / "digests.json").unlink()
    (file,) = tmp_path.glob("checkpoints/2/position/metadata")
    position = json.loads(file.read_text())
    assert position.pop("tables")["MemoryTable(memory)"]["stamp"] == "one"
    assert position.pop("composer") == {"phrases": "one"}
    file.write_text(json.dumps(position))
    small.trainer().run(tmp_path)
    assert len(losses(tmp_path)) == 4


def test_dry_run_names_shapes_shardings_and_bytes(tiny):
    text = describe(make_trainer(tiny, {"data": 1, "fsdp": 8, "tensor": 1}))
    assert "['text']['layers_0']['fc1']['kernel'] float32[32, 64] P('fsdp'" in text
    assert "per device" in text and "target_images" in text


def test_checkpoint_of_another_composer_names_the_parameters(tmp_path):
    directory = tmp_path / "checkpoints"
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(directory / "3" / "params", {"phi": {"kernel": np.zeros((2, 3))}})
    like = {"phi": {"kernel": jax.ShapeDtypeStruct((2, 4), np.float32)}}
    with pytest.raises(CheckpointError, match=r"phi/kernel \(stored \(2, 3\), expected \(2, 4\)\)"):
        load_scored(directory, like)
