"""Corpora of features: the same rows as from images, in a fraction of the bytes."""

import dataclasses
import json
import os

import numpy as np
import pytest

from cir_jax import experiment as experiments
from cir_jax import loading, weights
from cir_jax.errors import ConfigError, DataError
from cir_jax.input.tables import Table
from cir_jax.training import inputs
from data import build, features, shards

CLIP = "data/shapes/clip"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`shapes_tiny` as images, and `few`, its features."""
    path = tmp_path_factory.mktemp("data")
    build.prepare("shapes_tiny", ["captions", "masked", "triplets"], path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TOGETHER", 50)
        folders = features.prepare("shapes_tiny", CLIP, "few", None, path, batch_size=64)
    assert set(folders) == {"captions", "masked", "triplets"}
    return path


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.array_record*"))


@pytest.fixture(scope="module")
def experiment(built):
    config = loading.read_experiment("compodiff:smoke")
    config.data_dir = str(built)
    made = experiments.setup(config)
    made.config.stage.stage2.batch_size = 40
    return made


def batch(experiment, dataset, **data):
    changed = experiment.config.copy_and_resolve_references()
    changed.stage.stage2.data.dataset = dataset
    changed.stage.stage2.data.update(data)
    made = dataclasses.replace(experiment, config=changed)
    return inputs.make_pipeline(made, "stage2").example()


def test_training_reads_the_same_rows(built, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "default_cache_dir", lambda: tmp_path)
    ours, theirs = batch(experiment, "few"), batch(experiment, "shapes_tiny")
    assert set(ours) == set(theirs) >= {"mask", "has_reference", "reference_features"}
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
    # of the three objectives 30 %, 30 % and 40 %
    masked = ours["mask"].any(axis=(1, 2))
    assert abs(masked.sum() - 12) <= 1
    assert abs((ours["has_reference"] & ~masked).sum() - 16) <= 1
    for table in ("captions", "masked", "triplets"):
        few = Table(built, "few", table, "train")[0]
        assert not any(isinstance(value, bytes) and len(value) > 600 for value in few.values())
        assert size(built / "few" / table) < 0.5 * size(built / "shapes_tiny" / table)


def test_features_of_others_are_refused(built, experiment, tmp_path):
    backbone = dataclasses.replace(experiment.backbone, weights_id="other@123")
    other = dataclasses.replace(experiment, backbone=backbone)
    own = experiment.backbone.weights_id
    with pytest.raises(ConfigError) as error:
        batch(other, "few")
    assert f"image features of other weights, {own}, than" in str(error.value)
    assert "has, other@123. Prepare them again" in str(error.value)
    squashed = experiment.backbone.with_preprocessing("squash")
    with pytest.raises(ConfigError, match="image features of other preprocessing"):
        batch(dataclasses.replace(experiment, backbone=squashed), "few")
    with pytest.raises(
        ConfigError, match="holds features and no images: set --config.stage.stage2"
    ):
        batch(experiment, "few", features=False)
    weights.save(tmp_path / "clip", *_changed())
    with pytest.raises(DataError, match="few/captions/1.0.0 is there already, of clip@"):
        features.prepare("shapes_tiny", str(tmp_path / "clip"), "few", ["captions"], built)
    before = (built / "few" / "captions" / "1.0.0" / build.MARK).read_text()
    features.prepare("shapes_tiny", CLIP, "few", ["captions"], built)  # nothing to do
    assert (built / "few" / "captions" / "1.0.0" / build.MARK).read_text() == before


def _changed():
    backbone, params = weights.load(CLIP)
    params["visual_projection"]["kernel"] = params["visual_projection"]["kernel"] * 1.5
    return backbone, params


def test_names_and_tables_that_cannot_be(built):
    for name in (None, "shapes_tiny", "../x"):
        with pytest.raises(DataError, match=f"--name={name}: what the features are called"):
            features.prepare("shapes_tiny", CLIP, name, None, built)
    with pytest.raises(DataError, match="unknown table with images: 'caption'. Did you mean"):
        features.prepare("shapes_tiny", CLIP, "x", ["caption"], built)
    with pytest.raises(DataError, match="no_such: none of the tables captions, .* is prepared"):
        features.prepare("no_such", CLIP, "x", None, built)


def test_a_killed_build_goes_on_behind_its_shards(built, tmp_path, monkeypatch):
    whole = Table(built, "few", "masked", "train")
    os.symlink(built / "shapes_tiny", tmp_path / "shapes_tiny")
    monkeypatch.setattr(features, "TOGETHER", 16)
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    compute, calls = features.image_features, []

    def stopping(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 9 and os.environ.get("STOP"):
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(features, "image_features", stopping)
    monkeypatch.setenv("STOP", "1")
    arguments = ("shapes_tiny", CLIP, "few", ["masked"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        features.prepare(*arguments, batch_size=16)
    kept = shards.finished_shards(tmp_path / "few" / "masked" / ".building")
    assert kept
    monkeypatch.delenv("STOP")
    calls.clear()
    features.prepare(*arguments, batch_size=16)
    again = Table(tmp_path, "few", "masked", "train")
    assert len(calls) < 12 and len(again) == len(whole)
    for i in range(len(whole)):
        one, other = dict(whole[i]), dict(again[i])
        assert one["mask"] == other["mask"] and one["captions"] == other["captions"]
        np.testing.assert_allclose(one["masked"], other["masked"], atol=5e-5)
    mark = json.loads((tmp_path / "few/masked/1.0.0" / build.MARK).read_text())
    assert mark["features"]["dim"] == len(whole[0]["image"]) and mark["splits"]["train"]["complete"]
