"""The page holds all that it shows; and, where there is a browser, it shows it."""

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.evaluation import evaluate, page, protocols, published, report
from cir_jax.evaluation.metrics import Estimate
from cir_jax.evaluation.page import pictures, tables
from tests.browser import Browser
from tests.evaluation import worlds

METHODS = ["image_only", "text_only", "image_text", "searle"]
HOSTILE = "</script><b onclick='x'>red</b> & <!-- more"


def evaluated(tiny, benchmark, method="searle"):
    backbone, params = tiny
    return evaluate.evaluate_with_baselines(
        worlds.ColourOracle(backbone), {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1),
        method=method,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sections(tiny):
    """CIRCO of 60 queries, one with a text that would end the script, and CIRR with image sets."""
    first, *rest = worlds.queries(protocols.CIRCO, count=60)
    circo = worlds.benchmark(queries=(dataclasses.replace(first, texts=(HOSTILE,)), *rest))
    circo = dataclasses.replace(circo, name="circo")
    cirr = worlds.benchmark(protocols.CIRR)
    return [(one, evaluated(tiny, one)) for one in (circo, cirr)]


@pytest.fixture(scope="module")
def text(sections):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.Pictures, "GROUP", 16)
        return page.page("a <title>", sections)


def content(text):
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text)
    return json.loads(found)


def picture_lines(text):
    groups = re.findall(r'<script type="text/plain" id="pictures-\d+">(.*?)</script>', text, re.S)
    return [line for group in groups for line in group.split("\n")]


def ranks(result):
    return [[int(r) + 1 for r in row if r >= 0] for row in result.outcome.target_ranks]


def test_all_queries_are_there_with_ranks_and_scores_of_all_methods(sections, text):
    shown = content(text)["sections"]
    lines = picture_lines(text)
    assert len(shown) == 2 and [len(one["queries"]) for one in shown] == [60, 14]
    for (benchmark, results), one in zip(sections, shown, strict=True):
        assert one["methods"] == METHODS and one["labelled"]
        names = [name for _, name in one["images"]]
        for i, (query, record) in enumerate(zip(benchmark.queries, one["queries"], strict=True)):
            assert record["id"] == query.id and record["text"] == query.texts[0]
            assert record["category"] == query.category
            assert tuple(record["aspects"]) == query.aspects
            assert names[record["reference"]] == str(query.reference)
            assert len(record["targets"]) == len(query.targets)
            for result, found in zip(results, record["found"], strict=True):
                assert found["ranks"] == ranks(result)[i]
                assert [names[image] for image in found["top"]] == [
                    str(image) for image in result.top[i][:5]
                ]
                np.testing.assert_allclose(found["scores"], result.scores[i][:5], rtol=1e-3)
                subset = result.outcome.subset_ranks[i]
                assert found["subset"] == (None if subset < 0 else subset + 1)
                # what is missed is pictured, from the best rank on
                missed = [
                    (rank, named, target)
                    for rank, named, target in zip(
                        found["ranks"], record["targets"], query.targets, strict=True
                    )
                    if target not in result.top[i][:5]
                ]
                for _, named, target in sorted(missed)[: page.MISSED]:
                    assert names[named] == str(target)
        for number, name in one["images"]:
            line = lines[number]
            line = lines[int(line[1:])] if line[0] == "=" else line
            image = Image.open(io.BytesIO(base64.b64decode(line)))
            assert image.format == "WEBP" and image.size == (16, 16)
            assert np.asarray(image.convert("RGB")).mean(axis=(0, 1)).argmax() == int(name) % 3
    # both galleries are one: each picture is stored once
    assert sum(line[0] != "=" for line in lines) <= 45


