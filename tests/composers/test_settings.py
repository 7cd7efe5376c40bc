"""Settings that cannot work are refused by name; those of query time may change in a workdir."""

import math

import jax
import numpy as np
import pytest

from cir_jax import composers
from cir_jax.composers.slerp import slerp
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
        ("pic2word", {"link": ",", "image_weight": 0.2}, {"dropout": 0.4}),
        ("isa", {"image_weight": 0.2}, {"tokens": 4}),
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


@pytest.mark.parametrize("around", ["", "rtd"])
def test_the_image_has_a_share_in_a_pseudo_words_query(tiny, around):
    """Slerp of any of these methods' queries and the reference image: one setting."""
    backbone, frozen = tiny[0], {"backbone": tiny[1]}

    def build(**shared):
        word = {"name": "pic2word", "hidden_dim": 8, **shared}
        return (
            composers.build(around, backbone, word=word)
            if around
            else composers.build(**word, backbone=backbone)
        )

    plain, mixed, image = build(), build(image_weight=0.3), build(image_weight=1.0)
    params = (
        plain.start(jax.random.key(0), frozen)
        if not around
        else plain.take_over(plain.word.init(jax.random.key(0)), frozen)
    )
    query = {
        "reference_features": np.random.default_rng(0).standard_normal((3, backbone.dim)) * 2,
        "token_ids": backbone.tokenizer([plain.prompt(text) for text in ("is red", "two", "")]),
    }
    query["reference_features"] = query["reference_features"].astype(np.float32)
    found = [c.compose(params, frozen, query, jax.random.key(0)) for c in (plain, mixed, image)]
    features = query["reference_features"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(found[1], slerp(unit, found[0], 0.7), atol=1e-6)
    np.testing.assert_allclose(found[2], unit, atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 0.01
    with pytest.raises(ConfigError, match="image_weight=1.5: the image's share lies in 0..1"):
        build(image_weight=1.5)


def test_what_has_no_pseudo_word_has_no_share_to_give(tiny):
    with pytest.raises(ConfigError, match="setting of composer combiner: 'image_weight'"):
        composers.build("combiner", tiny[0], image_weight=0.5)
