"""Corpora from the hub, by the real clients: the same records as of the same files on a disk."""

import io
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cir_jax.errors import DataError
from cir_jax.input.tables import Table
from data import build, shards
from data.pairs import readers
from data.source import Options
from data.text_triplets import captions
from tests import hub_server
from tests.data.corpora import jpeg, records, report, sample, write_tar
from tests.data.test_corpora import DATA
from tests.launch.binaries import ROOT, environment

CARD = b"---\nlicense: mit\n---\n"
CONFIGS = b"""---
configs:
- config_name: lines
  data_files:
  - {split: train, path: lines/*.jsonl}
  - {split: test, path: held.jsonl}
- config_name: table
  data_files: table/words.csv
---
"""
LINES = b'{"text": "a fox"}\n{"text": "a\n{"text": 7}\n{"text": " "}\n{"text": "an owl"}\n'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.running() as hub:
        hub_server.use_for_datasets(monkeypatch, hub, tmp_path / "cache")
        yield hub


def parquet(images, texts, group=4):
    """As `datasets` pushes images with captions."""
    rows = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "caption": texts}), file, row_group_size=group)
    return file.getvalue()


def put_pairs(hub, damaged=()):
    """Twelve pairs in two files."""
    for_file = [
        parquet(
            [jpeg(i)[: 200 if i in damaged else None] for i in part],
            [f"number {i}" for i in part],
        )
        for part in (range(7), range(7, 12))
    ]
    files = {f"data/train-0000{i}-of-00002.parquet": file for i, file in enumerate(for_file)}
    held = parquet([jpeg(99)], ["held back"])
    files["data/validation-00000-of-00001.parquet"] = held
    return hub.put("datasets/me/pairs", {"README.md": CARD, **files})


def put_texts(hub):
    files = {
        "README.md": CONFIGS,
        "lines/a.jsonl": LINES,
        "lines/b.jsonl": b'{"text": "two cats"}\n',
        "held.jsonl": b'{"text": "a held text"}\n',
        "table/words.csv": b"text,n\nNA,1\nnull,2\n007,3\n",
    }
    return hub.put("datasets/me/texts", files)


def texts_of(found):
    return [record["captions"][0] for record in found]


@pytest.mark.parametrize(
    "dummy", ["texts/dummy", "text_triplets/dummy", "image_triplets/dummy", "pairs/dummy/laion"]
)
def test_the_records_are_those_of_the_files(hub, dummy, tmp_path):
    folder, dataset = DATA / dummy, dummy.partition("/")[0]
    suffixes = {"texts": (".txt",), "text_triplets": (".jsonl", ".json")}.get(
        dataset, (".parquet", ".tar")
    )
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in suffixes}
    local = tmp_path / "local"
    local.mkdir()
    for name, content in files.items():
        (local / name).write_bytes(content)
    hub.put("datasets/me/dummy", files)
    expected = records(dataset, local)
    for start in (0, 1, len(expected)):
        assert records(dataset, "hf:me/dummy", start) == expected[start:]


def test_a_table_of_parquet_with_images(hub, tmp_path):
    commit = put_pairs(hub)
    folders = build.prepare("pairs", None, tmp_path, source="hf:me/pairs", name="own")
    table = Table(tmp_path, "own", "captions", "train")
    assert [table[i]["captions"][0].decode() for i in range(12)] == [
        f"number {i}" for i in range(12)
    ]
    assert table[8]["image"] == jpeg(8)
    mark = json.loads((folders["captions"] / build.MARK).read_text())
    assert mark["source"] == f"hf:me/pairs@{commit}" and mark["splits"]["train"]["complete"]
    (local := tmp_path / "local").mkdir()
    for path, content in hub.at("datasets/me/pairs")[1].items():
        if "train" in path:
            (local / path.rpartition("/")[2]).write_bytes(content)
    for start in (0, 3, 9):
        assert records("pairs", "hf:me/pairs", start) == records("pairs", local, start)
    held = records("pairs", "hf:me/pairs", split="validation")
    assert held == [{"id": 0, "image": jpeg(99), "captions": ["held back"]}]


def test_columns_and_masks_know_the_hub_too(hub):
    file = io.BytesIO()
    rows = {"picture": [jpeg(1)], "words": [["one", " ", "two"]]}
    pq.write_table(pa.table(rows), file)
    hub.put("datasets/me/named", {"train.parquet": file.getvalue()})
    columns = {"image": "picture", "caption": "words"}
    for dataset in ("pairs", "masked_pairs"):
        assert report(dataset, "hf:me/named", columns=columns).counts == {"pairs": 1}
    (record,) = records("pairs", "hf:me/named", columns=columns)
    assert record == {"id": 0, "image": jpeg(1), "captions": ["one", "two"]}
    with pytest.raises(DataError, match=r"train.parquet: no column for image.*are: picture, words"):
        report("pairs", "hf:me/named")


