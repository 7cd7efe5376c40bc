"""Inversion stages: stored once, resumed after a kill, never mixed with other words."""

import copy
import dataclasses
import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from ml_collections import ConfigDict

from cir_jax import composers
from cir_jax.errors import CheckpointError, ConfigError, DataError, WeightsError
from cir_jax.experiment import Experiment
from cir_jax.sharding import mesh as meshes
from cir_jax.sharding import placement
from cir_jax.training import inversion
from cir_jax.weights import oti_tokens
from experiments import base
from launch import ending
from tests import tiny as factory

ROWS, BATCH = 20, 8
BOOK = {
    "templates": ["a photo of {}", "make it {}"],
    "concepts": {"star": ["a photo of star that is red"], "circle": ["a photo of circle"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, backbone, params, composer), made once: each composer is compiled anew."""
    file = tmp_path_factory.mktemp("book") / "phrases.json"
    file.write_text(json.dumps(BOOK))
    settings = {"name": "searle_oti", "phrases": str(file), "top_k": 2, "iterations": 2}
    backbone, params = factory.backbone()
    kwargs = {k: v for k, v in settings.items() if k != "name"}
    return settings, backbone, params, composers.build("searle_oti", backbone, **kwargs)


@pytest.fixture
def table():
    return factory.caption_table(ROWS)


@pytest.fixture
def experiment(made, table, tmp_path, monkeypatch):
    """A function: devices -> experiment with stage `oti` over the table."""
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inversion, "SHARD_ROWS", 8)
    monkeypatch.setattr(inversion, "Table", lambda *args: table)
    settings, backbone, params, composer = made

    def build(devices=1):
        config = base.experiment("test", settings)
        config.stage.oti = base.inversion_stage(composer={}, table="captions", batch_size=BATCH)
        mesh = meshes.make_mesh({"data": -1}, jax.devices()[:devices])
        frozen = placement.place(mesh, composer.freeze(params))
        return Experiment(config, mesh, backbone, composer, frozen)

    return build


def shards(directory):
    return sorted(p.name for p in directory.glob("words_*"))


def test_words_are_stored_in_record_order_the_same_on_one_device(experiment, table, tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    for workdir, devices in ((one, 1), (eight, 8)):
        inversion.run(experiment(devices), "oti", workdir)
        assert shards(workdir / "oti") == [f"words_0000{i}.array_record" for i in range(3)]
    ours = experiment()
    words = np.stack(inversion.read(ours, "oti", eight, table))
    assert words.shape == (ROWS, 32) and words.dtype == np.float32
    np.testing.assert_allclose(words, inversion.read(ours, "oti", one, table), rtol=1e-5, atol=1e-5)
    # the image's own word, from its record number
    image = ours.composer.backbone.image_transform
    from cir_jax.input.images import decode

    pixels = np.stack([image(decode(table[i]["image"], "x")) for i in (0, 13)])
    features = jax.jit(ours.backbone.encode_image)(ours.frozen["backbone"], pixels)
    query = {"reference_features": features, "query_index": np.asarray([0, 13])}
    alone = jax.jit(ours.composer.invert)({}, ours.frozen, query, jax.random.key(0))
    np.testing.assert_allclose(words[[0, 13]], alone, rtol=1e-4, atol=1e-5)
    identity = inversion.read_identity(eight / "oti")
    stored, concepts = inversion.Store(eight / "oti", identity).read()
    np.testing.assert_array_equal(stored, words)
    assert concepts.shape == (ROWS, 2) and (np.sort(concepts, axis=1) == [0, 1]).all()


def test_a_killed_stage_goes_on_to_the_same_words(experiment, table, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    inversion.run(experiment(), "oti", whole)

    class Killed(BaseException):
        pass

    write = inversion.Store.write

    def dies(self, index, rows):
        if index == 1:
            (self.directory / ".words.half").write_bytes(b"half a shard")
            raise Killed
        write(self, index, rows)

    monkeypatch.setattr(inversion.Store, "write", dies)
    with pytest.raises(Killed):
        inversion.run(experiment(), "oti", killed)
    assert shards(killed / "oti") == ["words_00000.array_record"]
    with pytest.raises(CheckpointError, match="8 of 20 images are inverted"):
        inversion.read(experiment(), "oti", killed, table)
    monkeypatch.setattr(inversion.Store, "write", write)
    inverted = []
    monkeypatch.setattr(
        inversion.Store, "write", lambda self, i, rows: (inverted.append(i), write(self, i, rows))
    )
    inversion.run(experiment(), "oti", killed)
    inversion.run(experiment(), "oti", killed)  # finished: nothing to do
    assert inverted == [1, 2]
    assert not list((killed / "oti").glob(".words*"))  # what the kill left behind
    first, second = (inversion.read(experiment(), "oti", d, table) for d in (whole, killed))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_finished_shards(experiment, table, tmp_path, monkeypatch, number):
    class Stops(array_record_module.ArrayRecordWriter):
        def write(self, record):
            super().write(record)
            if len(shards(tmp_path / "oti")) == 1:
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(array_record_module, "ArrayRecordWriter", Stops)
        ending.run(lambda: inversion.run(experiment(), "oti", tmp_path))
    assert caught.value.code == 128 + number
    left = sorted(path.name for path in (tmp_path / "oti").iterdir())
    assert left == ["identity.json", "words_00000.array_record"]
    inversion.run(experiment(), "oti", tmp_path)
    assert np.isfinite(inversion.read(experiment(), "oti", tmp_path, table)).all()


def test_a_full_disk_is_named_and_leaves_no_half_shard(experiment, table, tmp_path, monkeypatch):
    class Full(array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            if len(shards(tmp_path / "oti")) == 1:  # as the library reports it
                raise RuntimeError(f"Failed to write: {os.strerror(errno.ENOSPC)}")

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(
            CheckpointError, match="words_00001.*cannot be written .No space left.*are kept"
        ):
            inversion.run(experiment(), "oti", tmp_path)
    left = sorted(path.name for path in (tmp_path / "oti").iterdir())
    assert left == ["identity.json", "words_00000.array_record"]


def test_unreadable_images_get_no_word_and_are_counted(experiment, table, tmp_path, capsys):
    table.records[5]["image"] = b"no image"
    inversion.run(experiment(), "oti", tmp_path)
    assert "1 of them unreadable" in capsys.readouterr().out
    words = inversion.read(experiment(), "oti", tmp_path, table)
    assert np.isnan(words[5]).all() and np.isfinite(np.delete(words, 5, axis=0)).all()


def test_words_that_are_not_finite_are_no_unreadable_images(experiment, table, tmp_path):
    """A word may have no value though its image decodes; the shards before it stay."""
    table.records[5]["image"] = b"no image"
    ours = experiment()
    composer = copy.copy(ours.composer)

    def invert(params, frozen, query, rng):
        words = jnp.ones((len(query["query_index"]), ours.backbone.token_dim))
        return words / (query["query_index"] != 9)[:, None]

    composer.invert = invert
    ours = dataclasses.replace(ours, composer=composer)
    message = (
        r"pseudo-words of stage oti: not finite, .*: MemoryTable\(memory\), record 9. Computed in "
        "float32 with tiny@0: its learning rate is too high, or these weights"
    )
    with pytest.raises(WeightsError, match=message):
        inversion.run(ours, "oti", tmp_path)
    assert shards(tmp_path / "oti") == ["words_00000.array_record"]


def test_words_of_an_earlier_version_are_taken_up(experiment, table, tmp_path):
    inversion.run(experiment(), "oti", tmp_path)
    file = tmp_path / "oti" / "identity.json"
    identity = json.loads(file.read_text())
    assert "cached_phrases" not in identity["composer"]
    del identity["composer"]["schedule"], identity["composer"]["starts"]
    file.write_text(json.dumps(identity))
    inversion.run(experiment(), "oti", tmp_path)
    identity["composer"]["schedule"] = "cosine"
    file.write_text(json.dumps(identity))
    with pytest.raises(CheckpointError, match="composer.schedule .was 'cosine', is 'constant'"):
        inversion.run(experiment(), "oti", tmp_path)


def test_words_of_something_else_are_refused(experiment, table, tmp_path, made):
    inversion.run(experiment(), "oti", tmp_path)
    ours = experiment()
    ours.config.composer.iterations = 3
    ours.config.seed = 1
    expected = r"these differ: composer.iterations \(was 2, is 3\); seed \(was 0, is 1\)"
    with pytest.raises(CheckpointError, match=expected):
        inversion.run(ours, "oti", tmp_path)
    ours = dataclasses.replace(experiment(), backbone=made[1].with_dtype(jnp.bfloat16))
    expected = r"dtype \(was 'float32', is 'bfloat16'\)\. .* --config.evaluation.dtype=float32\."
    with pytest.raises(CheckpointError, match=expected):
        inversion.run(ours, "oti", tmp_path)
    other = jax.tree.map(lambda x: x * 2, made[2])
    ours = dataclasses.replace(experiment(), frozen=experiment().frozen | {"backbone": other})
    with pytest.raises(CheckpointError, match="these differ: parameters"):
        inversion.run(ours, "oti", tmp_path)
    table.records[3] = dict(table.records[4])  # one image changed
    with pytest.raises(CheckpointError, match="these differ: images"):
        inversion.run(experiment(), "oti", tmp_path)
    with pytest.raises(CheckpointError, match="holds the words of other images"):
        inversion.read(experiment(), "oti", tmp_path, table)


def test_damaged_files_are_named(experiment, table, tmp_path):
    with pytest.raises(CheckpointError, match="no images are inverted there"):
        inversion.read(experiment(), "oti", tmp_path, table)
    inversion.run(experiment(), "oti", tmp_path)
    shard = tmp_path / "oti" / "words_00001.array_record"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    words = inversion.read(experiment(), "oti", tmp_path, table)
    assert np.isfinite(words[7]).all()
    with pytest.raises(CheckpointError, match=r"words_00001.array_record: damaged .*Delete it"):
        words[8]
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "oti" / "identity.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="identity.json: not valid JSON"):
            inversion.run(experiment(), "oti", tmp_path)


def test_stages_that_cannot_run(experiment, table, tmp_path, made):
    text = inversion.describe(experiment(), "oti")
    assert "20 images of MemoryTable(memory)" in text and "iterations=2" in text
    ours = experiment()
    ours.config.stage.oti.batch_size = 0
    with pytest.raises(ConfigError, match="stage.oti.batch_size=0"):
        inversion.describe(ours, "oti")
    ours = experiment()
    ours.config.stage.oti.data.tables = ConfigDict({"captions": 1.0, "images": 1.0})
    with pytest.raises(ConfigError, match="reads one table, not captions, images"):
        inversion.run(ours, "oti", tmp_path)
    ours = dataclasses.replace(experiment(), composer=composers.build("image_only", made[1]))
    with pytest.raises(ConfigError, match="ImageOnly does not invert images"):
        inversion.run(ours, "oti", tmp_path)
    table.records.clear()
    with pytest.raises(DataError, match="holds no images to invert"):
        inversion.run(experiment(), "oti", tmp_path)
    assert not (tmp_path / "oti").exists()


def test_words_are_exported_as_the_released_code_stores_them(experiment, table, tmp_path):
    pytest.importorskip("torch")
    table.records[5]["image"] = b"no image"
    inversion.run(experiment(), "oti", tmp_path)
    inversion.export(tmp_path / "oti", tmp_path / "official", tmp_path)
    words = inversion.read(experiment(), "oti", tmp_path, table)
    official = oti_tokens.read(tmp_path / "official", 32)
    assert list(official) == [str(i) for i in range(ROWS) if i != 5]
    np.testing.assert_array_equal(official["7"], words[7])
