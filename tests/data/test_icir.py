"""i-CIR: a database per instance, several right answers, reference images beside it."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import benchmarks
from data import build
from tests.data.dummies import copy, dummy, rows


def test_each_instance_has_its_database(tmp_path):
    build.prepare("icir", None, tmp_path, source=dummy("icir"), allow_partial=True)
    gallery = rows(tmp_path, "icir", "gallery", "test")
    names = [record["name"].decode() for record in gallery]
    assert len(names) == 7 and names[-1] == "icir/database/both.jpg"  # listed twice, kept once
    assert gallery[-1]["categories"] == [b"star_7", b"ring_2"]
    first, second, third = rows(tmp_path, "icir", "queries", "test")
    assert [r["category"] for r in (first, second, third)] == [b"star_7", b"star_7", b"ring_2"]
    assert first["texts"] == [b"in snow"] and first["reference"] == second["reference"] == 0
    # of the instance and of the text; the image of both databases is right for one of them only
    assert [names[i] for i in first["targets"]] == [
        "icir/database/star_7/0.jpg", "icir/database/both.jpg"]  # fmt: skip
    assert [names[i] for i in third["targets"]] == [f"icir/database/ring_2/{i}.jpg" for i in (0, 1)]
    benchmark = benchmarks.load("icir", "", tmp_path, allow_partial=True)
    assert benchmark.counts == {"queries": 3, "gallery": 7, "gallery ring_2": 4,
                                "gallery star_7": 4}  # fmt: skip
    image = (dummy("icir") / "query/star_7/0.jpg").read_bytes()
    assert benchmark.reference(benchmark.queries[1])["image"] == image


def test_the_folder_may_have_any_name_and_images_may_be_linked(tmp_path):
    source = copy("icir", tmp_path).rename(tmp_path / "icir_v1.0.0")
    build.prepare("icir", None, tmp_path / "data", source=source, allow_partial=True, link=True)
    linked = rows(tmp_path / "data", "icir", "gallery", "test")
    assert linked[0]["image"] == (source / "database/star_7/0.jpg").read_bytes()


def test_an_image_listed_twice_for_an_instance_counts_once(tmp_path):
    source = copy("icir", tmp_path)
    with open(source / "database_files.csv", "a") as file:
        file.write("icir/database/star_7/0.jpg,in snow,star_7\n")
    build.prepare("icir", None, tmp_path / "data", source=source, allow_partial=True)
    gallery = rows(tmp_path / "data", "icir", "gallery", "test")
    assert len(gallery) == 7 and gallery[0]["categories"] == [b"star_7"]
    assert len(rows(tmp_path / "data", "icir", "queries", "test")[0]["targets"]) == 2


def shards(source: Path, size: int = 3) -> Path:
    """The dummy as the hub has it: tar files of an image and its JSON each."""
    for kind in ("query", "database"):
        lines = (source / f"{kind}_files.csv").read_text().splitlines()
        (source / "webdataset" / kind).mkdir(parents=True)
        for first in range(0, len(lines), size):
            path = source / "webdataset" / kind / f"{kind}-{first // size:06d}.tar"
            with tarfile.open(path, "w") as archive:
                for i, line in enumerate(lines[first : first + size], first):
                    image, text, instance = line.split(",")
                    fields = {"img_path": image, "text": text, "instance": instance}
                    pixels = (source / image.removeprefix("icir/")).read_bytes()
                    contents = {"jpg": pixels, "json": json.dumps(fields).encode()}
                    for extension, content in contents.items():
                        info = tarfile.TarInfo(f"{i:09d}.{extension}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    for name in ("query", "database"):
        shutil.rmtree(source / name)
        (source / f"{name}_files.csv").unlink()
    return source


def test_the_hubs_shards_give_the_same_tables(tmp_path):
    build.prepare("icir", None, tmp_path / "a", source=dummy("icir"), allow_partial=True)
    source = shards(copy("icir", tmp_path))
    build.prepare("icir", None, tmp_path / "b", source=source, allow_partial=True)
    for table in ("gallery", "references", "queries", "names"):
        found, expected = (rows(tmp_path / x, "icir", table, "test") for x in "ba")
        assert str(found) == str(expected)
    with pytest.raises(DataError, match="database-000000.tar .*cannot be linked"):
        build.prepare("icir", None, tmp_path / "c", source=source, allow_partial=True, link=True)


def test_damaged_shards_are_named(tmp_path):
    source = shards(copy("icir", tmp_path))
    shard = source / "webdataset" / "query" / "query-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b'"instance"', b'"instanze"'))
    with pytest.raises(DataError, match="query-000000.tar key 000000000: no sample of i-CIR"):
        build.survey("icir", source)
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="query-000000.tar.*truncated"):
        build.survey("icir", source)


def test_lost_references_and_answers_lose_their_queries(tmp_path):
    source = copy("icir", tmp_path)
    (source / "query/star_7/0.jpg").unlink()
    (source / "database/ring_2/0.jpg").write_bytes(b"no image")
    (source / "database/star_7/2.jpg").unlink()
    report = build.survey("icir", source).reports["test"]
    assert report.lost_queries == [0, 1, 2] and report.lost["gallery"] == 2
    assert [one["queries"] for one in report.damaged] == [[], [2], [0, 1]]


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("query", "icir/query/star_7/0.jpg,in snow", "line 4: .*expected image, text and instance"),
        ("query", "icir/query/star_7/0.jpg,upside down,star_7", "line 4: no image of .*upside"),
        ("database", ",in snow,star_7", "line 9: .*expected image, text and instance"),
    ],
)
def test_lists_that_do_not_fit_are_named(tmp_path, name, line, message):
    source = copy("icir", tmp_path)
    with open(source / f"{name}_files.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        build.survey("icir", source)


def test_a_missing_list_is_named(tmp_path):
    source = copy("icir", tmp_path)
    (source / "query_files.csv").unlink()
    with pytest.raises(DataError, match=r"query_files.csv(.|\n)*icir_v1.0.0.tar.gz"):
        build.survey("icir", source)
    shutil.rmtree(source)
    with pytest.raises(DataError, match="there is no such folder"):
        build.survey("icir", source)