class Strict(HTMLParser):
    """Elements that are closed as they were opened, ids that are given once."""

    VOID = {"meta", "br", "input", "img", "link"}

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.named, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *one) for one in attributes]
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice: {tag} {attributes}"
        if "id" in found:
            self.ids.append(found["id"])
        self.named += [found[x] for x in ("aria-labelledby", "for") if x in found]
        if tag == "img":
            assert "alt" in found
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_the_html_is_sound_and_refers_to_nothing_outside(text):
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.stack == [] and len(set(parser.ids)) == len(parser.ids)
    assert set(parser.named) <= set(parser.ids)
    assert not [a for a in parser.attributes if a[1] in ("src", "href", "srcset", "onclick")]
    rest = re.sub(r'(id="pictures-\d+">).*?<', r"\1<", text, flags=re.S)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|@@", rest)
    assert text.startswith("<!doctype html>") and text.count("<h1>a &lt;title&gt;</h1>") == 1
    # what the program looks for is there
    used = set(re.findall(r'at\("([a-z]+)"\)', text))
    assert len(used) > 15 and used <= set(parser.ids)
    # ids of the first section's part, told by "benchmark-" and "pictures-"
    assert {"benchmark-0", "benchmark-1", "pictures-0", "pictures-3"} <= set(parser.ids)


def test_no_text_of_a_query_ends_the_script(text):
    assert "<b onclick" not in text and "\\u003c/script>" in text
    assert text.count("<script") == text.count("</script>")


