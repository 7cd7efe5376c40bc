"""Training corpora from their files to tables, and to a trained method."""

import json
import os
import re
import subprocess
import sys

import pytest

from cir_jax.errors import DataError
from cir_jax.input.tables import OWN_DATA, Table
from data import build, shards
from data.pairs import readers
from tests.data.test_corpora import DATA, DUMMIES, jpeg, records
from tests.launch.binaries import ROOT, SMOKE, run

TABLE = {dataset: table for table, dataset in OWN_DATA.items()}


@pytest.fixture
def pairs(tmp_path):
    """A table of twelve pairs, of which number 7 is damaged; and where to build."""
    source = tmp_path / "source"
    source.mkdir()
    rows = [f"{i}.jpg\tnumber {i}" for i in range(12)]
    (source / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    for i in range(12):
        (source / f"{i}.jpg").write_bytes(jpeg(i)[: 200 if i == 7 else None])
    return source, tmp_path / "built"


def captions(data_dir, name):
    table = Table(data_dir, name, "captions", "train")
    assert [int(table[i]["id"]) for i in range(len(table))] == list(range(len(table)))
    return [table[i]["captions"][0].decode() for i in range(len(table))]


@pytest.mark.parametrize("dummy", DUMMIES)
def test_tables_hold_what_the_reader_found(dummy, tmp_path):
    dataset, count = DUMMIES[dummy]
    build.prepare(dataset, None, tmp_path, source=DATA / dummy, name="my.own-1")
    table = Table(tmp_path, "my.own-1", TABLE[dataset], "train")
    assert len(table) == count
    for i, record in enumerate(records(dataset, DATA / dummy)):
        read = dict(table[i])
        assert read.keys() == record.keys()
        for field, value in record.items():
            encoded = value.encode() if isinstance(value, str) else value
            if isinstance(value, list):
                assert [text.decode() for text in read[field]] == value
            else:
                assert read[field] == encoded, field
    assert build.check(dataset, None, tmp_path, "my.own-1") == {TABLE[dataset]: {"train": count}}


def test_damaged_image_stops_the_build_or_is_left_out(pairs):
    source, built = pairs
    with pytest.raises(DataError, match=r"line 9: image is no readable image.*--allow_partial"):
        build.prepare("pairs", None, built, source=source, name="own")
    with pytest.raises(DataError, match="no prepared table.*--dataset=pairs --source=PATH"):
        captions(built, "own")
    folders = build.prepare("pairs", None, built, source=source, name="own", allow_partial=True)
    assert captions(built, "own") == [f"number {i}" for i in range(12) if i != 7]
    mark = json.loads((folders["captions"] / build.MARK).read_text())["splits"]["train"]
    assert mark["complete"] is False and mark["lost"] == {"pairs": 1}


def test_missing_images_are_listed_before_anything_is_written(pairs):
    source, built = pairs
    (source / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"not complete(.|\n)*line 5: image .*3.jpg is missing"):
        build.prepare("pairs", None, built, source=source, name="own")
    assert not (built / "own").exists()


def test_build_goes_on_behind_the_finished_shards(pairs, monkeypatch):
    source, built = pairs
    (source / "7.jpg").write_bytes(jpeg(7))
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * len(jpeg()))
    loaded = []
    load = readers._from_file

    def counting(path, texts):
        if os.environ.get("STOP") == path.name:
            raise KeyboardInterrupt
        loaded.append(path.name)
        return load(path, texts)

    monkeypatch.setattr(readers, "_from_file", counting)
    monkeypatch.setenv("STOP", "10.jpg")
    with pytest.raises(KeyboardInterrupt):
        build.prepare("pairs", None, built, source=source, name="own")
    kept = shards.finished_shards(built / "own" / "captions" / ".building")
    assert kept
    (built / "own" / "captions" / ".building" / "shard.part").write_bytes(b"half a shard")
    monkeypatch.delenv("STOP")
    loaded.clear()
    build.prepare("pairs", None, built, source=source, name="own")
    assert captions(built, "own") == [f"number {i}" for i in range(12)]
    assert 2 <= len(loaded) < 12 and "0.jpg" not in loaded


def test_the_same_files_make_the_same_bytes_in_another_process(pairs):
    source, built = pairs
    (source / "7.jpg").write_bytes(jpeg(7))
    (folder,) = build.prepare("pairs", None, built, source=source, name="own").values()
    code = f"from data import build; build.prepare('pairs', None, {str(built)!r}, "
    code += f"source={str(source)!r}, name='other')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    other = built / "other" / folder.relative_to(built / "own")
    (name,) = (path.name for path in folder.iterdir() if ".array_record" in path.name)
    assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_names_of_datasets_are_taken(tmp_path):
    for name in ("shapes", "../x", "a/b", ".", "-a"):
        with pytest.raises(DataError, match=f"--name={re.escape(name)}: choose a name"):
            build.prepare("texts", None, tmp_path, source=DATA / "texts/dummy", name=name)


def test_one_name_for_several_corpora(tmp_path):
    for dataset in ("texts", "images"):
        build.prepare(dataset, None, tmp_path, source=DATA / dataset / "dummy", name="mix")
    assert len(Table(tmp_path, "mix", "texts", "train")) == 5
    assert len(Table(tmp_path, "mix", "images", "train")) == 6
    # what is there is kept, but not passed off as made of other files
    build.prepare("texts", None, tmp_path, source=DATA / "texts/dummy", name="mix")
    with pytest.raises(DataError, match="is there already, made of other files"):
        other = DATA / "texts/dummy/captions.txt"
        build.prepare("texts", None, tmp_path, source=other, name="mix")


def test_binary_hands_over_the_columns(tmp_path, capsys):
    """The flags of launch/prepare.py, in this process."""
    from absl.testing import flagsaver

    from launch import prepare

    prepare.flags.FLAGS.mark_as_parsed()
    (tmp_path / "map.json").write_text('{"text": "edit"}')
    source = str(DATA / "text_triplets/dummy")
    columns = [str(tmp_path / "map.json")]
    for check in (True, False):
        with flagsaver.flagsaver(
            dataset="text_triplets", source=source, columns=columns, check=check
        ):
            with pytest.raises(SystemExit, match="2"):
                prepare.main(["prepare"])
        assert "no column for text (edit)" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_own_pairs_and_triplets(tmp_path):
    made = {"pairs": "pairs/dummy/cc3m", "image_triplets": "image_triplets/dummy"}
    for dataset, dummy in made.items():
        flags = (f"--dataset={dataset}", f"--source={DATA / dummy}", "--name=own")
        status, output = run("prepare", *flags, scratch=tmp_path)
        assert status == 0 and f"own/{TABLE[dataset]}" in output, output
    status, output = run(
        "main",
        f"--config={SMOKE}",
        f"--workdir={tmp_path / 'run'}",
        "--config.stage.stage1.data.dataset=own",
        "--config.stage.stage2.data.dataset=own",
        "--config.stage.stage2.data.tables.masked=0.0",  # which own corpora have of CLIPSeg
        "--config.stage.stage1.batch_size=4",
        "--config.stage.stage2.batch_size=8",
        "--config.stage.stage1.duration=2 steps",
        "--config.stage.stage2.duration=2 steps",
        "--config.log_every=1",
        "--config.evaluation.benchmarks=()",
        scratch=tmp_path,
    )
    assert status == 0, output
    for stage in ("stage1", "stage2"):
        lines = (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
        assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
