"""Tables made of the user's files: what is missing is told and counted, a kill loses little."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input import images
from cir_jax.input.tables import Table
from data import benchmark, build, shards
from data.build import Options
from data.source import Report, image_problems, parallel, read_images

ROOT = Path(__file__).resolve().parents[2]
DUMMY = {name: ROOT / "data" / name / "dummy" for name in ("circo", "cirr", "fashioniq")}
UNLABELED = "COCO2017_unlabeled/unlabeled2017"
SMALL = 1500  # bytes of a shard: two dummy images


def _copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DUMMY[dataset], tmp_path / "source"))


def _names(data_dir: Path, dataset: str, split: str) -> list[str]:
    table = Table(data_dir, dataset, "gallery", split)
    return [table[i]["name"].decode() for i in range(len(table))]


def _official(monkeypatch, counts: dict) -> None:
    """Makes the dummy data of CIRCO the official ones."""
    cls = build._builder_class("circo")
    monkeypatch.setattr(cls, "OFFICIAL", counts)


WHOLE = {"val": {"queries": 3, "gallery": 8}, "test": {"queries": 2, "gallery": 8}}


@pytest.fixture
def whole(monkeypatch) -> None:
    _official(monkeypatch, WHOLE)


def _break_images(source: Path) -> None:
    """One image gone, one cut off, one empty: a reference, a first and a further target."""
    images = source / UNLABELED
    (images / "000000000120.jpg").unlink()
    file = images / "000000000008.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    (images / "000000000033.jpg").write_bytes(b"")


def test_doctor_names_and_counts_what_is_missing(tmp_path, whole):
    source = _copy("circo", tmp_path)
    assert all(r.complete for r in build.survey("circo", source).reports.values())
    _break_images(source)
    val = build.survey("circo", source).reports["val"]
    assert val.counts == {"queries": 1, "gallery": 5} and not val.complete
    # 33 is the reference of query 1, 120 that of query 2; query 0 loses a further target
    assert val.lost == {"queries": 2, "gallery": 3, "some targets of queries": 1}
    text = str(val)
    assert "gallery: 5, 3 lost, official 8" in text and "3 problem(s)" in text
    assert "000000000120.jpg: is missing" in text and "000000000033.jpg: is empty" in text
    assert "000000000008.jpg: is unreadable (" in text


def test_doctor_without_decoding_finds_missing_files_only(tmp_path):
    source = _copy("circo", tmp_path)
    _break_images(source)
    report = build.survey("circo", source, Options(decode="never")).reports["val"]
    assert report.lost["gallery"] == 2


def test_partial_data_are_built_only_if_allowed(tmp_path, whole):
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    _break_images(source)
    with pytest.raises(DataError, match=r"not complete(.|\n)*120.jpg: is missing(.|\n)*--allow"):
        build.prepare("circo", None, data_dir, source=source)
    assert not data_dir.exists()
    build.prepare("circo", None, data_dir, source=source, allow_partial=True)
    assert _names(data_dir, "circo", "unlabeled") == ["17", "4", "250", "91", "66"]
    queries = Table(data_dir, "circo", "queries", "val")
    assert len(queries) == 1 and queries[0]["id"] == 0
    assert [int(i) for i in queries[0]["targets"]] == [1, 2]  # 33 is gone
    for table in ("queries", "gallery"):
        folder = build.table_dir("circo", table, data_dir)
        mark = json.loads((folder / build.MARK).read_text())["splits"]
        assert not mark["val"]["complete"] and len(mark["val"]["problems"]) == 3
        assert mark["val"]["counts"] == {"queries": 1, "gallery": 5}
        assert mark["val"]["official"] == {"queries": 3, "gallery": 8}
        assert mark["val"]["lost"] == {"queries": 2, "some targets of queries": 1, "gallery": 3}


def test_damaged_image_is_named_while_building(tmp_path, whole):
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    file = source / UNLABELED / "000000000091.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"000000000091.jpg: not a readable image.*--check"):
        build.prepare("circo", None, data_dir, source=source)
    assert not list(data_dir.rglob("dataset_info.json"))
    build.prepare("circo", None, data_dir, source=source, decode=False)  # on one's own risk
    with pytest.raises(DataError, match="gallery/unlabeled record 5"):
        build.check("circo", None, data_dir)


def test_complete_data_are_marked_complete(tmp_path, whole):
    build.prepare("circo", None, tmp_path, source=DUMMY["circo"])
    mark = json.loads((build.table_dir("circo", "queries", tmp_path) / build.MARK).read_text())
    assert [split["complete"] for split in mark["splits"].values()] == [True, True]
    assert build.incomplete_splits(build.table_dir("circo", "queries", tmp_path)) == []
    assert Path(mark["source"]).is_absolute()


def test_wrong_counts_are_not_complete(tmp_path, monkeypatch):
    _official(monkeypatch, {"val": {"queries": 3, "gallery": 9}})
    with pytest.raises(DataError, match="queries: 3, as official\n *gallery: 8, official 9"):
        build.prepare("circo", None, tmp_path, source=DUMMY["circo"])


def test_images_that_no_split_lists_do_not_matter(tmp_path, whole):
    source = _copy("circo", tmp_path)
    (source / UNLABELED / "000000009999.jpg").write_bytes(b"junk")
    build.prepare("circo", None, tmp_path / "data", source=source)


def test_split_without_files_is_left_out_and_named(tmp_path, whole, capsys):
    source = _copy("circo", tmp_path)
    (source / "annotations" / "test.json").unlink()
    build.prepare("circo", None, tmp_path / "data", source=source)
    assert "test: left out: no " in capsys.readouterr().err
    assert build.check("circo", None, tmp_path / "data")["queries"] == {"val": 3}
    with pytest.raises(DataError, match=r"split 'test' of circo: no .*test\.json"):
        build.survey("circo", source, Options(splits=("test",)))
    with pytest.raises(DataError, match="unknown split of circo 'vel'. Did you mean 'val'"):
        build.survey("circo", source, Options(splits=("vel",)))


def test_one_split_of_several(tmp_path, monkeypatch):
    source = _copy("cirr", tmp_path)
    shutil.rmtree(source / "train")  # nobody needs the 16,939 images of train to evaluate
    kwargs = {"source": source, "splits": ["val"], "allow_partial": True}
    build.prepare("cirr", None, tmp_path / "data", **kwargs)
    assert build.check("cirr", None, tmp_path / "data") == {
        "gallery": {"val": 8}, "queries": {"val": 2}, "names": {"val": 8}
    }  # fmt: skip


def test_split_that_lost_everything_is_not_built(tmp_path):
    source = _copy("cirr", tmp_path)
    shutil.rmtree(source / "dev")
    build.prepare("cirr", None, tmp_path / "data", source=source, allow_partial=True)
    assert build.check("cirr", None, tmp_path / "data")["queries"] == {"train": 2, "test1": 2}


def test_without_source_says_where_to_get_it(tmp_path):
    with pytest.raises(
        DataError, match=r"--source=DIR(.|\n)*github.com/miccunifi/CIRCO(.|\n)*READ"
    ):
        build.prepare("circo", None, tmp_path)
    with pytest.raises(DataError, match=r"there is no such folder(.|\n)*NLVR2"):
        build.prepare("cirr", None, tmp_path, source=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds nothing of fashioniq(.|\n)*captions/cap\.\{dress"):
        build.prepare("fashioniq", None, tmp_path, source=DUMMY["circo"])
    with pytest.raises(DataError, match="made from nothing: leave out --source"):
        build.prepare("shapes_tiny", None, tmp_path, source=DUMMY["circo"])


def test_finished_tables_need_no_source_and_are_kept(tmp_path, whole):
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    folders = build.prepare("circo", None, data_dir, source=source)
    before = {t: folder.stat().st_ino for t, folder in folders.items()}
    assert build.prepare("circo", None, data_dir) == folders
    assert build.prepare("circo", None, data_dir, source=source) == folders
    assert before == {t: folder.stat().st_ino for t, folder in folders.items()}


@pytest.mark.parametrize("tables", [None, ["queries"]])
def test_tables_of_other_files_are_refused(tmp_path, whole, tables):
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    _break_images(source)
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    for image in (DUMMY["circo"] / UNLABELED).iterdir():
        shutil.copy(image, source / UNLABELED)  # the user has found the rest
    with pytest.raises(DataError, match=r"gallery/1.0.0 is there already, made of other files"):
        build.prepare("circo", tables, data_dir, source=source)


# The first process dies in the middle of the gallery, the second one continues.

_DYING = f"""
import os, sys, time
from data import benchmark, build, shards
shards.SHARD_BYTES = {SMALL}
read = benchmark.read_images
def slow(paths, decode):
    for i, image in enumerate(read(paths, decode)):
        if i == 5: os.write(1, b"half"); time.sleep(60)
        yield image