def test_each_unusable_record_is_named(hub):
    put_pairs(hub, damaged=(9,))
    found = report("pairs", "hf:me/pairs")
    (problem,) = found.problems
    assert problem.startswith("hf:me/pairs/data/train-00001-of-00002.parquet row 2: image is no ")
    assert found.counts == {"pairs": 11} and found.lost == {"pairs": 1}
    put_texts(hub)
    found = report("texts", "hf:me/texts:lines")
    assert found.counts == {"texts": 3, "entries with an empty text dropped": 1}
    wrong = [problem.partition(": ") for problem in found.problems]
    assert [where for where, _, _ in wrong] == [
        f"hf:me/texts/lines/a.jsonl line {line}" for line in (2, 3)
    ]
    assert "not valid JSON" in wrong[0][2] and "is 7, expected a text" in wrong[1][2]
    # pandas, by which `datasets` reads tables, makes numbers and gaps of such words
    assert texts_of(records("texts", "hf:me/texts:table")) == ["NA", "null", "007"]


def test_a_truncated_shard_is_told(hub, tmp_path):
    whole = write_tar(
        tmp_path / "0.tar", [f for i in range(4) for f in sample(f"{i}", b"fox %d" % i)]
    )
    hub.put("datasets/me/tar", {"train/0.tar": whole.read_bytes()[: 3 * 512 + 512 * 9]})
    found = report("pairs", "hf:me/tar")
    assert found.lost["pairs"] >= 1 and all(
        "hf:me/tar/train/0.tar key" in p for p in found.problems
    )


def test_only_what_is_needed_is_fetched(hub):
    noise = [os.urandom(200_000) for _ in range(40)]
    file = parquet(noise, [f"number {i}" for i in range(40)], group=10)
    hub.put("datasets/me/large", {"train.parquet": file})
    assert len(records("texts", "hf:me/large")) == 40
    assert hub.sent < len(file) / 20  # the images are not
    before = hub.sent
    corpus = readers.find(build.given.hub.opened("hf:me/large"), {})
    assert len(list(corpus.entries(30, contents=True))) == 10
    assert hub.sent - before < len(file) / 3  # nor groups of rows before the first


def test_the_first_entries(hub, tmp_path):
    put_pairs(hub)
    for start in (0, 3):
        found = records("pairs", "hf:me/pairs", start, limit=5)
        assert [r["captions"] for r in found] == [[f"number {i}"] for i in range(start, 5)]
    (tmp_path / "texts.txt").write_text("one\n\ntwo\nthree\n")
    assert texts_of(records("texts", tmp_path, limit=3)) == ["one", "two"]

    def stamp(**options):
        found = build.survey("texts", tmp_path, Options(**options))
        return found.splits["texts"]["train"].stamp

    assert stamp() != stamp(limit=3) != stamp(limit=2)
    with pytest.raises(DataError, match="--limit=0: expected 1 or more"):
        report("texts", tmp_path, limit=0)
    with pytest.raises(DataError, match="--limit: circo is read as a whole"):
        build.survey("circo", tmp_path, Options(limit=3))


def test_a_killed_build_goes_on_while_the_files_are_the_same(hub, tmp_path, monkeypatch, capsys):
    put_pairs(hub)
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * len(jpeg()))
    load, stop, loaded = readers._from_row, ["number 8"], []

    def counting(row, texts):
        if texts == stop:
            raise KeyboardInterrupt
        loaded.append(texts[0])
        return load(row, texts)

    monkeypatch.setattr(readers, "_from_row", counting)

    def prepare():
        loaded.clear()
        return build.prepare("pairs", None, tmp_path, source="hf:me/pairs", name="own")

    with pytest.raises(KeyboardInterrupt):
        prepare()
    files = dict(hub.at("datasets/me/pairs")[1])
    hub.put("datasets/me/pairs", files | {"README.md": CARD + b"A better card."})
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert "keeping" in capsys.readouterr().err and "number 0" not in loaded
    hub.put(
        "datasets/me/pairs",
        files | {"data/train-00001-of-00002.parquet": parquet([jpeg()], ["new"])},
    )
    stop.clear()
    prepare()
    assert "have changed" in capsys.readouterr().err and "number 0" in loaded
    assert len(Table(tmp_path, "own", "captions", "train")) == 8
    # and what is built is not passed off as made of other files
    hub.put("datasets/me/pairs", files)
    with pytest.raises(DataError, match="is there already, made of other files"):
        prepare()


def test_revisions_configurations_and_splits(hub):
    first = put_texts(hub)
    hub.put("datasets/me/texts", {"README.md": CARD, "train.txt": b"later\n"})
    assert texts_of(records("texts", "hf:me/texts")) == ["later"]
    assert texts_of(records("texts", f"hf:me/texts@{first}:lines", split="test")) == ["a held text"]
    for source, split, message in (
        ("hf:me/texts@gone", "", "there is no revision 'gone'"),
        (f"hf:me/texts@{first}", "", r"one among the available configs: \['lines', 'table'\]"),
        (f"hf:me/texts@{first}:tables", "", r"'tables' not found. Available: \['lines', 'table'\]"),
        (f"hf:me/texts@{first}:lines", "valid", "unknown split 'valid'.*test, train"),
        ("hf:me", "", "expected hf:ORG/NAME, hf:ORG/NAME@REVISION"),
        ("hf:me/none", "", "no such dataset on http.*HF_TOKEN"),
    ):
        with pytest.raises(DataError, match=message):
            report("texts", source, split=split)


