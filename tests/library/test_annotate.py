"""A benchmark of one's own photos: what annotators see, what is kept of it, what it becomes."""

import json
import sqlite3
import subprocess
import sys
import time

import jax
import pytest

from cir_jax import composers
from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import benchmarks
from cir_jax.library import Library
from cir_jax.library.annotate import candidates, export, quality
from cir_jax.library.annotate.candidates import Album
from cir_jax.library.annotate.records import Candidate, Records
from cir_jax.library.annotate.tasks import Tasks
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from data import build
from tests.library.folders import fill

PHOTOS = 14


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def searchers(tiny, mesh):
    made = {name: composers.build(name, tiny[0]) for name in ("slerp", "pic2word")}
    params = {"slerp": {}, "pic2word": jax.jit(made["pic2word"].init)(jax.random.key(0))}
    frozen = {"backbone": tiny[1]}
    return {
        name: Searcher(one, params[name], frozen, mesh=mesh, batch_size=4)
        for name, one in made.items()
    }


@pytest.fixture
def libraries(searchers, tmp_path):
    folder = fill(tmp_path / "photos", PHOTOS)
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    first = Library(folder, searchers["slerp"], store=tmp_path / "s.sqlite")
    both = {"slerp": first, "pic2word": Library(folder, searchers["pic2word"], beside=first)}
    first.update()
    yield both
    first.close()


@pytest.fixture
def album(libraries):
    return Album(libraries["slerp"])


@pytest.fixture
def records(tmp_path):
    made = Records(tmp_path / "my_circo")
    yield made
    made.close()


def made(records, album, libraries, annotator="ann", right=2):
    """A query from its reference to its right answers; the numbers of these."""
    reference = candidates.next_reference(album, annotator, records.seen(annotator))
    target = candidates.targets(album, reference)[0]
    query = records.pair(annotator, reference, target)
    records.word(query, "a scene", "has a red star")
    pool = candidates.pool(album, libraries, records.query(query))
    records.keep_pool(query, pool)
    others = [one.photo for one in pool if one.photo != target][:right]
    for photo in [target, *others]:
        records.judge(query, annotator, photo, True)
    records.finish(query, annotator, ["addition"])
    return query, {target, *others}


def test_an_album_is_contents_wherever_they_lie(album, libraries):
    assert len(album) == PHOTOS  # a copy is no other photo
    contents = {album.path(content): content for content in album.contents()}
    assert libraries["slerp"].folder / "00.png" in contents
    old = libraries["slerp"].folder / "2024" / "01.png"
    content = contents[old]
    old.rename(old.with_name("renamed.png"))
    libraries["slerp"].update()
    album.refresh()
    assert album.path(content).name == "renamed.png"
    album.path(content).unlink()
    libraries["slerp"].update()
    album.refresh()
    with pytest.raises(DataError, match="is not in .*photos any more. Put it back"):
        album.path(content)


def test_references_come_once_in_an_order_of_each_annotators_own(album, records):
    def order(annotator):
        seen = set()
        while (one := candidates.next_reference(album, annotator, seen)) is not None:
            seen.add(one)
            yield one

    ann, bob = list(order("ann")), list(order("bob"))
    assert ann == list(order("ann")) and ann != bob and sorted(ann) == sorted(bob)
    records.skip("ann", ann[0])
    records.pair("bob", ann[1], ann[2])
    assert candidates.next_reference(album, "ann", records.seen("ann")) == ann[2]
    assert candidates.next_reference(album, "bob", records.seen("bob")) == next(
        one for one in bob if one != ann[1]
    )


def test_targets_look_like_the_reference_but_are_not_the_same_picture(album, monkeypatch):
    reference = album.contents()[0]
    library = album.library
    found = library.search(image=album.path(reference), k=PHOTOS)
    alike = {content: score for path, score in found for content in album.named([path])}
    assert len(alike) == PHOTOS - 1
    monkeypatch.setattr(candidates, "MOST_ALIKE", sorted(alike.values())[-3])
    monkeypatch.setattr(candidates, "TARGETS", 5)
    best = sorted(alike, key=alike.get, reverse=True)
    assert candidates.targets(album, reference) == best[2:7]
    monkeypatch.setattr(candidates, "TARGETS", 1)  # the first two that are looked at are too alike
    assert candidates.targets(album, reference) == best[2:3]


