"""`config.checkpoint.best`: what it may say, and that it looks at the validation split alone."""

import types

import pytest

from cir_jax import composers
from cir_jax.errors import ConfigError
from cir_jax.evaluation import benchmarks, selection
from cir_jax.evaluation.evaluate import evaluate
from cir_jax.experiment import Experiment
from experiments import base
from tests.evaluation import worlds


def config(best, **composer):
    made = base.experiment("lincir", {"name": "lincir", **composer})
    made.checkpoint.best = best
    return made


def test_nothing_is_scored_unless_asked_for():
    assert selection.wanted(config("")) is None and selection.required(config("")) == {}
    old = config("")
    del old.checkpoint.best
    assert selection.wanted(old) is None


def test_benchmark_and_metric():
    assert selection.wanted(config("cirr R@1")) == ("cirr", "R@1")
    small = config("fashioniq:small_gallery Avg")
    assert selection.wanted(small) == ("fashioniq:small_gallery", "Avg")
    assert selection.required(small) == {"fashioniq": {"queries", "gallery"}}


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ("cirr", r"best='cirr': expected a benchmark and one of its metrics, as in 'cirr R@1'"),
        ("crr R@1", "'crr'. Did you mean 'cirr'. Valid: annotated, circo, .*shapes/circo"),
        ("cirr R@3", "unknown metric of cirr in .*'R@3'. Did.* Valid: Avg, R@1, R@10, R@5, R@50"),
        ("coco_object mean rank", "unknown benchmark"),
        ("cirr/inversion R@1", "unknown benchmark to choose a checkpoint by"),
        ("shapes/captions R@1", "unknown benchmark"),
    ],
)
def test_mistakes_list_what_there_is(best, message):
    with pytest.raises(ConfigError, match=message):
        selection.wanted(config(best))


def experiment(tiny, best, composer=worlds.ColourOracle):
    made = composer(tiny[0])
    return types.SimpleNamespace(
        config=config(best), backbone=tiny[0], composer=made, data_dir="data",
        mesh=worlds.mesh(1), frozen={"backbone": tiny[1]},
    )  # fmt: skip


def test_the_score_is_the_metric_on_val(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path))
    asked = []

    def load(name, split, directory, *, allow_partial):
        asked.append((name, split, directory, allow_partial))
        return worlds.benchmark()

    monkeypatch.setattr(benchmarks, "load", load)
    made = experiment(tiny, "shapes/circo mAP@5")
    made.config.evaluation.split = "test_0"  # of the evaluation, not of the choice
    scorer = selection.scorer(made)
    assert asked == [("shapes/circo", "val", "data", False)]
    assert scorer.metric == "val/shapes/circo mAP@5"
    expected = evaluate(made.composer, {}, made.frozen, worlds.benchmark(), mesh=made.mesh)
    assert scorer.measure({}) == expected.metrics["mAP@5"].value > 0


def test_scores_say_what_they_depend_on(tiny, monkeypatch):
    monkeypatch.setattr(benchmarks, "load", lambda *_, **__: worlds.benchmark())
    made = config("shapes/circo mAP@5", refine_steps=3, hidden_dim=16)
    made.composer.name = "palavra"
    made.dtype = "bfloat16"  # that of training
    backbone = tiny[0].with_dtype(made.dtype)
    composer = composers.build("palavra", backbone, refine_steps=3, hidden_dim=16)
    frozen = composer.freeze(tiny[1])
    experiment = Experiment(made, worlds.mesh(1), backbone, composer, frozen)
    settings = selection.scorer(experiment).settings
    assert settings["evaluation.dtype"] == "float32" and "data" in settings
    assert settings["composer.refine_steps"] == 3 and "composer.hidden_dim" not in settings
    made.evaluation.dtype = "bfloat16"
    assert selection.scorer(experiment).settings["evaluation.dtype"] == "bfloat16"


def test_a_backbone_that_is_trained_has_no_queries(tiny):
    composer = types.SimpleNamespace(pretrained_backbone=False)
    made = experiment(tiny, "cirr R@1", lambda _: composer)
    with pytest.raises(ConfigError, match="trains a backbone, which composes no queries"):
        selection.scorer(made)
