"""Configs, workdirs and stages: what a user can get wrong is named, with the remedy."""

import dataclasses
import errno
import functools
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

from cir_jax import composers, loading
from cir_jax import experiment as experiments
from cir_jax.errors import CheckpointError, ConfigError, DataError, WeightsError
from cir_jax.evaluation import runner
from cir_jax.input import images
from cir_jax.input.images import ImageTransform, targetpad
from cir_jax.input.records import Records
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import durations, inputs, optimizers, stages
from cir_jax.training import workdir as workdirs
from cir_jax.training.checkpoints import Checkpoints
from cir_jax.training.scores import Scores
from cir_jax.training.step import init_state
from experiments import base, compodiff
from tests import tiny as factory


def steps(value, **kwargs):
    return durations.to_steps(value, field="f", batch_size=10, epoch_examples=1000, **kwargs)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, 7), ("300 steps", 300), ("2 epochs", 200), ("5k examples", 500), ("1m steps", 10**6)],
)
def test_durations(value, expected):
    assert steps(value) == expected


def test_percent_is_of_the_stage():
    assert steps("5%", total_steps=400) == 20
    with pytest.raises(ConfigError, match="a share of what"):
        steps("5%")
    with pytest.raises(ConfigError, match="config.f='soon' is no duration"):
        steps("soon")


def make(schedule, **fields):
    fields = base.OPTIMIZER | {"learning_rate": 1.0, "schedule": schedule} | fields
    return optimizers.schedule(fields, 100, lambda v, **kw: steps(v, total_steps=100))


def test_schedules():
    cosine = make("cosine", warmup="10%", final=0.1)
    np.testing.assert_allclose([cosine(0), cosine(9), cosine(10)], [0.1, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(cosine(100), 0.1, rtol=1e-6)
    assert make("constant")(50) == 1.0
    np.testing.assert_allclose(make("linear")(50), 0.5, rtol=1e-6)
    with pytest.raises(ConfigError, match="'cosin'. Did you mean 'cosine'"):
        make("cosin")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_move_every_parameter(name, tiny):
    fields = base.OPTIMIZER | {"name": name, "learning_rate": 1e-2, "clip_norm": 1.0}
    made = optimizers.optimizer(fields, 10, lambda v, **kw: 0)
    _, params = tiny
    grads = jax.tree.map(np.ones_like, params)

    @jax.jit
    def update(grads, params):
        return optax.apply_updates(params, made.update(grads, made.init(params), params)[0])

    moved = jax.device_get(update(grads, params))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), params, moved)))


def test_weight_decay_spares_biases_and_norms(tiny):
    mask = optimizers.path_mask(base.OPTIMIZER["decay"])(tiny[1])
    layer = mask["text"]["layers_0"]
    assert layer["fc1"] == {"kernel": True, "bias": False}
    assert layer["norm1"] == {"scale": False, "bias": False}


def test_unknown_names_say_the_closest():
    with pytest.raises(ConfigError, match="preset .*'shape'. Did you mean 'shapes'"):
        compodiff.get_config("shape")
    with pytest.raises(ConfigError, match="composer 'slerpp'. Did you mean 'slerp'"):
        composers.composer_class("slerpp")
    with pytest.raises(ConfigError, match="optimizer field 'learning_rat'. Did you mean 'learning"):
        base.stage(tables={}, batch_size=1, duration=1, optimizer={"learning_rat": 1})
    config = compodiff.get_config("smoke")
    config.stages = ("stage3",)
    with pytest.raises(ConfigError, match="stage of experiment compodiff: 'stage3'. Did you mean"):
        experiments.stage_names(config)
    with pytest.raises(ConfigError, match="experiments/nothing.py is no file"):
        loading.read_experiment("experiments/nothing.py")


def test_unknown_composer_setting_is_named(tiny):
    with pytest.raises(
        ConfigError, match="setting of composer slerp: 'alhpa'. Did you mean 'alpha'"
    ):
        composers.build("slerp", tiny[0], alhpa=0.5)