def test_a_pool_is_of_all_methods_and_the_target_and_says_not_of_which(
    album, libraries, records, monkeypatch
):
    monkeypatch.setattr(candidates, "BY_METHOD", 4)
    monkeypatch.setattr(candidates, "BY_TARGET", 3)
    reference, target = album.contents()[:2]
    query = records.pair("ann", reference, target)
    records.word(query, " a  scene ", "has a red star")
    query = records.query(query)
    assert query.concept == "a scene"
    pool = candidates.pool(album, libraries, query)
    assert pool == candidates.pool(album, libraries, query)  # the same for all annotators
    of = {one.photo: set(one.sources) for one in pool}
    assert reference not in of and candidates.TARGET in of[target]
    for name, library in libraries.items():
        asked = {"image": album.path(reference), "text": query.caption, "concept": "a scene"}
        expected = set(album.named(path for path, _ in library.search(**asked, k=4)))
        assert {photo for photo, sources in of.items() if name in sources} == expected
    ranked = [sorted(of).index(one.photo) for one in pool]
    assert ranked != sorted(ranked)


def test_the_shared_concept_stands_in_the_prompt(libraries, monkeypatch):
    """Behind "a photo of", before the word of the image; else before the text."""
    said = []
    for library in libraries.values():
        tokenizer = library.composer.backbone.tokenizer
        monkeypatch.setattr(type(tokenizer), "__call__", recording(type(tokenizer).__call__, said))
        library.search(libraries["slerp"].folder / "00.png", "has a red star", concept="a scene")
        monkeypatch.undo()
    assert said == ["a scene that has a red star", "a photo of a scene * , has a red star"]
    with pytest.raises(ConfigError, match="concept='a scene': what an image shares with a text"):
        library.search(text="has a red star", concept="a scene")


def recording(call, said):
    def recorded(self, texts, *args):
        said.extend(texts)
        return call(self, texts, *args)

    return recorded


def test_what_was_said_outlives_the_process(records, album, libraries):
    query, right = made(records, album, libraries)
    again = Records(records.path.parent)
    assert again.query(query) == records.query(query)
    assert {x for x, fits in again.judgements(query)["ann"].items() if fits} == right
    assert again.finished(query) == {"ann": ("addition",)}
    again.judge(query, "ann", next(iter(right)), False)  # changed one's mind, elsewhere
    assert sum(records.judgements(query)["ann"].values()) == len(right) - 1
    again.drop(query)
    assert not records.queries() and not records.pool(query) and not records.judgements(query)
    again.close()


KILLED = """
import sys
from pathlib import Path
from cir_jax.library.annotate.records import Candidate, Records
records = Records(Path(sys.argv[1]))
for i in range(1000):
    query = records.pair("ann", b"r%d" % i, b"t%d" % i)
    records.word(query, "a", "b")
    records.keep_pool(query, [Candidate(b"t%d" % i, ("slerp",)), Candidate(b"o", ("slerp",))])
    records.judge(query, "ann", b"t%d" % i, True)
    records.finish(query, "ann", [])
    print(query, flush=True)
"""


def test_kill_9_between_clicks_loses_no_action(tmp_path):
    done = 0
    for wait in (0.0, 0.02, 0.05):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(wait)
            process.kill()
            said = [int(line) for line in process.stdout.read().splitlines()]
        records = Records(tmp_path)
        queries = records.queries()
        assert not said or said[-1] <= queries[-1].id
        for query in queries[done:-1]:  # all but the one that it was at
            assert query.worded and len(records.pool(query.id)) == 2
            assert records.finished(query.id) == {"ann": ()}
        done = len(queries)
        records.close()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r, q: r.pair("ann", b"x", b"x"), "the target is the reference itself"),
        (lambda r, q: r.word(q, "a dog", "  "), "both the shared concept and the relative caption"),
        (lambda r, q: r.judge(q, "ann", b"x", True), "none of its candidates"),
        (lambda r, q: r.finish(q, "ann", []), "nobody has looked through its candidates"),
        (lambda r, q: r.finish(q, "ann", ["colour"]), "aspect 'colour': expected one of cardinal"),
        (lambda r, q: r.query(q + 1), "there is none; it may have been dropped"),
    ],
)
def test_what_cannot_be_said(records, act, message):
    query = records.pair("ann", b"a", b"b")
    with pytest.raises(DataError, match=message):
        act(records, query)