benchmark.read_images = slow
build.prepare("circo", ["gallery"], sys.argv[2], source=sys.argv[1], allow_partial=True)
"""


@pytest.fixture
def killed(tmp_path) -> tuple[Path, Path]:
    """A source, and a data_dir whose builder was killed when two shards of four were done."""
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    command = [sys.executable, "-c", _DYING, str(source), str(data_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(4) == "half"
        process.send_signal(signal.SIGKILL)
    scratch = data_dir / "circo" / "gallery" / ".building"
    assert shards.finished_shards(scratch) == 2 and (scratch / "shard.part").exists()
    return source, data_dir


@pytest.fixture
def read_files(monkeypatch) -> list[str]:
    """Names of the images that are read to be written."""
    names: list[str] = []

    def noted(paths, decode):
        paths = list(paths)
        names.extend(path.name for path in paths)
        return read_images(paths, decode)

    monkeypatch.setattr(benchmark, "read_images", noted)
    monkeypatch.setattr(shards, "SHARD_BYTES", SMALL)
    return names


def _same_as_unbroken(source: Path, data_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "unbroken"
    build.prepare("circo", ["gallery"], other, source=source, allow_partial=True)
    tables = [Table(folder, "circo", "gallery", "unlabeled") for folder in (data_dir, other)]
    assert len(tables[0]) == len(tables[1]) == 8
    assert all(tables[0][i] == tables[1][i] for i in range(8))


def test_killed_build_is_continued(killed, tmp_path, read_files, capsys):
    source, data_dir = killed
    folder = data_dir / "circo" / "gallery"
    kept = [(folder / ".building" / f"unlabeled-0000{i}").stat().st_ino for i in range(2)]
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert "keeping 2 finished shard(s)" in capsys.readouterr().err
    assert len(read_files) == 4 and read_files[0] == "000000000008.jpg"  # number 4
    files = sorted((folder / "1.0.0").glob("*.array_record*"))
    assert [file.stat().st_ino for file in files[:2]] == kept and len(files) == 4
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "1.0.0"]
    assert not (folder / "1.0.0" / shards.JOURNAL).exists()
    _same_as_unbroken(source, data_dir, tmp_path)


def test_files_that_changed_since_the_kill_are_noticed(killed, tmp_path, read_files, capsys):
    source, data_dir = killed
    file = source / UNLABELED / "000000000017.jpg"
    file.write_bytes((source / UNLABELED / "000000000066.jpg").read_bytes())
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert "changed since an unfinished build: starting over" in capsys.readouterr().err
    assert len(read_files) == 8
    assert Table(data_dir, "circo", "gallery", "unlabeled")[0]["image"] == file.read_bytes()
    _same_as_unbroken(source, data_dir, tmp_path)


def test_damaged_shard_is_written_again(killed, tmp_path, read_files):
    source, data_dir = killed
    shard = data_dir / "circo" / "gallery" / ".building" / "unlabeled-00001"
    shard.write_bytes(shard.read_bytes()[:-9])
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert len(read_files) == 6
    _same_as_unbroken(source, data_dir, tmp_path)


class Killed(BaseException):
    """Like a signal: nobody catches it."""


def test_continues_in_a_later_split(tmp_path, monkeypatch, read_files):
    source, data_dir = DUMMY["fashioniq"], tmp_path / "data"
    read = benchmark.read_images
    left = iter(range(16))

    def dying(paths, decode):
        for image in read(paths, decode):
            if next(left, None) is None:
                raise Killed
            yield image

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "read_images", dying)
        with pytest.raises(Killed):
            build.prepare("fashioniq", None, data_dir, source=source, allow_partial=True)
    journal = data_dir / "fashioniq" / "gallery" / ".building" / shards.JOURNAL
    done = json.loads(journal.read_text())["shards"]
    assert sum(n for n, _ in done["train"]) == 10 and 0 < sum(n for n, _ in done["val"]) <= 6
    assert done["test"] == []
    read_files.clear()
    build.prepare("fashioniq", None, data_dir, source=source, allow_partial=True)
    assert len(read_files) == 20 - sum(n for n, _ in done["val"])
    other = tmp_path / "unbroken"
    build.prepare("fashioniq", None, other, source=source, allow_partial=True)
    for split in ("train", "val", "test"):
        tables = [Table(folder, "fashioniq", "gallery", split) for folder in (data_dir, other)]
        assert len(tables[0]) == len(tables[1]) == 10
        assert all(tables[0][i] == tables[1][i] for i in range(10))


@pytest.mark.parametrize("at", ["set_splits", "write_to_directory", "rename"])
def test_death_while_finishing_loses_nothing(tmp_path, monkeypatch, read_files, at):
    source, data_dir = DUMMY["circo"], tmp_path / "data"

    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr(build.os, "rename", die)
        else:
            patch.setattr(f"tensorflow_datasets.core.DatasetInfo.{at}", die)
        with pytest.raises(Killed):
            build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert len(read_files) == 8
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert len(read_files) == 8
    _same_as_unbroken(source, data_dir, tmp_path)


def test_full_disk_keeps_the_finished_shards(tmp_path, monkeypatch, read_files):
    source, data_dir, opened = DUMMY["circo"], tmp_path / "data", []

    class Full(shards.ArrayRecordWriter):
        def __init__(self, *args):
            opened.append(args)
            if len(opened) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", Full)
        with pytest.raises(DataError, match="No space left on device. Free some space"):
            build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert not list(data_dir.rglob("dataset_info.json"))
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert read_files[8:] == read_files[4:8]  # the second time from number 4 on
    _same_as_unbroken(source, data_dir, tmp_path)


def test_image_that_vanishes_while_building_is_named(tmp_path, monkeypatch):
    source, data_dir = _copy("circo", tmp_path), tmp_path / "data"
    found = build.survey("circo", source)
    (source / UNLABELED / "000000000091.jpg").unlink()
    monkeypatch.setattr(build, "survey", lambda *_: found)
    with pytest.raises(DataError, match="000000000091.jpg: not a readable image .*No such file"):
        build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert not list(data_dir.rglob("dataset_info.json"))


def test_images_in_order_and_in_parallel(tmp_path):
    paths = [tmp_path / str(i) for i in range(300)]
    for i, path in enumerate(paths):
        path.write_bytes(str(i).encode())
    assert list(read_images(paths, False)) == [str(i).encode() for i in range(300)]
    paths[17].unlink()
    problems = image_problems(paths, False, "x")
    assert problems[17] == "is missing" and problems.count(None) == 299
    with pytest.raises(DataError, match="/17: not a readable"):
        list(read_images(paths, False))


def test_in_parallel_what_comes_before_an_error_is_not_lost():
    def items():
        yield from range(11)
        raise DataError("the list ends here")

    found = []
    with pytest.raises(DataError, match="the list ends here"):
        for value in parallel(lambda x: 2 * x, items()):
            found.append(value)
    assert found == [2 * i for i in range(11)]


def test_report_is_complete_only_if_all_is_there():
    good = Report({"queries": 2, "gallery": 5}, {"queries": 2}, {"queries": 0})
    assert good.complete
    assert not Report({"queries": 2}, {"queries": 3}).complete
    assert not Report({"queries": 2}, {"queries": 2}, {"queries": 1}).complete
    assert not Report({"queries": 2}, {}, {}, ["a.jpg: is missing"]).complete
    assert not Report({}, {"queries": 2}).complete
    many = str(Report({}, {"queries": 2}, {"others": 3}, [f"{i}.jpg: gone" for i in range(25)]))
    assert "queries: none, official 2" in many and "others: 3 lost" in many
    assert "  9.jpg: gone" in many and "10.jpg" not in many and "and 15 more" in many


def _run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), *flags]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


def test_binary(tmp_path):
    source = _copy("circo", tmp_path)
    (source / UNLABELED / "000000000017.jpg").unlink()
    flags = [f"--source={source}", f"--data_dir={tmp_path / 'data'}", "--dataset=circo"]
    checked = _run(*flags, "--check")
    assert checked.returncode == 1 and "not complete: --allow_partial" in checked.stdout
    assert "000000000017.jpg: is missing" in checked.stdout
    assert "queries: 1, 1 lost, official 800" in checked.stdout
    assert not (tmp_path / "data").exists()
    refused = _run(*flags)
    assert refused.returncode == 2 and "--allow_partial" in refused.stderr
    assert "Traceback" not in refused.stderr
    built = _run(*flags, "--allow_partial")
    assert built.returncode == 0 and "gallery: " in built.stdout
    again = _run(*flags[1:], "--check")
    assert again.returncode == 0
    assert "queries: val 2, test 1: good, but made of incomplete files of val, test" in again.stdout


def test_another_version_does_not_continue(killed, tmp_path, read_files, monkeypatch):
    source, data_dir = killed
    version = type(build._builder_class("circo").VERSION)("9.0.0")
    monkeypatch.setattr(build._builder_class("circo"), "VERSION", version)
    build.prepare("circo", ["gallery"], data_dir, source=source, allow_partial=True)
    assert len(read_files) == 8
    assert Table(data_dir, "circo", "gallery", "unlabeled").version == "9.0.0"


def test_images_over_the_limit_of_pixels_are_problems(tmp_path, whole):
    source = _copy("circo", tmp_path)
    Image.new("RGB", (64, 64)).save(source / UNLABELED / "000000000091.jpg")
    with images.limited(0.003):
        text = str(build.survey("circo", source).reports["val"])
        assert "000000000091.jpg: is unreadable (it has 64 x 64 pixels, 0.004096 megapixels" in text
        with pytest.raises(DataError, match=r"91.jpg: not a readable image \(it has 64 x 64.*--ch"):
            build.prepare("circo", None, tmp_path / "data", source=source)
    build.prepare("circo", None, tmp_path / "data", source=source)
    with images.limited(0.003), pytest.raises(DataError, match="record 5: image has 64 x 64 pixel"):
        build.check("circo", None, tmp_path / "data")
