"""Batches are a pure function of (seed, number): of nothing else."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from cir_jax.errors import ConfigError, DataError
from cir_jax.input import pipeline, records
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.reading import Reading
from cir_jax.input.records import CaptionPairs, Records, TrimText, Triplets
from cir_jax.input.tables import Table
from tests import tiny as factory

FEATURES = np.arange(40, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)


@pytest.fixture(scope="module")
def make(tiny):
    tokenizer, transform = tiny[0].tokenizer, tiny[0].image_transform
    captions = factory.caption_table(40)
    triplets = factory.MemoryTable(
        [{"reference": i, "target": i, "text": b"make it red"} for i in range(40)]
    )
    features = {"image": FEATURES}
    both = {"reference": FEATURES + 100, "target": FEATURES + 200}
    parts = (
        Part(
            "captions",
            Records(captions, ("image",), transform, features),
            CaptionPairs(tokenizer, "features", with_reference=True),
            0.25,
        ),
        Part(
            "triplets",
            Records(triplets, ("reference", "target"), transform, both),
            Triplets(tokenizer, "features"),
            0.75,
        ),
    )
    return lambda **fields: Pipeline(**({"parts": parts, "batch_size": 16, "seed": 1} | fields))


def ids(batches):
    return [batch["target_features"][:, 0].tolist() for batch in batches]


def test_every_record_once_per_epoch(make):
    pipeline = make(parts=make().parts[:1], batch_size=8)
    seen = sorted(np.concatenate(ids(pipeline.batches(0, 5))))
    assert seen == list(range(40))
    assert ids(pipeline.batches(0, 5)) != ids(pipeline.batches(5, 10))


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_records_are_parsed_once_and_their_images_are_not_kept(tiny, monkeypatch, kept):
    monkeypatch.setattr(records, "KEPT", kept)
    read = []

    class Counting(factory.MemoryTable):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    table = Counting(factory.caption_table(5).records)
    transform = tiny[0].image_transform
    source = Records(table, ("image",), transform, {"image": FEATURES})
    first, again = ([source[i] for i in range(5)] for _ in range(2))
    assert len(read) == 5 + max(5 - kept, 0)
    for one, other, stored in zip(first, again, table.records, strict=True):
        assert one["captions"] == other["captions"] == stored["captions"]
        assert np.array_equal(one["image"], other["image"])
    assert np.array_equal(first[3]["image"], FEATURES[3])
    assert "image" not in source._parsed.get(0, {}) and len(source._parsed) == min(kept, 5)
    assert not source.__getstate__()["_parsed"]  # a worker process is sent none of it
    decoded = Records(table, ("image",), transform)
    assert decoded[1]["image"].shape == (16, 16, 3) and not decoded._parsed


def test_starting_later_gives_the_same_batches(make):
    whole = list(make().batches(0, 8))
    for a, b in zip(whole[3:], make().batches(3, 8), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_processes_together_read_the_global_batch(make, count):
    whole = ids(make().batches(0, 4))
    shares = [ids(make(process_index=i, process_count=count).batches(0, 4)) for i in range(count)]
    assert [sum(rows, []) for rows in zip(*shares, strict=True)] == whole


def test_worker_processes_change_nothing_and_outlive_a_ctrl_c(make):
    batches = make(reading=Reading(workers=2)).batches(2, 42)
    first = [next(batches), next(batches)]  # one of each: both have begun
    workers = multiprocessing.active_children()
    for worker in workers:  # a terminal sends it to all processes of a run
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.5)
    assert len(workers) >= 2 and all(worker.is_alive() for worker in workers)
    assert ids([*first, *batches]) == ids(make().batches(2, 42))


def test_mixture_has_the_asked_shares_and_one_layout(make):
    rows = np.concatenate([b["has_reference"] for b in make().batches(0, 20)])
    assert rows.mean() == pytest.approx(0.75, abs=0.01)
    batch = make().example()
    assert not batch["reference_features"][~batch["has_reference"]].any()
    np.testing.assert_array_equal(
        batch["reference_features"][batch["has_reference"]] + 100,
        batch["target_features"][batch["has_reference"]],
    )


def test_groups_stay_together(make):
    pipeline = make(parts=make().parts[:1], group=2)
    for row in ids(pipeline.batches(0, 5)):
        pairs = np.asarray(row).reshape(-1, 2)
        np.testing.assert_array_equal(pairs[:, 0] + 1, pairs[:, 1])
        assert not (pairs[:, 0] % 2).any()


def test_batches_that_do_not_divide(make):
    with pytest.raises(ConfigError, match="batch_size=16 is not divisible by 3 processes"):
        make(process_count=3)
    with pytest.raises(ConfigError, match="without data"):
        make(parts=())


def test_trimmed_text_keeps_every_end_token():
    tokens = np.array([[1, 5, 6, 0, 0, 0, 0, 0, 0, 0], [1, 5, 0, 0, 0, 0, 0, 0, 0, 0]])
    trimmed = TrimText(eos_id=0, bucket=4).map({"token_ids": tokens, "other": 1})
    np.testing.assert_array_equal(trimmed["token_ids"], tokens[:, :4])


def test_several_processes_agree_before_they_cut(make, tiny, monkeypatch):
    """Each says what it needs before its turn, and none cuts by itself."""
    did = []

    class Agreed:
        def say(self, value):
            did.append("say")

        def hear(self):
            did.append("hear")
            return 14

    monkeypatch.setattr(pipeline, "Largest", Agreed)
    trim = TrimText(tiny[0].tokenizer.eos_id, bucket=4)
    alone, together = make(trim=trim), make(trim=trim, process_count=2)
    assert alone.example()["token_ids"].shape[1] == 12
    assert together.example()["token_ids"].shape[1] == tiny[0].context_length > 14
    assert [batch["token_ids"].shape for batch in together.batches(0, 5)] == [(8, 14)] * 5
    assert did == [*["say"] * 3, "hear", "say", "hear", "say", *["hear"] * 3]


def test_missing_and_corrupt_tables_say_what_to_do(tmp_path):
    from data import build

    with pytest.raises(DataError, match="no prepared table shapes_tiny/circo. Run `python launch"):
        Table(tmp_path, "shapes_tiny", "circo", "val")
    folder = build.prepare("shapes_tiny", ["circo"], tmp_path)["circo"]
    with pytest.raises(DataError, match="split of shapes_tiny/circo: 'vall'. Did you mean 'val'"):
        Table(tmp_path, "shapes_tiny", "circo", "vall")
    table = Table(tmp_path, "shapes_tiny", "circo", "val")
    assert table[0]["id"] == 0 and list(table.column("id")) == list(range(len(table)))
    for file in folder.glob("*val*array_record*"):
        data = bytearray(file.read_bytes())
        data[200:400] = bytes(200)
        file.write_bytes(data)
    with pytest.raises(DataError, match="shapes_tiny/circo:val.*(unreadable|opened).*prepare it"):
        broken = Table(tmp_path, "shapes_tiny", "circo", "val")
        _ = [broken[i] for i in range(len(broken))]


def test_contents_of_a_table_are_those_of_its_split_wherever_it_lies(tmp_path):
    from data import build

    folder = build.prepare("shapes_tiny", ["circo"], tmp_path / "one")["circo"]
    first = Table(tmp_path / "one", "shapes_tiny", "circo", "val").contents()
    (shard,) = first["shards"]
    assert first["records"] == sum(first["lengths"]) > 3 and first["stamp"] is None
    assert first["shards"][shard] == (folder / shard).stat().st_size
    part = Table(tmp_path / "one", "shapes_tiny", "circo", "val[:3]").contents()
    assert part == first | {"records": 3}
    # another machine: other times
    copied = shutil.copytree(folder, tmp_path / "two" / "shapes_tiny" / "circo" / folder.name)
    os.utime(copied / shard, (1, 1))
    table = Table(tmp_path / "two", "shapes_tiny", "circo", "val")
    assert table.contents() == first == json.loads(json.dumps(first))
    stamps = {"val": "of the changed files", "test_0": "of others"}
    (copied / "source.json").write_text(json.dumps({"stamp": stamps, "source": "here"}))
    assert table.contents() == first | {"stamp": "of the changed files"}
