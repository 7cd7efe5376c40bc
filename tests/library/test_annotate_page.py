"""The page of `cir annotate` in a browser: five queries in three views, broken off in between."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import composers
from cir_jax.evaluation import benchmarks
from cir_jax.library.annotate import command
from cir_jax.library.annotate.records import Records
from cir_jax.library.annotate.tasks import Tasks
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from data import build
from tests.browser import Browser
from tests.library import serving

serving.installed()

PHOTOS, QUERIES = 12, 5
STEP = "document.getElementById('step').textContent"
SHOWN = "document.querySelector('section:not([hidden])')?.id"
PRESSED = "[...document.querySelectorAll('#answers [aria-pressed=true]')].map(b => b.dataset.id)"


@pytest.fixture(scope="module")
def libraries(tiny, tmp_path_factory):
    from cir_jax.library.serve import command

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(PHOTOS):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)).save(buffer, "PNG")
        (folder / f"{i:02}.png").write_bytes(buffer.getvalue())
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    searchers = {
        name: Searcher(
            composers.build(name, tiny[0]), {}, {"backbone": tiny[1]}, mesh=mesh, batch_size=4
        )
        for name in ("slerp", "image_text")
    }
    made = command.beside(folder, searchers, tmp_path_factory.mktemp("store") / "s.sqlite")
    with made["slerp"] as library:
        library.update()
        yield made


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("my_circo")


@pytest.fixture
def serve(libraries, out):
    """Starts a server anew, as after a kill: all it knows is in the file."""
    started = []

    def start():
        records = Records(out)
        started.append(records)
        tasks = Tasks(libraries, records, "ann")
        return serving.running(command.server(tasks, "127.0.0.1", ""))

    yield start
    for records in started:
        records.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.resize(1100, 900)
    yield browser
    browser.close()


def opened(tab, client, annotator=""):
    tab.open("about:blank")
    tab.open(f"{client.address}/#{annotator}")
    tab.until(SHOWN)


def pair(tab):
    """Chooses the second photo of the first view by the keyboard."""
    tab.until(f"{SHOWN} === 'pair' && document.activeElement.closest('.photos')")
    tab.press("ArrowRight", "Enter")
    tab.until(f"{SHOWN} === 'words' && document.activeElement.id === 'concept'")


def word(tab, number):
    tab.press(*"a scene", "Tab", *f"has {number} more red stars", "Enter")
    tab.until(f"{SHOWN} === 'answers'")


def answer(tab):
    """One more than the target; the photos that are chosen now."""
    tab.until("document.activeElement.closest('.photos')")
    before = len(tab.run(PRESSED))
    tab.run("document.querySelector('#answers [aria-pressed=false]').focus()")
    tab.press("Enter")
    tab.until(f"{PRESSED}.length === {before + 1}")
    return tab.run(PRESSED)


def test_five_queries_in_three_views_through_kills(tab, serve, libraries, out, tmp_path):
    with serve() as client:
        opened(tab, client)
        assert "12 photos" in tab.run("document.getElementById('library').textContent")
        assert tab.run("document.getElementById('annotator').value") == "ann"
        first = tab.run("document.querySelector('#pair_reference img').alt")
        tab.press("s")  # no photo suits
        tab.until(f"document.querySelector('#pair_reference img').alt !== {first!r}")
        pair(tab)
        reference = tab.run("document.querySelector('#words_reference img').alt")
        assert tab.complaints(f"{client.address}/") == []
    with serve() as client:  # killed between two clicks: the pair is there
        opened(tab, client)
        assert tab.run(SHOWN) == "words" and tab.run(STEP).startswith("2 of 3: the words")
        assert tab.run("document.querySelector('#words_reference img').alt") == reference
        tab.run("document.getElementById('concept').focus()")
        word(tab, 1)
        chosen = answer(tab)
    with serve() as client:  # and so is each choice
        opened(tab, client)
        assert tab.run(SHOWN) == "answers" and tab.run(PRESSED) == chosen
        again = sorted(tab.run("[...document.querySelectorAll('#answers img')].map(i => i.alt)"))
        assert reference not in again[2:]  # among the candidates; the first two are the query
        tab.click("#aspects input[value=cardinality]")
        tab.run("document.activeElement.blur()")
        tab.press("f")
        for number in range(2, QUERIES + 1):
            pair(tab)
            word(tab, number)
            answer(tab)
            tab.press("f")
            tab.until(f"{STEP}.includes('{number} finished')")
        tab.click("#export")
        tab.until("document.getElementById('measured').textContent.includes('written to')")
        said = tab.run("document.getElementById('measured').textContent")
        assert said.startswith("5 queries, 10 right answers, an estimated 100.0 %")
        assert tab.complaints(f"{client.address}/") == []
    entries = json.loads((out / "annotations" / "val.json").read_text())
    assert entries[0]["semantic_aspects"] == ["cardinality"]
    assert [entry["relative_caption"] for entry in entries][4] == "has 5 more red stars"
    build.prepare("annotated", None, tmp_path / "data", source=out)
    assert len(benchmarks.load("annotated", data_dir=tmp_path / "data").queries) == QUERIES


def test_another_annotator_looks_through_the_same_queries(tab, serve, out):
    with serve() as client:
        opened(tab, client, "bob")
        tab.until(f"{SHOWN} === 'pair'")
        tab.click("#review")
        tab.until(f"{SHOWN} === 'answers'")
        assert len(tab.run(PRESSED)) == 1  # the target alone: what others said is not shown
        target = "#answers [aria-pressed=true]"
        tab.click(target)
        tab.until("document.getElementById('said').className === 'error'")
        said = tab.run("document.getElementById('said').textContent")
        assert said == "the target is a right answer: the words were written for it."
        for left in reversed(range(QUERIES)):
            tab.click("#finish")
            tab.until(f"{SHOWN} === 'done'" if not left else f"{SHOWN} === 'answers'")
            tab.until("!document.body.classList.contains('busy')")
        tab.click("#measure")
        tab.until("document.getElementById('measured').textContent.includes('kappa')")
    records = Records(out)
    assert all(set(records.finished(q.id)) == {"ann", "bob"} for q in records.queries())
    records.close()


def test_remarks_come_while_one_writes(tab, serve):
    with serve() as client:
        opened(tab, client, "carol")
        pair(tab)
        tab.press(*"a red dog", "Tab", *"is a dog.", "Tab")
        tab.until("document.querySelectorAll('#remarks li').length >= 2")
        said = tab.run("document.getElementById('remarks').textContent")
        assert "“dog” is in the shared concept" in said and "No full stop" in said
        tab.click("#undo")
        tab.until(f"{SHOWN} === 'pair'")


def test_what_is_no_action_is_refused(serve):
    with serve() as client:
        for path, sent, said in (
            ("pair", {"annotator": "x", "reference": "../a", "target": "p1"}, "the id of a photo"),
            ("pair", {"annotator": "x", "reference": "p1", "target": "p1"}, "the reference itself"),
            ("pair", {"annotator": " ", "reference": "p1", "target": "p2"}, "a name of 1 to 80"),
            ("pair", {"annotator": "x", "reference": "p1", "target": "p9999"}, "there is none"),
            ("word", {"query": 99, "concept": "a", "caption": "b"}, "query 99: there is none"),
            ("word", {"query": 1.5, "concept": "a", "caption": "b"}, "expected a whole number"),
            ("finish", {"query": 1, "annotator": "x", "aspects": [1]}, "a list of texts"),
        ):
            status, _, answer = client.post(f"/api/{path}", sent)
            assert status == 400 and said in answer["error"], (path, answer)
        assert client.ask("POST", "/api/next", {"annotator": "x"})[0] == 403  # not from the page
        assert client.get("/api/next")[0] == 405
        assert client.get("/pictures/p1/huge")[0] == 404


def test_the_command_exports_without_a_browser(libraries, out, tmp_path, monkeypatch, capsys):
    """What five queries came to; and what there is to do where none is finished."""
    from cir_jax import loading
    from cir_jax.library import cli

    searchers = {name: library.searcher for name, library in libraries.items()}
    monkeypatch.setattr(loading, "load", lambda method, **_: searchers[method])
    monkeypatch.setenv("CIR_JAX_LIBRARY", str(tmp_path / "stores"))
    folder = libraries["slerp"].folder
    (out / "annotations" / "val.json").unlink()
    command = ["annotate", str(folder), "--demo", "--export", "--out"]
    assert cli.main([*command, str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("queries: 5, right answers: ") and "agreement (kappa)" in said
    assert len(json.loads((out / "annotations" / "val.json").read_text())) == QUERIES
    assert cli.main([*command, str(tmp_path / "new")]) == 2
    assert "no query is finished yet: its third step" in capsys.readouterr().err
