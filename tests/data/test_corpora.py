"""Training corpora: what their readers find in good and in damaged files."""

import io
import json
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from cir_jax.errors import DataError
from data import corpus, formats
from data.build import survey
from data.pairs import readers as pair_readers
from data.source import Options
from data.texts.texts_dataset_builder import Captions
from tests.data.corpora import jpeg, records, report, sample, write_tar

DATA = Path(__file__).resolve().parents[2] / "data"
ANNOTATIONS = DATA.parents[1] / "shared" / "annotations"
DUMMIES = {  # source: dataset, records
    "images/dummy": ("images", 6),
    "pairs/dummy/cc3m": ("pairs", 4),
    "pairs/dummy/llava": ("pairs", 3),
    "pairs/dummy/laion": ("pairs", 4),
    "texts/dummy": ("texts", 5),
    "text_triplets/dummy": ("text_triplets", 4),
    "image_triplets/dummy": ("image_triplets", 4),
}


@pytest.mark.parametrize("dummy", DUMMIES)
def test_dummy_data(dummy):
    dataset, count = DUMMIES[dummy]
    found = records(dataset, DATA / dummy)
    assert [record["id"] for record in found] == list(range(count))
    for record in found:
        assert not {"captions", "text"} & set(record) or record.get("captions") or record["text"]
        for field in ("image", "reference", "target"):
            if field in record:
                assert Image.open(io.BytesIO(record[field])).size == (32, 32)


@pytest.mark.parametrize("dummy", DUMMIES)
def test_reading_on_from_the_middle(dummy):
    dataset, count = DUMMIES[dummy]
    whole = records(dataset, DATA / dummy)
    for start in range(1, count + 1):
        assert records(dataset, DATA / dummy, start) == whole[start:]


def test_fields_are_those_of_the_embedded_world():
    from data.shapes import captioned, queries

    pair = next(iter(captioned.records("captions", "train", 2)))
    assert records("pairs", DATA / "pairs/dummy/cc3m")[0].keys() == pair.keys()
    triplet = next(iter(queries.triplet_records("train", 1)))
    there = records("image_triplets", DATA / "image_triplets/dummy")[0]
    assert there.keys() == triplet.keys() | {"texts"}
    assert there["reference_caption"] == "a red square" and there["text"] == "turn red into blue"


def test_original_bytes_are_kept():
    first = records("pairs", DATA / "pairs/dummy/cc3m")[0]
    assert first["image"] == (DATA / "pairs/dummy/cc3m/train/0/0.jpg").read_bytes()
    assert first["captions"] == ["a red square on a pale ground"]


def test_unusable_entries_are_listed_counted_and_left_out(tmp_path):
    rows = ["filepath\ttitle"] + [f"{i}.jpg\tnumber {i}" for i in range(10)]
    rows[4] = "3.jpg\t  "
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i)[: 200 if i == 5 else None])
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    found = report("pairs", tmp_path)  # 3 is empty, 5 is damaged, 9 is missing
    assert found.counts == {"pairs": 7, "entries with an empty text dropped": 1}
    assert found.lost == {"pairs": 2} and not found.complete
    assert [problem.split(":")[0].rsplit("/")[-1] for problem in found.problems] == [
        "pairs.tsv line 7",
        "pairs.tsv line 11",
    ]
    assert "is no readable image" in found.problems[0] and "is missing" in found.problems[1]
    kept = records("pairs", tmp_path, decode="survey")
    assert [r["captions"] for r in kept] == [[f"number {i}"] for i in (0, 1, 2, 4, 6, 7, 8)]
    assert [r["id"] for r in kept] == list(range(7))
    for start in range(8):
        assert records("pairs", tmp_path, start, decode="survey") == kept[start:]
    # without looking into them first, the damaged image stops the build and is named
    assert report("pairs", tmp_path, decode="build").lost == {"pairs": 1}
    with pytest.raises(DataError, match=r"line 7: image is no readable.*--allow_partial"):
        records("pairs", tmp_path, decode="build")
    assert len(records("pairs", tmp_path, decode="never")) == 8


def test_stamp_changes_with_what_the_records_are_made_of(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg())

    def stamp():
        found = survey("images", tmp_path, Options())
        return found.splits["images"]["train"].stamp

    before = stamp()
    assert stamp() == before
    (tmp_path / "notes.txt").write_text("no image")
    assert stamp() == before
    (tmp_path / "b.jpg").write_bytes(jpeg(side=9))
    assert stamp() != before
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    renamed = stamp()
    (tmp_path / "c.jpg").rename(tmp_path / "b.jpg")
    assert stamp() != renamed