def test_words_are_not_changed_below_the_answers(records):
    query = records.pair("ann", b"a", b"b")
    records.word(query, "a dog", "is wet")
    records.keep_pool(query, [Candidate(b"b", ("slerp",))])
    records.word(query, "a dog", "is dry")
    assert records.pool(query) == []  # found for other words
    records.keep_pool(query, [Candidate(b"b", ("slerp",))])
    records.judge(query, "ann", b"b", True)
    with pytest.raises(DataError, match="its right answers were chosen for the words that it has"):
        records.word(query, "a dog", "is wet")


def test_a_damaged_file_is_not_gone_on_with(tmp_path):
    records = Records(tmp_path)
    for i in range(300):
        records.word(records.pair("ann", bytes([i % 256, i // 256]), b"t"), f"thing {i}", "is red")
    records.close()
    file = tmp_path / "annotations.sqlite"
    whole = file.read_bytes()
    page = len(whole) // 4096 // 2 * 4096  # one in the middle
    damaged = whole[:page] + bytes(4096) + whole[page + 4096 :]
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=r"annotations.sqlite: it is damaged .*Take a backup"):
        Records(tmp_path)
    assert file.read_bytes() == damaged
    file.write_bytes(whole)
    again = Records(tmp_path)
    assert len(again.queries()) == 300
    again.close()


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "annotations.sqlite"
    other = sqlite3.connect(file)
    other.execute("CREATE TABLE x (y)")
    other.close()
    before = file.read_bytes()
    with pytest.raises(DataError, match="no annotations of this version"):
        Records(tmp_path)
    assert file.read_bytes() == before  # it is not ours to change
    (tmp_path / "annotations.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(DataError, match=r"annotations.sqlite: it is damaged \(file is not a datab"):
        Records(tmp_path)
    with pytest.raises(DataError, match="cannot be made .* Give another --out"):
        Records(tmp_path / "annotations.sqlite" / "below")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("has two of them and is shot from above", ""),
        ("Unlike the provided image, I want a photo of a dog that is wet", "prefix stands before"),
        ("is wet", "2 words say little"),
        ("shows a wet dog in the snow", "“dog” is in the shared concept"),
        ("shows two dogs in the snow", "“dogs” is in the shared concept"),
        ("is darker than the reference image", "speaks of the image"),
        ("is shot at night in rain.", "No full stop"),
    ],
)
def test_remarks_on_captions(caption, expected):
    said = quality.remarks("a dog on the grass", caption)
    assert (said == []) if not expected else any(expected in one for one in said)


def test_a_caption_that_needs_no_image_is_told(album, libraries, records):
    reference, target = album.contents()[:2]
    found = album.named(p for p, _ in album.library.search(text="a red star", k=3))
    other = next(c for c in album.contents() if c not in found)
    query = records.pair("ann", other, found[0])
    records.word(query, "a scene", "a red star")
    assert candidates.text_rank(album, records.query(query)) == 1
    assert "not needed" in quality.remarks("a scene", "a red star there", text_rank=1)[0]
    assert quality.remarks("a scene", "a red star there", text_rank=2) == []


def test_the_estimate_is_the_papers():
    """Of 4,624 ground truths 4,097 were found by a method with R@100 82.15: 92.7 % of all."""
    found = quality.estimate(4624, 4097, 0.8215)
    assert round(found.total) == 4987 and round(100 * found.found, 1) == 92.7
    assert quality.estimate(10, 10, 1.0) == (10.0, 1.0)
    assert quality.estimate(10, 2, 1.0) == (10.0, 1.0)  # not fewer than there are
    with pytest.raises(DataError, match="recall=0: methods must find some"):
        quality.estimate(4, 2, 0)
    with pytest.raises(DataError, match="5 of 4 right answers"):
        quality.estimate(4, 5, 1.0)


def test_agreement_is_cohens_kappa():
    """Cohen 1960: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no; kappa 0.4."""
    answers = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False,) * 2] * 15
    one, other = ({bytes([i]): x[side] for i, x in enumerate(answers)} for side in (0, 1))
    assert quality.kappa([one, other]) == pytest.approx(0.4)
    assert quality.kappa([one]) is None and quality.kappa([one, {b"else": True}]) is None
    assert quality.kappa([one, one, one]) == 1
    assert quality.kappa([{b"a": True}, {b"a": True}]) is None  # nothing to agree on


def test_an_export_is_a_benchmark(records, album, libraries, tmp_path):
    """Built and loaded as CIRCO is; the judgements of two are counted."""
    with pytest.raises(DataError, match="no query is finished yet"):
        export.export(records, album, records.path.parent)
    (first, right), (second, _) = (made(records, album, libraries) for _ in range(2))
    contested = sorted(right - {records.query(first).target})[0]
    records.finish(first, "bob", ["negation"])  # who has found nothing right
    records.judge(first, "bob", records.query(first).target, True)
    out = records.path.parent
    done = export.export(records, album, out)
    assert (done.queries, done.photos) == (2, PHOTOS)
    assert done.estimate.found == 1  # the methods find every photo of so few
    assert done.kappa is not None and done.kappa < 1
    entries = json.loads((out / "annotations" / "val.json").read_text())
    number = {content: i for i, content in enumerate(album.contents())}
    assert entries[0]["gt_img_ids"] == [number[records.query(first).target]]
    assert number[contested] not in entries[0]["gt_img_ids"]  # one of two is no majority
    assert entries[0]["semantic_aspects"] == ["addition", "negation"]
    assert (
        len(entries[1]["gt_img_ids"]) == 3
        and entries[1]["target_img_id"] in entries[1]["gt_img_ids"]
    )
    assert sum(len(entry["gt_img_ids"]) for entry in entries) == done.answers
    data = tmp_path / "data"
    build.prepare("annotated", None, data, source=out)
    benchmark = benchmarks.load("annotated", data_dir=data)
    assert (
        len(benchmark.queries) == 2 and len(benchmark.gallery) == PHOTOS and not benchmark.partial
    )
    assert benchmark.queries[0].concept == "a scene"
    again = export.export(records, album, out)  # over the old one
    assert again == done
    (out / "COCO2017_unlabeled" / "unlabeled2017").unlink()
    (out / "COCO2017_unlabeled" / "unlabeled2017").mkdir()
    with pytest.raises(DataError, match="is in the way of a link"):
        export.export(records, album, out)


def test_what_is_begun_comes_first_and_what_others_have_finished(records, libraries):
    tasks = Tasks(libraries, records)
    first = tasks.next("ann")
    shown = (first["reference"], first["candidates"][0])
    query = tasks.pair("ann", *(int(photo["id"][1:]) for photo in shown))
    assert tasks.next("ann")["view"] == "words"
    tasks.word(query, "a scene", "has a red star")
    assert tasks.next("ann")["view"] == "answers"
    assert tasks.next("bob", review=True)["view"] == "done"  # nobody has looked through it yet
    tasks.finish(query, "ann", [])
    assert tasks.next("bob", review=True)["query"] == query
    assert tasks.next("bob")["view"] == tasks.next("ann")["view"] == "pair"
    tasks.drop(query)
    assert tasks.next("bob", review=True)["view"] == "done"


def test_an_export_without_what_methods_found_has_no_estimate(records):
    query = records.pair("ann", b"a", b"b")
    records.word(query, "a dog", "is wet")
    records.keep_pool(query, [Candidate(b"b", (candidates.TARGET,))])
    records.finish(query, "ann", [])
    assert export.missed(records, export.finished(records)) is None