def test_preprocessing_of_the_config_takes_the_place_of_that_of_the_weights():
    config = loading.read_experiment("experiments/slerp.py:smoke")
    before = experiments.setup(config).backbone.image_transform
    assert before.pad == "none"
    config.preprocessing = "targetpad"
    made = experiments.setup(config)
    assert made.composer.backbone.image_transform == dataclasses.replace(
        targetpad(before.crop), mean=before.mean, std=before.std
    )
    config.preprocessing = "targetpat"
    with pytest.raises(ConfigError, match="config.preprocessing.*Did you mean 'targetpad'"):
        experiments.setup(config)


def test_the_backbone_is_loaded_for_another_image_size():
    config = loading.read_experiment("experiments/slerp.py:smoke")
    own = experiments.setup(config).backbone
    config.image_size = own.config.vision.image_size + own.config.vision.patch_size
    made = experiments.setup(config).composer.backbone
    assert made.config.vision.image_size == made.image_transform.crop == config.image_size
    assert made.weights_id != own.weights_id
    config.image_size += 1
    with pytest.raises(WeightsError, match=f"image_size={config.image_size}: no multiple of"):
        experiments.setup(config)


def test_evaluation_is_another_view_of_the_same_parameters():
    config = loading.read_experiment("experiments/lincir.py:smoke")
    config.dtype = "bfloat16"
    trained = experiments.setup(config)
    made = experiments.for_evaluation(trained)
    assert (trained.backbone.dtype, made.backbone.dtype) == (jnp.bfloat16, jnp.float32)
    assert made.composer.backbone is made.backbone
    ours, theirs = (jax.tree.leaves(x.frozen) for x in (trained, made))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert experiments.for_evaluation(made) is made
    # the same object again, whose programs are compiled
    assert experiments.for_evaluation(trained).backbone is made.backbone
    config.evaluation.dtype = "bfloat16"
    assert experiments.for_evaluation(trained) is trained
    config.evaluation.dtype = "bfloat"
    with pytest.raises(ConfigError, match="config.evaluation.dtype 'bfloat'. Did you mean 'bfloa"):
        experiments.setup(config)


def test_what_is_trained_from_scratch_is_evaluated_in_its_own_type():
    config = loading.read_experiment("experiments/pretrain.py:smoke")
    config.dtype = "bfloat16"
    made = experiments.for_evaluation(experiments.setup(config))
    assert made.composer.backbone.dtype == jnp.float32 and made.frozen == {}


def test_a_workdir_without_later_fields_did_as_before(tmp_path):
    config = compodiff.get_config("smoke")
    workdirs.claim(tmp_path, config)
    file = tmp_path / workdirs.CONFIG_FILE
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "image_size"}
    for stage in older["stage"].values():
        del stage["optimizer"]["backbone_share"], stage["data"]["reduced_jpeg"]
    for field in ("threads", "prefetch"):
        del older[field]
    file.write_text(json.dumps(older))
    workdirs.claim(tmp_path, config)
    config.image_size, config.stage.stage2.optimizer.backbone_share = 64, 0.5
    config.stage.stage2.data.reduced_jpeg, config.workers, config.threads = True, 3, 7
    for changed in (
        r"image_size \(was 0, is 64\)",
        r"backbone_share \(was 1.0, is 0.5\)",
        r"reduced_jpeg \(was False, is True\)",
    ):
        with pytest.raises(CheckpointError, match=changed):
            workdirs.claim(tmp_path, config)


def test_how_the_best_checkpoint_is_chosen_belongs_to_the_run(tmp_path):
    config = compodiff.get_config("smoke")
    workdirs.claim(tmp_path, config)
    file = tmp_path / workdirs.CONFIG_FILE
    older = json.loads(file.read_text())
    del older["checkpoint"]["best"]
    file.write_text(json.dumps(older))
    config.checkpoint.every, config.checkpoint.keep = "7 steps", 9
    workdirs.claim(tmp_path, config)
    config.checkpoint.best = "cirr R@1"
    with pytest.raises(ConfigError, match="best='cirr R@1': stages.train needs the scorer that"):
        stages.train(experiments.Experiment(config, None, None, None, {}), tmp_path)
    with pytest.raises(CheckpointError, match=r"differ: checkpoint.best \(was '', is 'cirr R@1'\)"):
        workdirs.claim(tmp_path, config)


