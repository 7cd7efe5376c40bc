"""Checkpoints in a bucket: a damaged one is moved away, object by object, and the run goes on."""

import pytest

from cir_jax.storage import buckets
from cir_jax.training import logs
from tests import object_store
from tests.training.line import trainer


@pytest.fixture
def bucket(monkeypatch):
    with object_store.serving(monkeypatch) as address:
        yield buckets.place(address)


def losses(directory):
    return [(row["step"], row["loss"]) for row in logs.read(directory / "metrics.jsonl")]


def test_a_damaged_checkpoint_is_passed_over(bucket, tmp_path, caplog):
    trainer(steps=6).run(tmp_path)
    run = bucket / "run"
    trainer(steps=4).run(run)
    names = buckets.files_below(run / "checkpoints" / "4")
    large = max((n for n in names if "/d/" in n), key=lambda name: names[name][0])  # arrays
    (run / "checkpoints" / "4" / large).write_bytes(b"x" * names[large][0])
    trainer(steps=6).run(run)
    assert f"checkpoints/4 is not readable (damaged: {large} its content" in caplog.text
    assert losses(run) == losses(tmp_path)
    there = {name.partition("/")[0] for name in buckets.files_below(run / "checkpoints")}
    assert {"4", "6"} < there and any(name.startswith("4.unreadable-") for name in there)