def test_wrong_source_is_refused(tmp_path):
    (tmp_path / "list.tsv").write_text("filepath\ttitle\n" + "gone.jpg\ta\n\ngone2.jpg\tb\n")
    with pytest.raises(DataError, match=r"only 0 of 2 entries.*\n  .*gone.jpg is missing"):
        report("pairs", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        report("pairs", tmp_path / "nothing")
    with pytest.raises(DataError, match="no files of type .txt"):
        report("texts", tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")
    with pytest.raises(DataError, match="unknown split of texts 'val'. Valid: train"):
        survey("texts", DATA / "texts/dummy", Options(splits=("val",)))


def test_unreadable_list_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a fox")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(formats, "lines", refuse)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(Permission denied\)"):
        report("texts", tmp_path)


def test_columns_flag(tmp_path):
    assert corpus.parse_columns(["text=a b", "target=c=d"]) == {"text": "a b", "target": "c=d"}
    (tmp_path / "map.json").write_text('{"text": "instruction"}')
    assert corpus.parse_columns([str(tmp_path / "map.json")]) == {"text": "instruction"}
    with pytest.raises(DataError, match="'text' is not of the form field=column"):
        corpus.parse_columns(["text"])
    (tmp_path / "map.json").write_text('["text"]')
    with pytest.raises(DataError, match="map.json: expected"):
        corpus.parse_columns([str(tmp_path / "map.json")])
    with pytest.raises(DataError, match="Did you mean 'text'"):
        report("texts", DATA / "texts/dummy", columns={"txt": "caption"})


# Images


def test_images_in_any_nesting(tmp_path):
    for name in ("b.JPEG", "a.png", "z/deep/er/c.webp", "y/d.jpg", ".hidden/e.jpg", "y/.f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "y" / "round").symlink_to(tmp_path)
    (tmp_path / "y" / "g.jpg").symlink_to(tmp_path / "a.png")
    names = [record["name"] for record in records("images", tmp_path)]
    assert names == ["a.png", "b.JPEG", "y/d.jpg", "y/g.jpg", "z/deep/er/c.webp"]
    (tmp_path / "a.png").unlink()
    problems = report("images", tmp_path).problems
    assert len(problems) == 1 and problems[0].startswith("y/g.jpg: ")


def test_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"no images in it.*\*\.jpeg"):
        report("images", tmp_path)
    (tmp_path / "file.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="is no folder"):
        report("images", tmp_path / "file.jpg")


# Pairs


def test_table_of_files(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "up.jpg").write_bytes(jpeg(1))
    (tmp_path / "lists" / "here.jpg").write_bytes(jpeg(2))
    (tmp_path / "lists" / "pairs.csv").write_text(
        'filepath\ttitle\nup.jpg\t"says ""hi"", a\nb"\nhere.jpg\tfirst\nhere.jpg\tsecond\n'
        "here.jpg\nhere.jpg\t\udcff\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    found = records("pairs", tmp_path / "lists" / "pairs.csv", decode="survey")
    assert [r["captions"] for r in found] == [['says "hi", a\nb'], ["first", "second"]]
    assert found[0]["image"] == jpeg(1)
    problems = report("pairs", tmp_path / "lists" / "pairs.csv").problems
    assert "pairs.csv line 6: has 1 columns, expected 2" in problems[0]
    assert "pairs.csv line 7: caption is not valid Unicode" in problems[1]


def test_table_errors(tmp_path):
    file = tmp_path / "cc3m.tsv"
    for text in ("caption\turl\na fox\thttp://x.org/1.jpg\n", "a fox\thttp://x.org/1.jpg\n"):
        file.write_text(text)
        with pytest.raises(DataError, match="lists URLs.*img2dataset"):
            report("pairs", file)
    file.write_text("path\twords\n1.jpg\ta fox\n")
    with pytest.raises(DataError, match="no column for image .*: path, words.*--columns"):
        report("pairs", file)
    (tmp_path / "1.jpg").write_bytes(jpeg())
    assert records("pairs", file, columns={"image": "path", "caption": "words"})
    file.write_text('filepath\ttitle\n1.jpg\t"never closed\n' + "1.jpg\tx\n" * 20_000)
    with pytest.raises(DataError, match="cc3m.tsv line 2: malformed"):
        report("pairs", file)
    for rest in ('2.jpg\t"never', '2.jpg\t"never\n3.jpg\tx\n', '2.jpg\t"never\n'):
        file.write_text(f'filepath\ttitle\n1.jpg\t"a\nb"\n{rest}')
        with pytest.raises(DataError, match="line 4: a quote that is opened there is never closed"):
            report("pairs", file)
    file.write_text('filepath\ttitle\n1.jpg\t"a\nb"')  # which is, in the last line
    assert records("pairs", file)[0]["captions"] == ["a\nb"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="name one of the files in it: cc3m.tsv, other.json"):
        report("pairs", tmp_path)


def test_llava_list(tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a fox"}]
    good = {"id": "a", "image": "a.jpg", "conversations": turns}
    listed = [
        good,
        {"id": "b", "image": "a.jpg", "conversations": turns},  # one image, two ids
        good,
        {"id": "c", "image": "c.jpg", "conversations": turns[:1]},
        {"id": "d", "image": "c.jpg", "conversations": turns},
        {"id": "e", "image": "c.jpg"},
        "no object",
        {"id": 7, "image": None, "conversations": turns},
    ]
    (tmp_path / "images").mkdir()
    for name in "ac":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(jpeg())
    file = tmp_path / "list.json"
    reader = pair_readers.Listed
    file.write_text(json.dumps(listed))
    entries = list(reader(file, {}).entries(0, contents=True))
    assert [entry.load()["captions"] for entry in entries if not entry.problem] == [
        ["a fox", "a fox"],
        ["a fox"],
    ]
    problems = [f"{e.where.rsplit(' ', 1)[1]} {e.problem}" for e in entries if e.problem]
    assert problems[0] == "2 the id 'a' was there before"
    assert problems[1] == '3 the conversation has no turn of "gpt"'
    assert problems[2].startswith("5 ") and "no column for caption" in problems[2]
    assert problems[3] == "6 is 'no object', expected an object"
    assert problems[4] == "7 names no image"
    whole = [(e.where, e.problem) for e in entries]
    for start in range(len(whole)):
        rest = reader(file, {}).entries(start, contents=True)
        assert [(e.where, e.problem) for e in rest] == whole[start:]


def test_several_captions_of_an_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": ["one", "", "two"]}]')
    assert records("pairs", tmp_path)[0]["captions"] == ["one", "two"]


def test_tar_shards(tmp_path):
    caption = json.dumps({"caption": "from json"}).encode()
    files = [*sample("a/1"), *sample("a/2", b" "), ("a/3.jpg", jpeg(3)), ("a/3.json", caption)]
    files += [("a/4.jpg", jpeg()), *sample("a/1"), ("a/5.jpg", jpeg()), ("a/5.json", b"{")]
    files += [("a/6.txt", b"\xff"), ("a/6.jpg", jpeg()), *sample("a/7"), *sample("a/8")]
    write_tar(tmp_path / "0.tar", files)
    write_tar(tmp_path / "1.tar", sample("a/1", b"other shard"))
    found = report("pairs", tmp_path)
    assert found.counts == {"pairs": 5, "entries with an empty text dropped": 1}
    text = "\n".join(found.problems)
    assert "0.tar key a/4: the sample" in text and "no column for caption" in text
    assert "0.tar key a/1: the key was there before" in text
    assert "0.tar key a/5: a/5.json is not valid JSON" in text
    assert "0.tar key a/6: a/6.txt is not UTF-8" in text
    captions = [r["captions"][0] for r in records("pairs", tmp_path, decode="survey")]
    assert captions == ["a fox", "from json", "a fox", "a fox", "other shard"]


def test_a_truncated_tar_file_never_passes_for_a_whole_one(tmp_path):
    path = write_tar(tmp_path / "0.tar", [f for key in range(4) for f in sample(key)])
    whole = path.read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    path.write_bytes(whole + b"\0" * 1024)
    reader = pair_readers.Shards(tmp_path, {})
    assert not any(e.problem for e in reader.entries(0, contents=True))
    for size in [*range(0, len(whole), 101), *range(0, len(whole) + 1, 512)]:
        path.write_bytes(whole[:size])
        try:
            problems = [e.problem for e in reader.entries(0, contents=True) if e.problem]
        except DataError as error:  # nothing of it can be read
            assert "0.tar: no readable, uncompressed tar file" in str(error) and size < 1024
        else:
            assert "truncated" in problems[-1]
    header = whole.index(b"2.txt")
    path.write_bytes(whole[:header] + b"?" + whole[header + 1 :] + b"\0" * 1024)
    entries = list(reader.entries(0, contents=True))
    assert len(entries) == 4 and entries[-1].where.endswith("key 2")
    assert "the tar file is truncated or damaged behind it" in entries[-1].problem


def test_compressed_tar_file(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as archive:
        archive.add(DATA / "texts/dummy/captions.txt")
    with pytest.raises(DataError, match="0.tar: no readable, uncompressed tar file"):
        report("pairs", tmp_path)


# Texts


def test_texts_are_kept_as_they_are():
    found = [record["captions"] for record in records("texts", DATA / "texts/dummy")]
    assert found[1] == ["a costume worn by <PERSON> , for $ 5"]
    assert found[-1] == ["  fox in the snow "]
    counts = report("texts", DATA / "texts/dummy").counts
    assert counts == {"texts": 5, "entries with an empty text dropped": 1}


def test_text_formats(tmp_path):
    (tmp_path / "a.tsv").write_text('" a quote, kept\thttp://x.org\nb\thttp://y.org\n')
    (tmp_path / "b.csv").write_text("id,caption\n1,from csv\n")
    (tmp_path / "c.json").write_text('\ufeff["from json", null]')
    (tmp_path / "d.txt").write_bytes(b"from txt\r\n\xff\xfe\nlast")
    found = report("texts", tmp_path)
    assert [r["captions"][0] for r in records("texts", tmp_path, decode="survey")] == [
        '" a quote, kept',
        "b",
        "from csv",
        "from json",
        "from txt",
        "last",
    ]
    assert "c.json record 1: is None" in found.problems[0]
    assert "d.txt line 2: not UTF-8" in found.problems[1]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" if i % 3 else None for i in range(100)]
    table = pyarrow.table({"prompt": texts, "n": range(100)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=50)
    with pytest.raises(DataError, match=r"a.parquet: no column for text .*: prompt, n\."):
        report("texts", tmp_path)
    found = records("texts", tmp_path, columns={"text": "prompt"})
    assert [r["captions"] for r in found] == 2 * [[text] for text in texts if text]
    reader = Captions(tmp_path, {"text": "prompt"})
    whole = list(reader.entries(0, contents=True))
    assert whole[-1].done == reader.total and whole[103].where.endswith("b.parquet row 3")
    for start in (1, 6, 7, 8, 99, 100, 101, 150, 200):
        rest = [entry.where for entry in reader.entries(start, contents=True)]
        assert rest == [entry.where for entry in whole[start:]]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="b.parquet: no readable Parquet file"):
        report("texts", tmp_path, columns={"text": "prompt"})


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(DataError, match=r"a.parquet.*pip install 'cir_jax\[parquet\]'"):
        report("texts", tmp_path)


# JSON


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_json_list_does_not_depend_on_the_chunks(tmp_path, monkeypatch, chunk):
    values = [{"a": 'é [,] \\ " 𝄞', "b": [1, {"c": None}]}, 12, -3.5e2, "x", [], True, "\u2028"]
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False, indent=1)):
        (tmp_path / "a.json").write_text(f" \n{text}\n", encoding="utf-8")
        assert [item.value for item in formats.json_items(tmp_path / "a.json")] == values
    (tmp_path / "a.json").write_text("[ ]")
    assert list(formats.json_items(tmp_path / "a.json")) == []


def test_cut_off_json_list_is_an_error_wherever_it_is_cut(tmp_path):
    text = json.dumps([{"text": f"é{i}"} for i in range(3)], ensure_ascii=False).encode()
    for size in range(1, len(text)):
        (tmp_path / "a.json").write_bytes(text[:size])
        with pytest.raises(DataError, match=r"a.json record \d"):
            list(formats.json_items(tmp_path / "a.json"))
    for text, problem in (
        ("", "is empty"),
        ("12", "expected a JSON list"),
        ('["a" "b"]', "record 1: expected , or ]"),
        ('["a", b]', "record 1: malformed"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=problem):
            list(formats.json_items(tmp_path / "a.json"))


def test_a_long_list_is_not_held_in_memory(tmp_path):
    count = 20_000
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",\n".join('{"text": "%s"}' % ("x" * 600) for _ in range(count)) + "]")
    tracemalloc.start()
    try:
        reader = Captions(tmp_path, {})
        assert sum(1 for _ in reader.entries(0, contents=False)) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.total > 12_000_000 and peak < 6_000_000


# Triplets
