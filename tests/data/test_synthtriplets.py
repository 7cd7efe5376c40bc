"""SynthTriplets18M's steps on the embedded world: the same files, whatever was killed or shared."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input.keywords import DictionaryTagger
from cir_jax.training import logs
from data.shapes import captioned
from data.shapes import text_triplets as world
from data.shapes.painter import Painter
from data.sharing import Shard, alone
from data.synthtriplets import drawing, filtering, filters, sheet
from data.synthtriplets.triplets import CaptionTriplets
from data.text_triplets import captions, embedders, generation
from tests.data.corpora import records, write_tar
from tests.launch.binaries import run

BLOCK = 16
CLIP = "data/shapes/clip"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def keywords(tmp_path_factory):
    """Step (a): caption triplets of the world's captions by the code of the text triplets."""
    folder = tmp_path_factory.mktemp("captions")
    lines = [caps[0] for _, caps in captioned.scenes("captions", "train", 60)]
    (folder / "captions.txt").write_text("\n".join(lines))
    parts = ("COLOUR", "SHAPE", "SIZE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIR_JAX_CACHE", str(folder / "cache"))
        generation.generate(
            captions.read(str(folder / "captions.txt"), folder, {}),
            folder / "triplets" / "t.jsonl",
            generation.Recipe(world.rules(), parts, least=1, band=world.BAND),
            DictionaryTagger(world._PART_OF),
            lambda: embedders.text_tower(CLIP),
            names={"keywords": "world", "embedder": CLIP},
        )
    return folder / "triplets"


@pytest.fixture(scope="module")
def pairs(keywords, tmp_path_factory):
    """Step (c), the renderer standing in: (folder, counts) of an unbroken run."""
    folder = tmp_path_factory.mktemp("drawn") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "BLOCK", BLOCK)
        counts = drawing.draw(CaptionTriplets(keywords, {}), folder, Painter(), samples=2, seed=3)
    return folder, counts


@pytest.fixture(scope="module")
def clip():
    return filtering.Clip(CLIP)


@pytest.fixture(scope="module")
def kept(pairs, clip, tmp_path_factory):
    """Step (d): (folder, statistics) of an unbroken run."""
    folder = tmp_path_factory.mktemp("kept") / "kept"
    return folder, filtering.filter_pairs(pairs[0], folder, clip, filters.THRESHOLDS, best=1)


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")
    }


