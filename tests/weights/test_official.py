"""--config.init_from=official:PATH and --config.export_to, whatever the method."""

import jax
import numpy as np
import pytest

from cir_jax import composers
from cir_jax import experiment as experiments
from cir_jax.composers import official
from cir_jax.errors import CheckpointError, ConfigError, WeightsError
from cir_jax.evaluation import runner
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training import stages
from cir_jax.weights import official as files
from cir_jax.weights import torch_files
from experiments import compodiff, lincir

torch = pytest.importorskip("torch")


def stand_in(tiny, module, **settings):
    """An experiment without data, and parameters of its composer."""
    backbone, params = tiny
    config = module.get_config("smoke")
    config.composer.update(settings)
    named = config.composer.to_dict()
    composer = composers.build(named.pop("name"), backbone, **named)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    made = experiments.Experiment(config, mesh, backbone, composer, composer.freeze(params))
    return made, jax.device_get(jax.jit(composer.init)(jax.random.key(7)))


@pytest.fixture(scope="module")
def made(tiny):
    return stand_in(tiny, lincir)


def test_export_then_evaluation_and_training_start_there(made, tmp_path, capsys, monkeypatch):
    experiment, params = made
    experiment.config.export_to = str(tmp_path / "phi.pt")
    stages.export(experiment, params)
    experiment.config.init_from = f"official:{tmp_path / 'phi.pt'}"
    found = runner.trained_params(experiment, tmp_path / "no_workdir")
    assert "evaluating the weights of official:" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
    starts = {}

    class Trainer:
        def __init__(self, name, initial):
            self.name, self.initial = name, initial

        def run(self, directory):
            starts[self.name] = self.initial
            return "trained"

    def make_trainer(experiment, name, initial, workdir, scorer):
        return Trainer(name, initial)

    monkeypatch.setattr(stages, "make_trainer", make_trainer)
    assert stages.train(experiment, tmp_path) == "trained"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(starts["smp"]), params)
    experiment.config.init_from = ""
    with pytest.raises(CheckpointError, match="no checkpoint of smp. Train first"):
        runner.trained_params(experiment, tmp_path / "no_workdir")


def test_later_stages_continue_the_first(tiny, tmp_path, monkeypatch):
    experiment, params = stand_in(tiny, compodiff, depth=1, heads=2, dim_head=8)
    file = tmp_path / "compodiff.pt"
    official.save(experiment.composer, file, params, experiment.frozen)
    assert set(torch.load(file, weights_only=True)) == {"ema_model"}
    experiment.config.init_from = f"official:{file}"
    starts, scorers = [], []

    class Trainer:
        def __init__(self, initial):
            self.initial = initial

        def run(self, directory):
            starts.append(self.initial)
            return directory.name

    def make_trainer(experiment, name, initial, workdir, scorer):
        scorers.append(scorer)
        return Trainer(initial)

    monkeypatch.setattr(stages, "make_trainer", make_trainer)
    assert stages.train(experiment, tmp_path, "scorer") == "stage2"
    assert scorers == [None, "scorer"]  # a stage that another continues answers no queries yet
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(starts[0]), params)
    assert starts[1] == "stage1"


def test_mistakes_are_named(made, tiny, tmp_path):
    experiment, params = made
    slerp = composers.build("slerp", tiny[0])
    with pytest.raises(ConfigError, match="init_from=official:x: Slerp has no official checkp"):
        official.load(slerp, official.given("official:x"), {})
    with pytest.raises(ConfigError, match="write official:PATH"):
        official.given("official:")
    assert official.given("runs/other") == ()
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="noise.pt: not a"):
        official.load(experiment.composer, tmp_path / "noise.pt", experiment.frozen)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "bare.pt")
    with pytest.raises(WeightsError, match=r"under 'Phi'; it holds \(tensors\)"):
        official.load(experiment.composer, tmp_path / "bare.pt", experiment.frozen)


def test_parts_of_a_file(tmp_path):
    content = {"epoch": 3, "a": {"module.x": torch.ones(2)}, "y": torch.zeros(1)}
    torch.save(content, tmp_path / "f.pt")
    parts = torch_files.read_parts(tmp_path / "f.pt")
    assert {name: list(part) for name, part in parts.items()} == {"a": ["x"], "": ["y"]}
    np.testing.assert_array_equal(parts["a"]["x"], [1, 1])


def test_torch_is_asked_for_before_anything_is_computed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ConfigError, match=r"export_to='x': only PyTorch.*cir_jax\[torch\]"):
        files.check_torch("config.export_to='x'")