def rows(text):
    """Cells of each row of the first table: text with the tags that are within."""
    text = text.partition("</table>")[0]
    return [
        [html.unescape(x) for x in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", text)
    ]


def renamed(results, **changes):
    return [dataclasses.replace(result, **changes) for result in results]


def test_the_table_has_the_best_in_bold_and_the_distance_to_the_paper(sections):
    _, results = sections[0]
    results = renamed(results, weights_id="openai/clip-vit-large-patch14@0")
    papers = report.published_rows(results)
    assert {row.split for row in papers} == {"val", "test"}
    found = rows(tables.section_tables(0, results, papers))
    header, body = found[0], {row[0]: row[1:] for row in found[1:]}
    assert header == ["method", *results[0].headline, "setting"] and list(body)[:4] == METHODS
    for column, name in enumerate(results[0].headline):
        values = [round(result.metrics[name].value, 2) for result in results]
        for result, value in zip(results, values, strict=True):
            cell = body[result.method][column]
            assert f"{value:.2f}" in cell and f"\xb1{result.metrics[name].se:.2f}" in cell
            assert ("<b>" in cell) == (value == max(values) and len(set(values)) > 1)
    assert body["searle"][-1] == f"<code>{results[-1].setting_id}</code>"
    val = body["searle (searle; clip_l14)"]
    test = body["searle (compodiff, published weights; clip_l14; paper, test)"]
    printed = [11.02, 12.12, 13.62, 14.43]
    for column, value in enumerate(printed):
        distance = results[-1].metrics[results[0].headline[column]].value - value
        sign = "+" if distance >= 0 else "\u2212"
        assert val[column] == f"{value:.2f} <small>({sign}{abs(distance):.2f})</small>"
    assert val[4] == "-" and not [cell for cell in test if "small" in cell]
    (gap,) = report.gap_lines(report.composition_gaps(results))
    assert gap.startswith("composition gap") and gap in tables.section_tables(0, results, papers)
    # weights that are none of the papers': their rows, but no distance
    other = renamed(results, weights_id="mine@0")
    shown = tables.section_tables(0, other, report.published_rows(other))
    assert "published" in shown and "ours minus theirs" not in shown and "<small>(" not in shown


def test_less_is_better_for_ranks_and_what_is_equal_is_not_best(sections):
    _, results = sections[0]
    estimates = [Estimate(7.004, 1.0, 9), Estimate(7.001, 1.0, 9), Estimate(8.0, 1.0, 9)]
    metrics = [{"mean rank": one, "R@1": estimates[0]} for one in estimates]
    shown = [
        dataclasses.replace(r, metrics=m, headline=("mean rank", "R@1"))
        for r, m in zip(results, metrics, strict=False)
    ]
    bold = [["<b>" in cell for cell in row] for row in rows(tables.section_tables(0, shown, []))]
    assert bold[1:] == [[False, True, False, False]] * 2 + [[False] * 4]


def test_all_other_numbers_are_in_a_second_table(sections):
    _, results = sections[0]
    shown = tables.section_tables(0, results, [])
    others = [name for name in results[0].metrics if name not in results[0].headline]
    assert others and f"{len(others)} more numbers" in shown
    assert all(f">{html.escape(name)}</th>" in shown for name in others)
    row = published.Row("circo", "val", "a paper", "searle", "clip_l14", {"mAP@5": 1.0})
    assert (
        tables.section_tables(0, results, [row]).count("a paper") == 1
    )  # it has none of the others


def test_pictures_are_as_large_as_so_many_may_be(monkeypatch):
    made = pictures.Pictures()
    assert made.side == pictures.LARGEST
    records = worlds.gallery(3)
    for count, side in ((100, 320), (10_000, 204), (1_000_000, 96)):
        made._added = [(records, 0, "x")] * count
        assert made.side == side
    buffer = io.BytesIO()
    Image.new("RGBA", (400, 200), (255, 0, 0, 0)).save(buffer, "PNG")  # transparent: white
    data = base64.b64decode(pictures.picture([{"image": buffer.getvalue()}], 0, "x", 96))
    image = Image.open(io.BytesIO(data))
    assert image.size == (96, 48) and image.convert("RGB").getpixel((40, 20)) == (255, 255, 255)


def test_an_image_that_cannot_be_read_is_named(sections):
    benchmark, results = sections[0]
    shown = int(results[0].top[0][0])
    broken = [*benchmark.gallery]
    broken[shown] = {"image": b"none"}
    benchmark = dataclasses.replace(benchmark, gallery=broken)
    with pytest.raises(DataError, match=rf"circo, gallery record {shown}: not a readable image"):
        page.page("t", [(benchmark, results)])


@pytest.fixture(scope="module")
def hidden(sections):
    """A split without public labels."""
    benchmark, results = sections[0]
    queries = tuple(dataclasses.replace(q, targets=(), aspects=()) for q in benchmark.queries)
    benchmark = dataclasses.replace(benchmark, queries=queries)
    return benchmark, [dataclasses.replace(r, outcome=None, metrics={}) for r in results]


def test_queries_without_public_ground_truth_are_shown_too(hidden, tmp_path):
    path = tmp_path / "x" / "report.html"
    page.write_page(path, "t", [hidden])
    text = path.read_text(encoding="utf-8")
    (shown,) = content(text)["sections"]
    assert not shown["labelled"] and len(shown["queries"]) == 60
    assert all(not q["targets"] and not q["found"][0]["ranks"] for q in shown["queries"])
    assert "no public ground truth" in text and "<table>" not in text


def test_references_of_their_own_are_shown(tiny, sections):
    benchmark, results = sections[0]
    own = worlds.gallery(45, seed=5)
    benchmark = dataclasses.replace(benchmark, references=own)
    text = page.page("t", [(benchmark, results)])
    (shown,) = content(text)["sections"]
    number, name = shown["images"][shown["queries"][3]["reference"]]
    assert name == str(benchmark.queries[3].reference)
    line = pictures.picture(own, benchmark.queries[3].reference, "x", 320)
    assert picture_lines(text)[number] == line


# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.resize(1300, 900)
    browser.open(path)
    yield browser
    assert browser.complaints() == []


def ids(browser):
    return browser.run("[...document.querySelectorAll('.query')].map(e => +e.dataset.id)")


def all_ids(browser):
    """Those of all pages, from the first."""
    found = ids(browser)
    while not browser.run("document.querySelectorAll('.pager button')[1].disabled"):
        browser.click(".pager button:nth-child(2)")
        found += ids(browser)
    return found


def best(section, method):
    benchmark, results = section
    rank = results[METHODS.index(method)].best_rank + 1
    return {query.id: int(r) for query, r in zip(benchmark.queries, rank, strict=True)}


def test_pages_hold_all_queries_worst_first(opened, sections):
    rank = best(sections[0], "searle")
    found = all_ids(opened)
    assert found == sorted(rank, key=lambda i: (-rank[i], i)) and len(found) == 60
    assert opened.run("document.querySelector('.pager .note').textContent") == "51–60 of 60 queries"
    opened.choose("#sort", "best")
    assert ids(opened) == sorted(rank, key=lambda i: (rank[i], i))[:25]
    opened.choose("#words", "101")  # an id
    assert ids(opened) == [101]
    opened.choose("#words", "RED make")
    red = [q.id for q in sections[0][0].queries if "make it red" in q.texts[0]]
    assert sorted(all_ids(opened)) == red
    opened.choose("#words", "")
    opened.choose("#category", "odd")
    opened.choose("#aspect", "negation")
    both = [q.id for q in sections[0][0].queries if q.category == "odd" and "negation" in q.aspects]
    assert sorted(all_ids(opened)) == both and both
    opened.click("form button")  # reset
    assert ids(opened) == found[:25]


def test_right_and_wrong_of_two_methods_and_of_one_modality(opened, sections):
    ours, text, image = (best(sections[0], m) for m in ("searle", "text_only", "image_only"))
    opened.choose("#beside", "1")
    expected = {
        "won": {i for i in ours if ours[i] <= 5 < text[i]},
        "lost": {i for i in ours if text[i] <= 5 < ours[i]},
        "right": {i for i in ours if ours[i] <= 5},
        "wrong": {i for i in ours if ours[i] > 5},
    }
    for name, found in expected.items():
        opened.choose("#outcome", name)
        assert set(all_ids(opened)) == found, name
    assert all(expected.values()) and len(set(map(len, expected.values()))) > 2
    opened.choose("#outcome", "won")
    opened.choose("#right", "10")
    assert set(all_ids(opened)) == {i for i in ours if ours[i] <= 10 < text[i]}
    opened.choose("#outcome", "")
    opened.choose("#right", "25")
    for name, right in (("one", lambda i: min(text[i], image[i]) <= 25),
                        ("image", lambda i: image[i] <= 25), ("text", lambda i: text[i] <= 25),
                        ("neither", lambda i: min(text[i], image[i]) > 25)):  # fmt: skip
        opened.choose("#alone", name)
        found = set(all_ids(opened))
        assert found == {i for i in ours if right(i)} and found, name
    opened.choose("#alone", "")
    opened.choose("#sort", "ahead")
    order = sorted(ours, key=lambda i: (ours[i] - text[i], i))
    assert ids(opened) == order[:25]


def test_the_histogram_counts_best_ranks_and_chooses(opened, sections):
    rank, other = best(sections[0], "searle"), best(sections[0], "image_text")
    opened.choose("#beside", "2")
    edges = [0, 1, 5, 10, 50]
    counts = [np.histogram(list(r.values()), np.add(edges, 0.5))[0] for r in (rank, other)]
    bars = opened.run("[...document.querySelectorAll('#bars button')].map(e => e.ariaLabel)")
    names = ["1", "2–5", "6–10", "11–50"]
    assert bars == [
        f"rank {name}: {a} of searle, {b} of image_text"
        for name, a, b in zip(names, *counts, strict=True)
    ]
    opened.click("#bars button:nth-child(3)")
    assert set(all_ids(opened)) == {i for i in rank if 6 <= rank[i] <= 10} and counts[0][2]
    opened.click("#bars button:nth-child(3)")
    assert len(all_ids(opened)) == 60


def test_tiles_say_score_hit_and_rank_of_what_is_missed(opened, sections, text):
    benchmark, results = sections[0]
    lines, pictured = picture_lines(text), {}
    for number, name in content(text)["sections"][0]["images"]:
        pictured[name] = "data:image/webp;base64," + lines[number]
    opened.choose("#beside", "1")
    opened.choose("#sort", "id")
    shown = opened.run("""Promise.all([...document.images].map(e => e.src && e.decode())).then(() =>
        [...document.querySelectorAll('.query')].map(q => [...q.querySelectorAll('.run')].map(r =>
            [...r.querySelectorAll('.tile')].map(e => [e.className, e.textContent,
                e.title.split(' · ')[1], e.src]))))""")
    assert len(shown) == 25
    seen = set()
    for i, (query, lines) in enumerate(zip(benchmark.queries, shown, strict=False)):
        for result, tiles in zip((results[3], results[1]), lines, strict=True):
            assert all(source == pictured[name] for _, _, name, source in tiles)
            for place, (kind, said, name, _) in enumerate(tiles[:5]):
                image, score = int(result.top[i][place]), result.scores[i][place]
                hit = image in query.targets
                assert name == str(image)
                assert kind == f"tile {'hit' if hit else 'other'}"
                assert said.removeprefix("✓ " if hit else "") == f"{score:.3f}"
                seen.add(hit)
            left = sorted(
                (rank, str(target))
                for rank, target in zip(ranks(result)[i], query.targets, strict=True)
                if target not in result.top[i][:5]
            )[: page.MISSED]
            assert [(kind, said, name) for kind, said, name, _ in tiles[5:]] == [
                ("tile missed", f"rank {rank}", name) for rank, name in left
            ]
            seen |= {rank for rank, _ in left}
    assert {True, False} <= seen and len(seen) > 5
    assert opened.run("document.querySelector('.query p').textContent") == HOSTILE


def test_it_is_used_with_the_keyboard_and_images_are_enlarged(opened):
    focused = "document.activeElement.closest('.query')?.dataset.id"
    dialog = "document.getElementById('large').open"
    caption = "document.getElementById('caption').textContent"
    first = ids(opened)
    opened.press("j", "j", "j", "k")
    assert int(opened.run(focused)) == first[1]
    opened.press("Enter")
    assert opened.run(dialog) and "searle, place 1" in opened.run(caption)
    assert opened.run("document.getElementById('image').naturalWidth") == 16
    opened.press("ArrowRight")
    assert "place 2" in opened.run(caption)
    opened.press("ArrowLeft", "ArrowLeft")
    assert opened.run(caption).startswith("reference")
    opened.press("j")  # nothing moves behind it
    opened.press("Escape")
    assert not opened.run(dialog) and int(opened.run(focused)) == first[1]
    opened.press("n")
    assert ids(opened) != first and int(opened.run(focused)) == ids(opened)[0]
    opened.press("p", "/")
    assert ids(opened) == first and opened.run("document.activeElement.id") == "words"
    opened.press("r", "e", "d", "n")  # letters are letters there
    assert opened.run("document.getElementById('words').value") == "redn" and ids(opened) == []
    opened.press("Escape")
    assert opened.run("new Promise(done => setTimeout(done))") is None
    assert ids(opened) == first and opened.run("document.activeElement.id") == ""
    opened.click(".query .tile.hit, .query .tile.other")
    assert opened.run(dialog)
    opened.click("#close")
    assert not opened.run(dialog)


def test_benchmarks_are_switched_and_hidden_labels_leave_their_controls_out(
    opened, sections, hidden, tmp_path
):
    opened.click("#names button:nth-child(2)")
    assert len(ids(opened)) == 14 and "in its image set" in opened.run("document.body.innerText")
    # its pictures are those of the first
    tiles = "[...document.querySelectorAll('.tile img')]"
    assert opened.run(f"Promise.all({tiles}.map(e => e.decode())).then(all => all.length)") > 14 * 6
    visible = "[...document.querySelectorAll('.benchmark')].map(e => e.checkVisibility())"
    assert opened.run(visible) == [False, True]
    path = tmp_path / "hidden.html"
    page.write_page(path, "t", [hidden])
    opened.open(path)
    controls = (
        "[...document.querySelectorAll('select')].filter(e => e.checkVisibility()).map(e => e.id)"
    )
    assert opened.run(controls) == ["method", "beside", "category", "sort"]
    assert ids(opened) == [100 + i for i in range(25)]
    assert not opened.run("document.getElementById('bars').checkVisibility()")


@pytest.mark.parametrize("width", (320, 400, 700, 1000, 1600))
def test_nothing_leaves_the_window(opened, width):
    opened.resize(width, 800)
    opened.choose("#beside", "1")
    outside = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
        !e.closest('.wide > table') && e.getBoundingClientRect().right > innerWidth + 0.5)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert opened.run("document.scrollingElement.scrollWidth") <= width
    assert opened.run(outside) == []
    # the five best stand in one line, so that two methods are compared by column
    line = "new Set([...document.querySelectorAll('.run')[0].querySelectorAll('.tile')]" + (
        ".slice(0, 5).map(e => e.getBoundingClientRect().y)).size"
    )
    assert opened.run(line) == 1
    opened.click(".run .tile")
    assert opened.run("document.getElementById('large').getBoundingClientRect().right") <= width
    opened.click("#close")