def test_workdir_of_another_run_names_the_fields(tmp_path):
    config = compodiff.get_config("smoke")
    workdirs.claim(tmp_path, config)
    config.log_every = 7  # does not change what is learned
    workdirs.claim(tmp_path, config)
    config.seed = 5
    config.stage.stage2.batch_size = 64
    with pytest.raises(CheckpointError) as error:
        workdirs.claim(tmp_path, config)
    assert "seed (was 0, is 5)" in str(error.value)
    assert "stage.stage2.batch_size (was 32, is 64)" in str(error.value)
    assert "log_every" not in str(error.value)


def test_config_survives_the_workdir(tmp_path):
    config = compodiff.get_config("smoke")
    workdirs.claim(tmp_path, config)
    again = ConfigDict(workdirs.read_config(tmp_path))
    assert json.loads(again.to_json()) == json.loads(config.to_json())


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run cannot be written .*: choose another"):
        workdirs.claim(tmp_path / "file" / "run", compodiff.get_config("smoke"))


def test_no_workdir_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json, so this is no workdir"):
        workdirs.read_config(tmp_path)


WHOLE = json.loads(compodiff.get_config("smoke").to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"5", "holds int '5' instead of an object"),
        (b"[]", "holds list"),
        (b"null", "holds NoneType"),
        (b"{}", "its field 'composer' is no object"),
        (b'{"composer": {}, "stage": 3}', "its field 'stage' is no object"),
        (b'{"composer": {}, "stage": {"a": []}}', "its field 'stage.a' is no stage"),
        (b'{"composer": {}, "stage": {}}', "it lacks the fields name, .*evaluation, composer.name"),
        (json.dumps({**WHOLE, "evaluation": []}).encode(), "its field 'evaluation' is no object"),
        (b'{"composer": {}, "stage": {}', "not valid JSON"),
        (b'{"composer": "\xff"}', "not valid JSON .*utf-8"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_damaged_config_is_named_wherever_it_is_read(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    config = compodiff.get_config("smoke")
    for read in (
        lambda: workdirs.check(tmp_path, config),
        lambda: workdirs.claim(tmp_path, config),
        lambda: loading.load(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=f"config.json: {message}.*checkpoints beside it"):
            read()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("config.json", content)]


def test_a_config_that_cannot_be_read_or_written_now(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    config = compodiff.get_config("smoke")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(CheckpointError, match="cannot be written .Input/output.*choose"):
            workdirs.claim(tmp_path, config)
        assert not list(tmp_path.iterdir())
    workdirs.claim(tmp_path, config)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", fails)
        with pytest.raises(CheckpointError, match="config.json: cannot be read now .Input/output"):
            workdirs.check(tmp_path, config)
    (tmp_path / ".lock").mkdir()
    with pytest.raises(CheckpointError, match="cannot be locked .Is a directory"):
        with workdirs.only_run(tmp_path):
            pass


@pytest.fixture(scope="module")
def composer(tiny):
    return composers.build("compodiff", tiny[0], depth=1, heads=2, dim_head=8)


@pytest.fixture
def stand_in(tiny, composer):
    """An experiment without data or weights on disk."""
    backbone, params = tiny
    config = compodiff.get_config("smoke")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return experiments.Experiment(config, mesh, backbone, composer, {"backbone": params})


def test_stage_without_the_stage_it_continues(stand_in, tmp_path):
    with pytest.raises(CheckpointError, match="stage 'stage2' continues stage 'stage1'.*init_from"):
        stages.initial_params(stand_in, "stage2", tmp_path, None)


def test_what_a_run_starts_from_is_looked_for_before_it_writes(stand_in, tmp_path):
    stand_in.config.stages = ("stage2",)
    with pytest.raises(CheckpointError, match="stage 'stage2' continues stage 'stage1'.*init_from"):
        stages.start(stand_in, tmp_path)
    stand_in.config.init_from = f"official:{tmp_path / 'none.pt'}"
    with pytest.raises(WeightsError, match="none.pt: no such file"):
        stages.start(stand_in, tmp_path)
    stand_in.config.init_from, stand_in.config.stages = "", ("stage1", "stage2")
    assert stages.start(stand_in, tmp_path) is None


def test_eval_of_a_workdir_without_checkpoint(stand_in, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of stage1, stage2. Train first"):
        runner.trained_params(stand_in, tmp_path)


@functools.cache
def fresh(composer):
    """Compiled once: a state of each seed."""
    return jax.jit(lambda seed: init_state(composer, optax.adam(1e-3), seed=seed, ema=True))


def save(stand_in, directory, seed=3, step=0, **position):
    position = {"next_batch": 8, "steps": 8, "weights_id": stand_in.backbone.weights_id} | position
    state = fresh(stand_in.composer)(seed)
    state = state.replace(step=jax.numpy.int32(step))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(state, position)
    return state


def test_stage_continues_a_given_workdir(stand_in, tmp_path):
    state = save(stand_in, tmp_path / "other" / "stage1")
    stand_in.config.init_from = str(tmp_path / "other")
    found = stages.initial_params(stand_in, "stage2", tmp_path / "new", None)
    jax.tree.map(np.testing.assert_array_equal, found, state.params)
    stand_in.config.init_from = str(tmp_path / "othr")  # never replaced by the workdir's own
    with pytest.raises(CheckpointError, match="no checkpoint in .*othr"):
        stages.initial_params(stand_in, "stage2", tmp_path / "other", None)


def test_stage_does_not_continue_a_half_trained_one(stand_in, tmp_path):
    save(stand_in, tmp_path / "stage1", next_batch=4)
    with pytest.raises(CheckpointError, match="stopped at step 4 of 8.*Finish it first"):
        stages.initial_params(stand_in, "stage2", tmp_path, None)


def test_a_stage_continues_the_best_checkpoint_of_a_finished_one(stand_in, tmp_path, capsys):
    best = save(stand_in, tmp_path / "stage1", step=4, next_batch=4)
    save(stand_in, tmp_path / "stage1", seed=4, step=8)
    scores = Scores(tmp_path / "stage1")
    for step, value in ((2, 9.0), (4, 7.0), (8, 6.0)):  # 2 is no longer there
        scores.add(step, value)
    found = stages.initial_params(stand_in, "stage2", tmp_path, None)
    jax.tree.map(np.testing.assert_array_equal, found, best.params)
    stand_in.config.stages = ("stage1",)
    evaluated = runner.trained_params(stand_in, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, evaluated, best.params)
    assert "evaluating step 4 of 8 of stage1, the best checkpoint" in capsys.readouterr().out


def test_checkpoint_of_other_weights_is_refused(stand_in, tmp_path):
    save(stand_in, tmp_path / "stage1", weights_id="clip@other")
    with pytest.raises(CheckpointError, match="trained on the backbone clip@other, this run has"):
        runner.trained_params(stand_in, tmp_path)


def test_eval_says_when_training_is_unfinished(stand_in, tmp_path, capsys):
    save(stand_in, tmp_path / "stage1")
    (tmp_path / "stage2" / "checkpoints").mkdir(parents=True)  # killed before its first checkpoint
    runner.trained_params(stand_in, tmp_path)
    assert "unfinished training: evaluating step 8 of 8 of stage1" in capsys.readouterr().out


def test_only_one_run_at_a_time_in_a_workdir(tmp_path):
    with workdirs.only_run(tmp_path):
        with pytest.raises(CheckpointError, match="another run is at work there"):
            with workdirs.only_run(tmp_path):
                pass


def test_dataset_that_is_not_prepared(stand_in, tmp_path):
    stand_in.config.data_dir = str(tmp_path)
    with pytest.raises(
        DataError, match="no prepared table shapes_tiny/captions. Run `python launch"
    ):
        inputs.make_pipeline(stand_in, "stage1")
    stand_in.config.stage.stage1.data.dataset = ""
    with pytest.raises(ConfigError, match="stage.stage1.data.dataset is empty"):
        stages.required_tables(stand_in.config)


def test_corrupt_records_are_counted_replaced_and_limited(caplog):
    table = factory.caption_table(8)
    table.records[2]["image"] = b"broken"
    source = Records(table, ("image",), ImageTransform(16, 16), max_corrupt=1)
    np.testing.assert_array_equal(source[2]["image"], source[3]["image"])
    assert source.corrupt == {2}
    assert "record 2, field 'image': not a readable image" in caplog.text
    table.records[5]["image"] = b"broken, too"
    with pytest.raises(DataError, match="more than 1 unreadable records.*record 5"):
        source[5]


@pytest.mark.parametrize("where", ["load", "resize"])
def test_too_little_memory_for_one_image_counts_as_unreadable(where, monkeypatch, caplog):
    table = factory.caption_table(8)
    source = Records(table, ("image",), ImageTransform(16, 16), max_corrupt=1)
    owner = PngImagePlugin.PngImageFile if where == "load" else Image.Image
    original, left = getattr(owner, where), [1]

    def fail(*args, **kwargs):
        if left and left.pop():
            raise MemoryError
        return original(*args, **kwargs)

    expected = source[3]["image"]
    monkeypatch.setattr(owner, where, fail)
    np.testing.assert_array_equal(source[2]["image"], expected)
    assert source.corrupt == {2} and "record 2, field 'image': not a readable" in caplog.text


def test_records_carry_the_limit_of_pixels_to_other_processes(caplog):
    table = factory.caption_table(8)
    table.records[2]["image"] = factory.png(np.random.default_rng(0), size=40)
    with images.limited(0.001):
        source = pickle.loads(pickle.dumps(Records(table, ("image",), ImageTransform(16, 16))))
    assert images.max_megapixels() == 200
    np.testing.assert_array_equal(source[2]["image"], source[3]["image"])
    assert "field 'image' has 40 x 40 pixels, 0.0016 megapixels; the limit is 0.001" in caplog.text
    assert Records(table, ("image",), ImageTransform(16, 16))[2]["id"] == 2


def test_full_disk_is_named(stand_in, small_disk):
    state = fresh(stand_in.composer)(0)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC) + ".*Make room"):
        with Checkpoints(small_disk / "checkpoints") as checkpoints:
            checkpoints.save(state, {})


@pytest.mark.parametrize(
    "name",
    ["compodiff", "pretrain", "slerp", "image_only", "text_only"]
    + ["pic2word", "lincir", "searle", "palavra", "isa"],
)
def test_every_preset_of_every_experiment_builds(name, tiny, tiny_blip):
    config = loading.read_experiment(f"experiments/{name}.py")
    module, traced = __import__(f"experiments.{name}", fromlist=["PRESETS"]), set()
    for preset in module.PRESETS:
        config = module.get_config(preset)
        settings = config.composer.to_dict()
        if "pretrained" in settings:
            settings["pretrained"] = False  # of the hub
        blip = name == "isa" or "blip" in config.backbone
        network = json.dumps([settings, blip])
        composer = composers.build(
            settings.pop("name"), (tiny_blip if blip else tiny)[0], **settings
        )
        if network not in traced:  # presets of one network have other backbones, or data
            jax.eval_shape(composer.init, jax.random.key(0))
            traced.add(network)
        for stage in experiments.stage_names(config):
            recipe = config.stage[stage]
            assert recipe.after in ("", *config.stages) or preset in ("fashioniq", "cirr")
            assert set(recipe.data.tables) <= set(inputs.TABLES)
