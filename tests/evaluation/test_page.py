"""The page holds all that it shows, and can be sorted and searched without a network."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from cir_jax.evaluation import evaluate, page, protocols
from tests.evaluation import worlds


@pytest.fixture(scope="module")
def section(tiny):
    backbone, params = tiny
    first, *rest = worlds.queries(protocols.CIRCO)
    # a text that would end the script
    hostile = dataclasses.replace(first, texts=("</script><b>red</b> & more",))
    benchmark = worlds.benchmark(queries=(hostile, *rest))
    composer = worlds.ColourOracle(backbone)
    result = evaluate.evaluate(composer, {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1))
    return page.Section(benchmark, result, "the table & more")


def content(text):
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    return json.loads(found)


def test_queries_are_shown_with_ranks_hits_and_what_was_missed(section):
    text = page.page("a <title>", [section])
    (shown,) = content(text)
    assert shown["table"] == "the table & more" and shown["total"] == len(shown["queries"]) == 14
    for query, record in zip(section.benchmark.queries, shown["queries"], strict=True):
        position = section.benchmark.queries.index(query)
        assert record["id"] == query.id and record["text"] == query.texts[0]
        assert record["rank"] == section.result.best_rank[position] + 1
        top = section.result.top[position][:5]
        assert record["top"] == [[f"g{i}", int(i in query.targets)] for i in top]
        missed = [t for t in query.targets if t not in top]
        assert record["missed"] == [f"g{t}" for t in missed[: page.MAX_TARGETS]]
        used = [record["reference"], *(key for key, _ in record["top"]), *record["missed"]]
        assert set(used) <= set(shown["images"])
    position = int(shown["queries"][1]["reference"][1:])
    data = base64.b64decode(shown["images"][f"g{position}"])
    colour = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1)).argmax()
    assert colour == position % 3


def test_the_page_stands_alone_and_no_text_breaks_it(section):
    text = page.page("a <title>", [section])
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "<h1>a &lt;title&gt;</h1>" in text and text.count("</script>") == 2
    assert "<b>red</b>" not in text


def test_large_benchmarks_are_cut_evenly_over_the_ranks(monkeypatch):
    monkeypatch.setattr(page, "MAX_QUERIES", 4)
    best = np.array([9, 0, 30, 2, 900, 0, 4])
    assert page._choose(best, 7) == [0, 1, 3, 4]  # ranks 9, 0, 2 and 900
    assert page._choose(None, 4) == [0, 1, 2, 3]
    assert len(page._choose(None, 100)) == 4


def test_queries_without_public_ground_truth_are_shown_too(section, tmp_path):
    hidden = tuple(
        dataclasses.replace(q, targets=(), aspects=()) for q in section.benchmark.queries
    )
    benchmark = dataclasses.replace(section.benchmark, queries=hidden)
    result = dataclasses.replace(section.result, outcome=None, metrics={})
    path = tmp_path / "x" / "report.html"
    page.write_page(path, "t", [page.Section(benchmark, result, "")])
    (shown,) = content(path.read_text())
    assert all(q["rank"] is None and not q["missed"] for q in shown["queries"])
    assert not any(hit for q in shown["queries"] for _, hit in q["top"])
