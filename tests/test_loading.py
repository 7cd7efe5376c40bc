"""`cir_jax.load` by a method's name: no file paths, from any directory, beside anything."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cir_jax
from cir_jax import experiment as experiments
from cir_jax import loading
from cir_jax.composers import official
from cir_jax.errors import CheckpointError, ConfigError, WeightsError
from cir_jax.retrieval import features


def test_a_method_by_its_name_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slerp").mkdir()  # no workdir: it holds no config
    theirs = types.ModuleType("experiments")
    monkeypatch.setitem(sys.modules, "experiments", theirs)  # of the program that uses us
    monkeypatch.delitem(sys.modules, "experiments.base", raising=False)  # of another test
    for given in ({"what": "slerp"}, {"config": "slerp:shapes"}, {"what": "experiments/slerp.py"}):
        assert cir_jax.load(**given).composer.alpha == 0.8
    assert sys.modules["experiments"] is theirs and "experiments.base" not in sys.modules


def test_an_experiment_of_ones_own_has_our_neighbours(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from experiments import base, slerp\n"
        "def get_config(preset='shapes'):\n"
        "    config = slerp.get_config(preset)\n"
        "    config.composer.alpha = 0.25\n"
        "    return config\n"
    )
    assert cir_jax.load(own).composer.alpha == 0.25
    assert loading.read_experiment(f"{own}:smoke").preset == "smoke"


def test_a_backbone_brings_the_preset_that_was_made_for_it():
    large = "openai/clip-vit-large-patch14"
    assert loading.read_experiment("searle", large).preset == "vit_l14"
    assert loading.read_experiment("searle:shapes", large).preset == "shapes"
    assert loading.read_experiment("searle", "my/clip").preset == "shapes"


def test_the_authors_weights_of_a_trained_method(tmp_path):
    pytest.importorskip("torch")
    fresh = cir_jax.load("slerp")
    from cir_jax.composers.searle import Searle

    composer = Searle(fresh.composer.backbone)
    params = jax.device_get(jax.jit(composer.init)(jax.random.key(3)))
    official.save(composer, tmp_path / "phi.pt", params, fresh.frozen)
    search = cir_jax.load("searle", backbone="data/shapes/clip", weights=tmp_path / "phi.pt")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(search.params), params)
    with pytest.raises(WeightsError, match="no such file"):
        cir_jax.load("searle", weights=tmp_path / "nowhere.pt")


def test_it_answers_as_the_evaluation_does(monkeypatch):
    """What was trained in bfloat16 is searched in float32, as `eval.py` evaluates it."""
    config = loading.read_experiment("lincir:smoke")
    config.dtype, config.init_from = "bfloat16", "official:phi.pt"
    trained = experiments.setup(config)
    params = jax.jit(trained.composer.init)(jax.random.key(3))
    monkeypatch.setattr(loading, "trained_params", lambda *_: params)
    search = cir_jax.load(config=config)
    made = experiments.for_evaluation(trained)
    rng = np.random.default_rng(0)
    backbone = made.backbone
    ids = backbone.tokenizer([made.composer.prompt("is red")] * 8)
    images = rng.normal(size=(8, backbone.dim)).astype(np.float32)

    def compose(experiment):
        return features.query_features(
            experiment.composer,
            params,
            experiment.frozen,
            ids,
            np.arange(8),
            reference_features=images,
            mesh=search.mesh,
        )

    ours = compose(search)
    np.testing.assert_array_equal(ours, compose(made))
    assert 1e-5 < np.abs(ours - compose(trained)).max() < 0.1
    half = cir_jax.load(config=config, dtype="bfloat16")
    assert half.composer.backbone.dtype.name == "bfloat16"
    half = cir_jax.load("slerp", dtype=jnp.bfloat16)  # as for `weights.load`
    assert half.composer.backbone.dtype.name == "bfloat16"
    assert cir_jax.load("slerp").composer.backbone.dtype.name == "float32"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"what": "slerp", "dtype": "float16"}, ConfigError, "dtype 'float16'. Did you mean"),
        ({"what": "slrp"}, ConfigError, "workdir or method 'slrp'. Did you mean 'slerp'"),
        ({"what": "/tmp"}, CheckpointError, "no config.json"),
        ({"config": "slrp"}, ConfigError, "Did you mean 'slerp'"),
        ({"config": "experiments/slrp.py"}, ConfigError, "is no file"),
        ({"what": "slerp", "config": "text_only"}, ConfigError, "both name a method"),
        ({"what": "searle"}, ConfigError, "give the workdir .* or weights='PATH'"),
        ({}, ConfigError, "a method \\(artemis, "),
        ({"what": "pretrain"}, ConfigError, "trains a backbone: export it"),
        ({"what": "slerp:vit_x"}, ConfigError, "vit_x"),
    ],
)
def test_what_cannot_be_loaded_says_so(given, error, message):
    with pytest.raises(error, match=message):
        cir_jax.load(**given)


def test_weights_go_with_a_method_not_with_a_workdir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="or a workdir, not both"):
        cir_jax.load(tmp_path, config="searle", weights="phi.pt")
