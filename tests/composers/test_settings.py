"""Settings that cannot work are refused by name; those of query time may change in a workdir."""

import math

import pytest

from cir_jax import composers
from cir_jax.errors import CheckpointError, ConfigError
from cir_jax.loading import read_experiment
from cir_jax.training import workdir as workdirs


@pytest.mark.parametrize("alpha", [5, -0.1, 1.0001, math.nan])
def test_the_share_of_the_text_lies_between_none_and_all(tiny, alpha):
    with pytest.raises(ConfigError, match=f"alpha={alpha}; the share of the text lies in 0..1"):
        composers.build("slerp", tiny[0], alpha=alpha)
    assert [composers.build("slerp", tiny[0], alpha=x).alpha for x in (0, 0.5, 1)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("palavra", "weight_object"),
        ("palavra", "refine_learning_rate"),
        ("lincir", "noise"),
        ("searle", "weight_gpt"),
        ("searle", "weight_distil"),
    ],
)
def test_negative_weights_are_refused(tiny, name, field):
    with pytest.raises(ConfigError, match=f"{field}=-0.5: expected 0 or more"):
        composers.build(name, tiny[0], **{field: -0.5})


@pytest.mark.parametrize(
    ("name", "free", "fixed"),
    [
        (
            "palavra",
            {"coarse": "shape", "refine_steps": 100, "refine_learning_rate": 0.05},
            {"hidden_dim": 7},
        ),
        ("pic2word", {"link": ","}, {"dropout": 0.4}),
    ],
)
def test_settings_of_query_time_need_no_new_training(tmp_path, name, free, fixed):
    config = read_experiment(f"{name}:smoke")
    workdirs.claim(tmp_path, config)
    config.composer.update(free)
    workdirs.check(tmp_path, config)
    config.composer.update(fixed)
    with pytest.raises(CheckpointError, match=rf"differ: composer.{next(iter(fixed))} \(was"):
        workdirs.check(tmp_path, config)