def test_what_cannot_be_read_says_what_to_do(hub, tmp_path, monkeypatch):
    put_pairs(hub)
    with pytest.raises(DataError, match="circo is made of files of a disk; .* pairs, masked_pairs"):
        build.survey("circo", "hf:me/pairs")
    with pytest.raises(DataError, match="of type .parquet; read are .json.*@refs/convert/parquet"):
        build.given.hub.opened("hf:me/pairs").of_types((".json",))
    listed = b'{"image": "0.jpg", "caption": "a fox"}\n'
    hub.put("datasets/me/listed", {"train.jsonl": listed})
    with pytest.raises(DataError, match="train.jsonl lists names of.*`hf download me/listed"):
        report("pairs", "hf:me/listed")
    hub.put("datasets/me/script", {"script.py": b"import os\n", "a.txt": b"x\n"})
    with pytest.raises(DataError, match="scripts are no longer.*hf:me/script@refs/convert/parquet"):
        report("texts", "hf:me/script")
    hub.put("datasets/me/void", {"README.md": CARD})
    with pytest.raises(DataError, match="hf:me/void: no files that `datasets` knows"):
        report("texts", "hf:me/void")
    hub.gated.add("datasets/me/pairs")
    with pytest.raises(DataError, match="who gets it. Ask at http.*/datasets/me/pairs.*HF_TOKEN"):
        report("pairs", "hf:me/pairs")
    with pytest.raises(DataError, match=f"--split=val: --source={tmp_path} has no splits"):
        report("texts", tmp_path, split="val")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need the package datasets: pip install 'cir_jax\[hub\]'"):
        report("pairs", "hf:me/pairs")


def test_a_connection_that_breaks_is_taken_up_again_or_told(hub, monkeypatch):
    put_texts(hub)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    dataset = build.given.hub.opened("hf:me/texts:lines")
    hub.broken = 1
    assert dataset.files[0].open("rb").read() == LINES and len(slept) == 1
    hub.broken = 99
    with pytest.raises(DataError, match=r"lines/a.jsonl: the hub broke off \(.*\). Do the same"):
        dataset.files[0].open("rb").read()


def test_captions_of_the_hub_for_triplets(hub, tmp_path):
    put_texts(hub)
    read = captions.read("hf:me/texts:table", tmp_path, {})
    assert [entry.captions for entry in read.entries(1)] == [["null"], ["007"]]
    identity = read.identity
    hub.put("datasets/me/texts", dict(hub.at("datasets/me/texts")[1]))
    assert captions.read("hf:me/texts:table", tmp_path, {}).identity == identity
    held = captions.read("hf:me/texts:lines", tmp_path, {}, "test")
    assert [entry.captions for entry in held.entries(0)] == [["a held text"]]
    with pytest.raises(DataError, match="a.jsonl line 2: not valid JSON.*Mend it"):
        list(captions.read("hf:me/texts:lines", tmp_path, {}).entries(0))
    with pytest.raises(DataError, match="--split=val is of hf:ORG/NAME; .* DATASET/TABLE:val"):
        captions.read("own/captions", tmp_path, {}, "val")


@pytest.mark.slow
def test_as_a_user_stands(tmp_path):
    """From another directory, without a terminal, with the real environment variables."""
    with hub_server.running() as hub:
        commit = put_pairs(hub)
        env = environment(tmp_path) | hub_server.environment(hub, tmp_path / "cache")

        def run(*flags, **more):
            command = [sys.executable, str(ROOT / "launch/prepare.py"), "--dataset=pairs"]
            done = subprocess.run(
                [*command, "--source=hf:me/pairs", *flags], cwd=tmp_path, env=env | more, text=True,
                capture_output=True, stdin=subprocess.DEVNULL, timeout=300,
            )  # fmt: skip
            return done.returncode, done.stdout, done.stderr

        status, out, err = run("--check", "--limit=3", "--report=told.json")
        assert (status, out.splitlines()[:2]) == (0, ["train:", "  pairs: 3"]), err
        told = json.loads((tmp_path / "told.json").read_text())
        assert told["source"] == f"hf:me/pairs@{commit}"
        status, out, err = run("--name=own", "--split=validation")
        assert status == 0 and "own/captions" in out, err
        status, out, err = run("--name=other", HF_HUB_OFFLINE="1")
    assert status == 2 and "the hub was not reached" in err and "Traceback" not in err
    assert "`hf download me/pairs --repo-type dataset --local-dir DIR`" in err
    assert len(Table(tmp_path / "data", "own", "captions", "train")) == 1
