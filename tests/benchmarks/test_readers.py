"""benchmarks/readers.py: what it measures, and the numbers that are committed."""

import json

import pytest

from benchmarks import reader_files, readers

REPORT = json.loads((readers.ROOT / "benchmarks" / "readers.json").read_text())
README = (readers.ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("kind", readers.READERS)
def test_all_readers_give_the_same_records(kind, tmp_path):
    path = reader_files.named(tmp_path, kind)
    path.parent.mkdir()
    reader_files.write(kind, path, 70)
    texts = list(reader_files.captions(70))
    expected = list(readers.READERS[kind]["ours"](path))
    if kind == "csv":  # every fourth has quotes
        texts[::4] = [f'{text}, as "they" say' for text in texts[::4]]
    assert [text for text, _ in expected] == texts
    assert {len(image) if image else 0 for _, image in expected} == (
        set(range(reader_files.IMAGE - 8, reader_files.IMAGE + 1)) if kind in IMAGES else {0}
    )
    for name, reader in readers.READERS[kind].items():
        if readers.here(name):
            assert list(reader(path)) == expected, name


IMAGES = ("parquet_images", "tar")


def test_what_becomes_of_a_broken_record(tmp_path):
    """Ours, and `datasets`, which is here: as the committed table says it of all."""
    found = readers.verdicts(tmp_path)
    assert found.keys() == REPORT["broken"].keys()
    for kind, files in found.items():
        for what, by in files.items():
            said = REPORT["broken"][kind][what]
            assert by.items() <= said.items(), (kind, what)
            assert by["ours"].startswith(("told", "ends, saying where", "reads all", "counts it"))
            assert "in silence" not in by["ours"]
    silent = [by["datasets"] for files in found.values() for by in files.values()]
    assert any("takes None for it" in said for said in silent)
    assert any("ends with an error" in said for said in silent)


def test_the_readme_has_the_committed_numbers():
    assert readers.table(REPORT) in README and readers.broken_table(REPORT) in README


def test_ours_are_not_behind_what_could_replace_them():
    """`datasets` and webdataset, which read all that ours do; the others are quoted in `data`."""
    for kind, found in REPORT["speed"].items():
        for other in {"datasets", "webdataset"} & found.keys():
            ours, theirs = (found[name]["cpu_s_per_million"] for name in ("ours", other))
            assert ours < 1.1 * theirs, (kind, other)
