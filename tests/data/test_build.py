"""Building tables: whole or not at all, whatever happens, and read back bit for bit."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from cir_jax.input import tables
from cir_jax.storage.buckets import files_below
from data import build, claims
from data.shapes import captioned, queries
from data.shapes.shapes_dataset_builder import TABLES, Shapes, ShapesTiny
from tests.storage.bucket import Bucket, in_memory

ROOT = Path(__file__).resolve().parents[2]
PREPARE = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--dataset=shapes_tiny"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    build.prepare("shapes_tiny", None, data_dir)
    return data_dir


@pytest.mark.parametrize("dataset", ["circo", "cirr", "fashioniq", "genecis"])
def test_a_benchmark_that_is_not_there_says_how_to_prepare_it(dataset, tmp_path):
    message = f"launch/prepare.py --dataset={dataset} --source=DIR"
    with pytest.raises(DataError, match=message):
        build.prepare(dataset, None, tmp_path)
    assert not any(tmp_path.iterdir())


def _source(data_dir: Path, table: str, split: str):
    folder = build.table_dir("shapes_tiny", table, data_dir)
    return tfds.builder_from_directory(str(folder)).as_data_source(split)


def _records(data_dir: Path, table: str) -> list[dict]:
    # Records, not files: protobuf orders the fields of a record anew in every process.
    return list(_source(data_dir, table, "train"))


def test_round_trip(built):
    source = _source(built, "pretrain", "train")
    records = list(captioned.records("pretrain", "train", ShapesTiny.SIZES.pretrain))
    assert len(source) == len(records)
    for i, record in enumerate(records):
        read = source[i]
        assert read["id"] == i and read["image"] == record["image"]
        assert [c.decode() for c in read["captions"]] == record["captions"]
    source = _source(built, "triplets", "train")
    for i, record in enumerate(queries.triplet_records("train", 16)):
        read = {k: v.decode() if isinstance(record[k], str) else v for k, v in source[i].items()}
        assert read == record


@pytest.mark.parametrize("table", ["circo", "cirr", "fashioniq", "genecis"])
def test_queries_point_into_the_gallery(built, table):
    for split in ("val", "test_0", "test_1", "test_2"):
        gallery = _source(built, "gallery", split)
        for query in _source(built, table, split):
            for i in (query["reference"], *query["targets"], *query["candidates"]):
                assert 0 <= i < len(gallery)
            if table == "fashioniq":
                target = gallery[int(query["targets"][0])]
                assert list(target["categories"]) == [query["category"]]


def test_order_is_kept_over_shards(tmp_path):
    builder = ShapesTiny(config="captions", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=5))
    assert builder.info.splits["train"].num_shards == 5
    source = tfds.builder_from_directory(str(builder.data_dir)).as_data_source("train")
    assert [r["id"] for r in source] == list(range(len(source)))


def test_all_tables_are_there_and_good(built):
    counts = build.check("shapes_tiny", None, built)
    assert set(counts) == set(TABLES) == {c.name for c in Shapes.BUILDER_CONFIGS}
    assert counts["pretrain"] == {"train": 256, "val": 64}
    assert counts["genecis"]["test_2"] == 16


def test_killed_build_leaves_nothing_and_is_repeated(built, tmp_path):
    # Slow records make sure that the kill hits the middle of the build.
    code = (
        "import os, time; from data.shapes import captioned; records = captioned.records\n"
        "def slow(*args):\n"
        "    for i, r in enumerate(records(*args)):\n"
        "        if i == 200: os.write(1, b'half'); time.sleep(60)\n"
        "        yield r\n"
        "captioned.records = slow\n"
        f"from data import build; build.prepare('shapes_tiny', ['captions'], {str(tmp_path)!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read(4) == "half"
        process.send_signal(signal.SIGKILL)
    folder = build.table_dir("shapes_tiny", "captions", tmp_path)
    assert (folder.parent / ".building").exists() and not folder.exists()
    with pytest.raises(DataError, match="'captions' is missing"):
        build.check("shapes_tiny", ["captions"], tmp_path)
    build.prepare("shapes_tiny", ["captions"], tmp_path)
    assert _records(tmp_path, "captions") == _records(built, "captions")
    assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", "1.0.0"]


def test_two_builders_at_once(built, tmp_path):
    command = [*PREPARE, "--tables=captions,triplets", f"--data_dir={tmp_path}"]
    processes = [subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    for table in ("captions", "triplets"):
        assert _records(tmp_path, table) == _records(built, table)


def test_second_builder_waits_for_the_lock(tmp_path):
    folder = tmp_path / "table"
    with claims.locked(folder):
        code = (
            "from pathlib import Path; from data import claims\n"
            f"with claims.locked(Path({str(folder)!r})): print('in')"
        )
        waiting = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        time.sleep(2)
        assert waiting.poll() is None
    assert waiting.communicate(timeout=30)[0] == "in\n"


def test_corrupt_record_is_named(tmp_path, monkeypatch):
    records = captioned.records

    def damaged(*args):
        for record in records(*args):
            if record["id"] == 17:
                record["image"] = record["image"][:300] + b"\0" * 20 + record["image"][320:]
            yield record

    monkeypatch.setattr(captioned, "records", damaged)
    build.prepare("shapes_tiny", ["captions"], tmp_path)
    with pytest.raises(DataError, match=r"1 problem\(s\):\n  captions/train record 17: "):
        build.check("shapes_tiny", ["captions"], tmp_path)


def test_damaged_file_is_named(tmp_path):
    folder = build.prepare("shapes_tiny", ["captions"], tmp_path)["captions"]
    (shard,) = [p for p in folder.iterdir() if "array_record" in p.name]
    shard.write_bytes(shard.read_bytes()[:100_000])
    with pytest.raises(DataError, match="captions/train"):
        build.check("shapes_tiny", ["captions"], tmp_path)


def test_unknown_names_list_the_closest():
    with pytest.raises(DataError, match="Did you mean 'shapes'"):
        build.prepare("shapse")
    with pytest.raises(DataError, match="Did you mean 'gallery'.*fashioniq"):
        build.prepare("shapes", ["galery"])


def test_unwritable_folder_and_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory.*--data_dir"):
        build.prepare("shapes_tiny", ["captions"], tmp_path / "file")

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(captioned, "records", full)
    with pytest.raises(DataError, match="No space left"):
        build.prepare("shapes_tiny", ["captions"], tmp_path)
    assert [p.name for p in (tmp_path / "shapes_tiny" / "captions").iterdir()] == [".lock"]


def test_a_table_for_a_bucket_is_built_here_and_uploaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "default_uploads_dir", lambda: tmp_path / "uploads")
    local = build.prepare("shapes_tiny", ["captions"], tmp_path / "data")["captions"]

    def cut(name):
        if "features.json" in name:
            raise OSError("no network")

    def scraps():
        return [p for p in (tmp_path / "uploads").rglob("*") if p.is_file() and p.name != ".lock"]

    with in_memory(monkeypatch):
        monkeypatch.setattr(Bucket, "fails", cut)
        with pytest.raises(DataError, match="cannot write table 'captions' .*to gs://.*no network"):
            build.prepare("shapes_tiny", ["captions"], "gs://bucket/data")
        assert scraps() and not tables.is_prepared("gs://bucket/data", "shapes_tiny", "captions")
        monkeypatch.setattr(Bucket, "fails", None)
        monkeypatch.setattr(build, "_build", None)  # what was built is there
        folder = build.prepare("shapes_tiny", ["captions"], "gs://bucket/data")["captions"]
        assert str(folder) == "gs://bucket/data/shapes_tiny/captions/1.0.0" and not scraps()
        assert tables.is_prepared("gs://bucket/data", "shapes_tiny", "captions")
        sizes = [{k: v[0] for k, v in files_below(f).items()} for f in (local, folder)]
        assert sizes[0] == sizes[1]
        assert build.prepare("shapes_tiny", ["captions"], "gs://bucket/data")["captions"] == folder
    assert "uploading it to gs://bucket/data/shapes_tiny/captions" in capsys.readouterr().err


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CIR_JAX_DATA", str(tmp_path))
    assert build.table_dir("shapes", "gallery") == tmp_path / "shapes" / "gallery" / "1.0.0"
    monkeypatch.delenv("CIR_JAX_DATA")
    assert build.default_data_dir() == Path.home() / ".cache" / "cir_jax" / "data"


def test_prepare_binary_reports_errors_without_traceback(tmp_path):
    command = [*PREPARE, "--check", f"--data_dir={tmp_path}", "--tables=circo"]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert result.returncode == 2
    assert "table 'circo' is missing" in result.stderr and "Traceback" not in result.stderr