def test_pairs_are_drawn_of_every_triplet(pairs, keywords):
    folder, counts = pairs
    rows = [json.loads(line) for line in (keywords / "t.jsonl").read_text().splitlines()]
    files = sorted(folder.glob("pairs-*.tar"))
    assert len(files) == -(-len(rows) // BLOCK) and counts == {"pairs": 2 * len(rows)}
    found = [pair for file in files for pair in filtering.read_pairs(file)]
    assert [p.key for p in found] == [f"{i:09d}-{s}" for i in range(len(rows)) for s in (0, 1)]
    for i, pair in enumerate(found):
        row = rows[i // 2]
        text = row.pop("conditioning_caption", None) or row["text"]
        row["text"] = text
        assert pair.record == {"triplet": i // 2, **row, "sample": i % 2}
    assert found[0].reference != found[1].reference  # samples draw anew
    painted, _ = Painter().pair(rows[0]["reference_caption"], rows[0]["target_caption"], "3/0/1")
    assert [found[1].reference, found[1].target] == painted


def test_a_killed_or_shared_run_draws_the_same_files(pairs, keywords, tmp_path):
    triplets = CaptionTriplets(keywords, {})
    for at in (5, 50):

        class Dying(Painter):
            left = at

            def pair(self, *arguments):
                self.left -= 1
                if not self.left:
                    raise Killed
                return super().pair(*arguments)

        with pytest.raises(Killed):
            drawing.draw(triplets, tmp_path / "a", Dying(), samples=2, seed=3)
    assert drawing.draw(triplets, tmp_path / "a", Painter(), samples=2, seed=3) == pairs[1]
    assert contents(tmp_path / "a") == contents(pairs[0])
    parts = [
        drawing.draw(triplets, tmp_path / "b", Painter(), samples=2, seed=3, shard=Shard(i, 3))
        for i in (2, 0, 1)
    ]
    assert sum(part["pairs"] for part in parts) == pairs[1]["pairs"]
    assert contents(tmp_path / "b") == contents(pairs[0])
    drawing.draw(triplets, tmp_path / "c", Painter(), samples=2, seed=4)
    assert contents(tmp_path / "c").keys() == contents(pairs[0]).keys()
    assert contents(tmp_path / "c") != contents(pairs[0])


def test_what_cannot_be_drawn_is_counted(tmp_path):
    rows = [{"source_caption": c, "target_caption": "a ring", "text": "x"} for c in ("a star", "?")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    triplets = CaptionTriplets(tmp_path / "t.jsonl", {})
    for _ in range(2):  # the second finds the file there, and its counts
        counts = drawing.draw(triplets, tmp_path / "pairs", Painter())
        assert counts == {"pairs": 1, "unreadable": 1}


def test_bad_input_to_drawing(pairs, keywords, tmp_path):
    folder, triplets = tmp_path / "pairs", CaptionTriplets(keywords, {})
    shutil.copytree(pairs[0], folder)
    with pytest.raises(
        DataError, match=r"of other captions or settings \(seed 3, now 4\).*--output"
    ):
        drawing.draw(triplets, folder, Painter(), samples=2, seed=4)
    with pytest.raises(ConfigError, match="--samples=0: expected 1 or more"):
        drawing.draw(triplets, folder, Painter(), samples=0)
    with alone(folder / ".lock-00000-of-00001"):
        with pytest.raises(DataError, match="another process makes these triplets"):
            drawing.draw(triplets, folder, Painter(), samples=2, seed=3)
    with pytest.raises(ConfigError, match="--step=draw needs --model: .* or shapes"):
        drawing.painter(None)
    good = {"reference_caption": "a", "target_caption": "b", "text": "c"}
    for line, message in (
        ({**good, "text": " "}, "t.jsonl line 2: text is empty. Mend the line"),
        ({**good, "target_keyword": 3}, "line 2: target_keyword is 3, expected a text"),
        ({"text": "c"}, "line 2: no column for reference_caption .*Mend the line"),
    ):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, (good, line))))
        with pytest.raises(DataError, match=message):
            list(CaptionTriplets(tmp_path / "t.jsonl", {}).blocks(8, 0, 1))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no files of type"):
        CaptionTriplets(tmp_path / "nothing", {})


# The filters: cosines with hand-made features


def unit(*degrees):
    """Unit vectors of the plane, float32[n, 2]."""
    angles = np.deg2rad(np.asarray(degrees, float))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


NONE = np.full((1, 2), np.nan, np.float32)


def features(**changes):
    given = dict(
        reference=unit(0), target=unit(30), reference_caption=unit(10), target_caption=unit(50),
        instruction=unit(75), source_keyword=unit(-40), target_keyword=unit(80),
    )  # fmt: skip
    return filters.Features(**(given | changes))


def cosine(degrees):
    return pytest.approx(np.cos(np.deg2rad(degrees)), abs=1e-6)


def test_the_five_similarities():
    found = {name: row[0] for name, row in filters.similarities(features()).items()}
    assert found["image_image"] == cosine(30)
    assert found["image_caption"] == cosine(20)  # the worse of 10 and 20
    assert found["directional"] == cosine(30 - 15)  # chords: at right angles to the middle
    assert found["keyword_image"] == cosine(50)  # the worse of 40 and 50
    assert np.isnan(found["instruction_image"])
    of_deletion = filters.similarities(features(target_keyword=NONE))
    assert of_deletion["keyword_image"][0] == cosine(40)
    assert np.isnan(of_deletion["instruction_image"][0])
    of_model = filters.similarities(features(source_keyword=NONE, target_keyword=NONE))
    assert np.isnan(of_model["keyword_image"][0])
    assert of_model["instruction_image"][0] == cosine(45)
    # IP2P's direction, not the product that the paper prints; two images alike have none
    assert filters.similarities(features(target=unit(-30)))["directional"][0] < 0
    assert filters.similarities(features(target=unit(0)))["directional"][0] == 0


def test_pairs_fall_at_the_first_filter_and_the_best_are_kept():
    names = list(filters.THRESHOLDS)
    found = {name: np.full(8, 0.9, np.float32) for name in names}
    found["instruction_image"][:] = np.nan
    found["image_image"][0] = 0.69
    found["keyword_image"][[0, 1]] = 0.19
    found["image_caption"][2] = 0.19
    found["directional"][3:] = [0.19, 0.2, 0.5, 0.4, 0.5]
    groups = np.asarray([0, 0, 0, 1, 1, 1, 1, 1])
    verdict = filters.falls(found, filters.THRESHOLDS, groups, best=2)
    assert verdict[:4] == ["image_image", "keyword_image", "image_caption", "directional"]
    assert verdict[4:] == ["best", "", "best", ""]
    counts = filters.count(found, verdict, filters.THRESHOLDS)
    assert (counts["pairs"], counts["kept"], counts["best"]) == (8, 2, 2)
    one = {name: {k: v for k, v in c.items() if k != "histogram"} for name, c in
           counts["filters"].items()}  # fmt: skip
    assert one["keyword_image"] == {"pairs": 8, "below": 2, "fell": 1}
    assert one["instruction_image"] == {"pairs": 0, "below": 0, "fell": 0}
    twice = filters.add(counts, counts)
    assert twice["kept"] == 4 and twice["filters"]["image_image"]["below"] == 2
    low, middle, high = filters.quantiles(twice["filters"]["directional"]["histogram"])
    assert (low, middle, high) == pytest.approx((0.2, 0.5, 0.9), abs=0.011)
    assert filters.quantiles(twice["filters"]["instruction_image"]["histogram"]) == []
    assert filters.describe(counts) == (
        "2 of 8 pairs kept; fell: 1 image_image, 1 image_caption, 1 directional, 1 keyword_image, "
        "0 instruction_image, 2 too many of a triplet"
    )


def test_the_papers_thresholds_and_others():
    paper = dict(
        image_image=0.7, image_caption=0.2, directional=0.2, keyword_image=0.2,
        instruction_image=0.2,
    )  # fmt: skip
    assert filters.read_thresholds([]) == paper
    assert filters.read_thresholds(["image_image=0.5"]) == paper | {"image_image": 0.5}
    with pytest.raises(ConfigError, match="filter in --thresholds: 'image_images'.*'image_image'"):
        filters.read_thresholds(["image_images=0.5"])
    for value in ("directional=x", "directional=2", "directional", "directional=nan"):
        with pytest.raises(ConfigError, match=f"--thresholds: {value}: expected a cosine"):
            filters.read_thresholds([value])


# The filters over files


def test_what_passes_is_read_as_image_triplets(pairs, kept):
    folder, statistics = kept
    everything = {p.key: p for f in pairs[0].glob("*.tar") for p in filtering.read_pairs(f)}
    passed = {p.key: p for f in folder.glob("*.tar") for p in filtering.read_pairs(f)}
    assert all(everything[key] == pair for key, pair in passed.items())
    assert len(passed) == statistics["kept"] and len(everything) == statistics["pairs"]
    fell = sum(entry["fell"] for entry in statistics["filters"].values())
    assert statistics["kept"] + statistics["best"] + fell == statistics["pairs"]
    # the filters do something on these pairs, and not everything
    assert statistics["filters"]["image_image"]["fell"] > 5 and statistics["best"] > 5
    assert len({key.partition("-")[0] for key in passed}) == len(passed) > 20
    assert json.loads((folder / "statistics.json").read_text()) == statistics
    assert statistics["filters"]["instruction_image"]["quantiles"] == []
    low, middle, high = statistics["filters"]["image_caption"]["quantiles"]
    assert 0.2 < low < middle < high < 0.9
    read = records("image_triplets", folder)
    assert [r["text"] for r in read] == [passed[key].record["text"] for key in sorted(passed)]
    first = passed[min(passed)]
    assert read[0]["reference"] == first.reference and read[0]["target"] == first.target
    assert read[0]["target_caption"] == first.record["target_caption"]


def test_features_do_not_depend_on_the_other_pairs(pairs, clip):
    found = filtering.read_pairs(sorted(pairs[0].glob("*.tar"))[0])
    together = filters.similarities(filtering.features_of(found, clip))
    alone_ = filters.similarities(filtering.features_of(found[3:4], clip))
    for name, row in alone_.items():
        np.testing.assert_allclose(row[0], together[name][3], atol=2e-5)
    note = json.loads((pairs[0] / "settings.json").read_text())
    assert note["model"] == "shapes" and note["samples"] == 2


def test_a_killed_or_shared_filter_writes_the_same_files(pairs, kept, clip, tmp_path, monkeypatch):
    source, thresholds = pairs[0], filters.THRESHOLDS
    write, left = filtering.write_tar, [2]

    def dies(path, members):
        left[0] -= 1
        if not left[0]:
            raise Killed
        write(path, members)

    with monkeypatch.context() as patch:
        patch.setattr(filtering, "write_tar", dies)
        with pytest.raises(Killed):
            filtering.filter_pairs(source, tmp_path / "a", clip, thresholds, best=1)
    assert not (tmp_path / "a" / "statistics.json").exists()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(filtering, "write_tar", lambda path, m: [seen.append(path), write(path, m)])
        again = filtering.filter_pairs(source, tmp_path / "a", clip, thresholds, best=1)
    assert again == kept[1] and contents(tmp_path / "a") == contents(kept[0])
    assert len(seen) == len(list(source.glob("*.tar"))) - 1
    for i in (1, 0):
        last = filtering.filter_pairs(
            source, tmp_path / "b", clip, thresholds, best=1, shard=Shard(i, 2)
        )
        assert (last is None) == (i == 1)
    assert contents(tmp_path / "b") == contents(kept[0])


def test_the_sheet_shows_what_passed_and_what_fell(pairs, kept):
    folder, _ = kept
    picture = Image.open(folder / "sheet.png")
    examples = filtering._examples(sorted(pairs[0].glob("*.tar")), folder)
    rows = [verdict for verdict in sheet.TITLES for _ in examples[verdict]]
    assert rows[:3] == ["", "", ""] and rows.count("image_image") == rows.count("best") == 3
    assert picture.height == sheet._HEADER + sheet._ROW * len(rows) + 8
    for i, verdict in enumerate(rows):
        at = (sheet.MARGIN - 2, sheet._HEADER + i * sheet._ROW + sheet.TILE // 2)
        assert picture.getpixel(at) == (sheet.MISSED if verdict else sheet.HIT)
    lowest = examples["image_image"][0].similarities["image_image"]
    assert lowest < 0.7 <= examples[""][0].similarities["image_image"]


def test_bad_input_to_the_filters(pairs, kept, clip, tmp_path):
    thresholds = filters.read_thresholds(["directional=0.5"])
    folder = tmp_path / "kept"
    shutil.copytree(kept[0], folder)
    with pytest.raises(DataError, match=r"of other pairs or settings \(thresholds .*, now "):
        filtering.filter_pairs(pairs[0], folder, clip, thresholds, best=1)
    with pytest.raises(DataError, match=r"no pairs-\*.tar and settings.json in it. `--step="):
        filtering.filter_pairs(tmp_path, folder, clip, thresholds)
    image = filtering.read_pairs(sorted(pairs[0].glob("*.tar"))[0])[0].reference
    broken = write_tar(tmp_path / "pairs-000000.tar", [("0.reference.png", image)])
    with pytest.raises(DataError, match="key 0: it has no image target. Delete the file, and draw"):
        filtering.read_pairs(broken)
    members = [("0.reference.png", image), ("0.target.png", image[:-40]), ("0.json", b"{}")]
    write_tar(tmp_path / "pairs-000000.tar", members)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(DataError, match="pairs-000000.tar: .* Delete the file, and draw it again"):
        filtering.filter_pairs(tmp_path, tmp_path / "new", clip, filters.THRESHOLDS)
    broken.write_bytes(b"no tar")
    with pytest.raises(DataError, match="no readable, uncompressed tar file"):
        filtering.read_pairs(broken)
    with pytest.raises(WeightsError):
        filtering.Clip(str(tmp_path / "nothing"))


def test_other_peoples_image_triplets_need_no_columns(tmp_path, pairs):
    """InstructPix2Pix's pairs, a sample of them, and MagicBrush, as their dataset cards say."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pair = filtering.read_pairs(sorted(pairs[0].glob("*.tar"))[0])[0]
    before, after = ({"bytes": x, "path": None} for x in (pair.reference, pair.target))
    for i, row in enumerate(
        (
            {"original_prompt": "a", "original_image": before, "edit_prompt": "t",
             "edited_prompt": "b", "edited_image": after},
            {"input_image": before, "edit_prompt": "t", "edited_image": after},
            {"img_id": "1", "turn_index": 1, "source_img": before, "mask_img": before,
             "instruction": "t", "target_img": after},
        )
    ):  # fmt: skip
        folder = tmp_path / str(i)
        folder.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist([row, row]), folder / "a.parquet")
        read = records("image_triplets", folder)[0]
        assert (read["reference"], read["target"]) == (pair.reference, pair.target)
        captions_of = (read["reference_caption"], read["target_caption"])
        assert read["text"] == "t" and captions_of == (("a", "b") if i == 0 else ("", ""))


@pytest.mark.slow
def test_from_captions_to_a_trained_method(tmp_path):
    """The commands, as data/synthtriplets/README.md has them."""
    lines = [caps[0] for _, caps in captioned.scenes("captions", "train", 400)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    speech = "data/shapes/parts_of_speech.json"
    triplets, pairs, kept = (str(tmp_path / name) for name in ("texts", "pairs", "kept"))
    said = []
    for binary, *flags in (
        ("triplets", f"--captions={tmp_path}/captions.txt", f"--output={triplets}/t.jsonl",
         f"--keywords={speech}", "--parts=NOUN,ADJ", f"--embedder={CLIP}", "--min_count=5",
         "--similarity=0.5,0.9", "--templates=compodiff"),
        ("synthtriplets", "--step=draw", f"--source={triplets}", f"--output={pairs}",
         "--model=shapes", "--shard=1/2"),
        ("synthtriplets", "--step=draw", f"--source={triplets}", f"--output={pairs}",
         "--model=shapes", "--shard=0/2"),
        ("synthtriplets", "--step=filter", f"--source={pairs}", f"--output={kept}",
         f"--backbone={CLIP}", "--thresholds=image_image=0.6"),
        ("prepare", "--dataset=image_triplets", f"--source={kept}", "--name=synth"),
    ):  # fmt: skip
        status, output = run(binary, *flags, scratch=tmp_path)
        assert status == 0, output
        said.append(output)
    assert "pairs" in said[1] and " unreadable" in said[1]
    assert "pairs kept; fell:" in said[3]
    status, output = run(
        "main",
        "--config=experiments/combiner.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.stage.fuse.data.dataset=synth",
        "--config.stage.fuse.data.tables={'triplets': 1.0}",
        "--config.stage.fuse.batch_size=8",
        "--config.stage.fuse.duration=2 steps",
        "--config.log_every=1",
        "--config.evaluation.benchmarks=()",
        scratch=tmp_path,
    )
    assert status == 0, output
    losses = [row["loss"] for row in logs.read(tmp_path / "run" / "fuse" / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
