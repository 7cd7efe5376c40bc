"""What may be evaluated with what, and that mistakes show before anything is computed."""

import json
import types

import pytest
from ml_collections import ConfigDict

from cir_jax.errors import CheckpointError, DataError
from cir_jax.evaluation import benchmarks, runner
from cir_jax.experiment import evaluation_dtype
from cir_jax.loading import read_experiment
from cir_jax.training import workdir as workdirs
from tests.evaluation import worlds


def test_settings_of_inference_may_differ_from_those_of_the_training_run(tmp_path):
    config = read_experiment("experiments/compodiff.py:smoke")
    workdirs.claim(tmp_path, config)
    config.composer.guidance, config.composer.steps = (1.0, 3.0), 5
    config.composer.samples_per_query, config.composer.source_mixing = 2, 0.2
    workdirs.check(tmp_path, config)
    config.composer.depth = 3
    with pytest.raises(CheckpointError, match=r"differ: composer.depth \(was [0-9]+, is 3\)\."):
        workdirs.check(tmp_path, config)


def test_a_workdir_is_that_of_an_earlier_version_or_of_more_memory(tmp_path):
    config = read_experiment("experiments/searle.py:smoke")
    workdirs.claim(tmp_path, config)
    file = tmp_path / workdirs.CONFIG_FILE
    old = json.loads(file.read_text())
    del old["stage"]["distil"]["composer"]["temperature"]
    old["stage"]["distil"]["composer"]["cached_phrases"] = 7
    file.write_text(json.dumps(old))
    workdirs.check(tmp_path, config)
    config.stage.distil.composer.weight_gpt = 0.5
    with pytest.raises(CheckpointError, match=r"differ: stage.distil.composer.weight_gpt \(was 0"):
        workdirs.check(tmp_path, config)


def test_settings_of_a_method_without_training_may_differ(tmp_path):
    config = read_experiment("experiments/searle_oti.py:smoke")
    workdirs.claim(tmp_path, config)
    config.composer.starts, config.composer.words = 3, "words"
    workdirs.check(tmp_path, config)


def test_a_workdir_of_before_evaluation_had_its_own_type_says_so(tmp_path, capsys):
    config = read_experiment("experiments/searle.py:vit_b32")
    workdirs.claim(tmp_path, config)
    experiment = types.SimpleNamespace(config=config, composer=types.SimpleNamespace(trained=False))
    runner.trained_params(experiment, tmp_path)
    assert not capsys.readouterr().out
    file = tmp_path / workdirs.CONFIG_FILE
    old = json.loads(file.read_text())
    del old["evaluation"]["dtype"]
    file.write_text(json.dumps(old))
    workdirs.check(tmp_path, config)
    assert evaluation_dtype(ConfigDict(workdirs.read_config(tmp_path))) == "float32"
    runner.trained_params(experiment, tmp_path)
    said = capsys.readouterr().out
    assert "which evaluated in bfloat16; now it is float32, so numbers may differ" in said
    config.evaluation.dtype = "bfloat16"  # as it says
    runner.trained_params(experiment, tmp_path)
    assert not capsys.readouterr().out


def fake_experiment(*names, **evaluation):
    """Just enough to reach the benchmarks."""
    config = read_experiment("experiments/slerp.py:smoke")
    config.evaluation.benchmarks = names
    for name, value in evaluation.items():
        config.evaluation[name] = value
    composer = types.SimpleNamespace(pretrained_backbone=True)
    return types.SimpleNamespace(config=config, composer=composer, data_dir=None, mesh=None,
                                 frozen={})  # fmt: skip


def test_all_benchmarks_are_read_before_the_first_is_evaluated(tmp_path, monkeypatch):
    seen = []

    def load(name, split, directory, *, allow_partial):
        seen.append((name, split, allow_partial))
        if name == "b":
            raise DataError("record 3 is broken")
        return worlds.benchmark()

    monkeypatch.setattr(benchmarks, "load", load)
    monkeypatch.setattr(runner, "evaluate_with_baselines", lambda *a, **k: pytest.fail("too soon"))
    experiment = fake_experiment("a", "b", split="val", allow_partial=True)
    with pytest.raises(DataError, match="record 3 is broken"):
        runner.run(experiment, {}, tmp_path / "out")
    assert seen == [("a", "val", True), ("b", "val", True)]
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written_is_named_first(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "load", lambda *a, **k: pytest.fail("too soon"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out: nothing can be written there.*--output"):
        runner.run(fake_experiment("a"), {}, tmp_path / "file" / "out")


def test_each_benchmark_has_its_own_default_split():
    assert read_experiment("experiments/slerp.py:smoke").evaluation.split == ""
    splits = {name: benchmarks.find(name).split for name in ("shapes/circo", "circo", "cirr")}
    assert splits == {"shapes/circo": "test_0", "circo": "val", "cirr": "val"}
