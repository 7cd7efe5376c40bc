"""One HTML page of what was retrieved: no network, images inside, queries sorted and searched."""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import Result
from cir_jax.input.images import reading, to_rgb
from cir_jax.retrieval.features import open_image
from cir_jax.storage.atomic import write_atomically

THUMBNAIL = 96
"""Longer side, in pixels."""

SHOWN = 5
MAX_TARGETS = 6
"""Ground truths outside the top that are shown per query."""

MAX_QUERIES = 500
"""Queries per benchmark; of more, an even choice over the ranks, so that the page stays small."""


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """A benchmark on the page: its table as text, and the result whose retrieved images to show."""

    benchmark: Benchmark
    result: Result
    table: str


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all; on process 0 only."""
    if jax.process_index() != 0:
        return
    text = page(title, sections)
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML text."""
    content = json.dumps([_section(section) for section in sections], separators=(",", ":"))
    # a query text must not be able to end the script
    content = content.replace("<", "\\u003c").replace("\u2028", " ").replace("\u2029", " ")
    return _PAGE.replace("@TITLE@", html.escape(title)).replace("@CONTENT@", content)


def _section(section: Section) -> dict[str, Any]:
    benchmark, result = section.benchmark, section.result
    best = None if result.outcome is None else result.best_rank
    chosen = _choose(best, len(benchmark.queries))
    images: dict[str, str] = {}

    def gallery(position: int) -> str:
        key = f"g{position}"
        if key not in images:
            what = f"{benchmark.name}, gallery record {position}"
            images[key] = _thumbnail(benchmark.gallery[position], what)
        return key

    queries = []
    for number in chosen:
        query = benchmark.queries[number]
        if benchmark.references is None:
            reference = gallery(query.reference)
        else:
            reference = f"r{query.reference}"
            what = f"reference of query {query.id}"
            images[reference] = _thumbnail(benchmark.reference(query), what)
        top = [int(image) for image in result.top[number][:SHOWN] if image >= 0]
        missed = [target for target in query.targets if target not in top]
        queries.append(
            {
                "id": query.id,
                "text": " / ".join(query.texts),
                "category": query.category,
                "aspects": ", ".join(query.aspects),
                "rank": None if best is None else int(best[number]) + 1,
                "reference": reference,
                "top": [[gallery(image), int(image in query.targets)] for image in top],
                "missed": [gallery(target) for target in missed[:MAX_TARGETS]],
                "more": max(0, len(missed) - MAX_TARGETS),
            }
        )
    return {
        "name": f"{benchmark.name} {benchmark.split}",
        "method": result.method,
        "table": section.table,
        "total": len(benchmark.queries),
        "queries": queries,
        "images": images,
    }


def _choose(best: np.ndarray | None, count: int) -> list[int]:
    """Positions of the queries on the page, in their own order."""
    if count <= MAX_QUERIES:
        return list(range(count))
    order = np.arange(count) if best is None else np.argsort(best, kind="stable")
    even = np.linspace(0, count - 1, MAX_QUERIES).round().astype(int)
    return sorted(int(i) for i in order[even])


def _thumbnail(record: Any, what: str) -> str:
    with reading(what):
        image = to_rgb(open_image(record, "image", what))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { --ink:#212529; --faint:#6c757d; --rule:#e4e6e8; --hit:#2f9e44; --missed:#e87722; }
body { margin:0 auto; max-width:1200px; padding:24px; background:#fafaf8; color:var(--ink);
  font:15px/1.45 system-ui,sans-serif; }
h1 { font-size:22px; margin:0 0 12px; }
pre { overflow-x:auto; background:#fff; border:1px solid var(--rule); border-radius:6px;
  padding:12px; font-size:12.5px; }
nav, form { display:flex; flex-wrap:wrap; gap:8px; align-items:center; margin:12px 0; }
button, select, input { font:inherit; padding:5px 10px; border:1px solid #ced4da;
  border-radius:6px; background:#fff; color:inherit; }
button[aria-pressed=true] { background:var(--ink); color:#fff; }
.note { color:var(--faint); font-size:13px; }
.query { display:grid; grid-template-columns:108px minmax(150px,1fr) minmax(0,900px); gap:14px;
  border-top:1px solid var(--rule); padding:12px 0; overflow-wrap:anywhere; }
.images { display:flex; flex-wrap:wrap; gap:8px; }
.tile { width:96px; height:96px; display:flex; align-items:center; justify-content:center;
  border:3px solid #c9cdd2; border-radius:4px; background:#fff; }
.tile img { max-width:96px; max-height:96px; }
.hit { border-color:var(--hit); } .missed { border-color:var(--missed); }
.reference { border-color:transparent; }
.gap { width:6px; }
.legend b { font-weight:600; } .legend .h { color:var(--hit); } .legend .m { color:var(--missed); }
@media (max-width:760px) { .query { grid-template-columns:108px 1fr; }
  .images { grid-column:1/-1; } }
</style></head><body>
<h1>@TITLE@</h1>
<nav id="names"></nav>
<pre id="table"></pre>
<form onsubmit="return false">
<label>sort by <select id="sort"><option value="worst">worst rank first</option>
<option value="best">best rank first</option><option value="id">id</option>
<option value="category">category</option></select></label>
<label>text <input id="text" type="search" placeholder="filter by words"></label>
<label>category <select id="category"></select></label>
<span class="note" id="count"></span></form>
<p class="note legend">Left the reference, then the five best images:
<b class="h">green</b> is a ground truth, grey is not; behind them, in
<b class="m">orange</b>, ground truths outside the five.</p>
<main id="queries"></main>
<button id="more" type="button">show more</button>
<script type="application/json" id="content">@CONTENT@</script>
<script>
"use strict";
const sections = JSON.parse(document.getElementById("content").textContent);
const at = id => document.getElementById(id);
const STEP = 50;
let section = sections[0], shown = STEP;

function element(tag, name, text) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (text !== undefined) e.textContent = text;
  return e;
}
function tile(key, kind) {
  const e = element("div", "tile " + kind), image = element("img");
  image.src = "data:image/jpeg;base64," + section.images[key];
  image.alt = kind || "retrieved";
  image.title = key.replace("g", "gallery image ").replace("r", "reference ");
  e.append(image);
  return e;
}
function row(query) {
  const e = element("article", "query"), words = element("div"), images = element("div", "images");
  words.append(element("div", "", query.text || "(no text)"));
  const rank = query.rank === null ? "no public ground truth" : "best rank " + query.rank;
  const facts = ["query " + query.id, rank, query.category, query.aspects].filter(x => x);
  words.append(element("div", "note", facts.join(" · ")));
  for (const [key, hit] of query.top) images.append(tile(key, hit ? "hit" : ""));
  images.append(element("div", "gap"));
  for (const key of query.missed) images.append(tile(key, "missed"));
  if (query.more) images.append(element("span", "note", "and " + query.more + " more"));
  e.append(tile(query.reference, "reference"), words, images);
  return e;
}
const orders = {
  worst: (a, b) => (b.rank || 0) - (a.rank || 0) || a.id - b.id,
  best: (a, b) => (a.rank || 0) - (b.rank || 0) || a.id - b.id,
  id: (a, b) => a.id - b.id,
  category: (a, b) => a.category.localeCompare(b.category) || a.id - b.id,
};
function draw() {
  const words = at("text").value.toLowerCase().split(/\\s+/).filter(x => x);
  const category = at("category").value;
  const found = section.queries.filter(q =>
    words.every(w => (q.text + " " + q.aspects).toLowerCase().includes(w)) &&
    (!category || q.category === category));
  found.sort(orders[at("sort").value]);
  at("queries").replaceChildren(...found.slice(0, shown).map(row));
  at("more").hidden = found.length <= shown;
  const part = section.queries.length < section.total ? " (an even choice over the ranks)" : "";
  at("count").textContent = `${Math.min(shown, found.length)} of ${found.length} shown, ` +
    `${section.queries.length} of ${section.total} queries on this page${part}`;
}
function open(chosen) {
  section = chosen;
  shown = STEP;
  at("table").textContent = section.table;
  const kinds = [...new Set(section.queries.map(q => q.category))].filter(x => x).sort();
  at("category").replaceChildren(new Option("all", ""), ...kinds.map(k => new Option(k, k)));
  at("category").parentElement.hidden = !kinds.length;
  for (const b of at("names").children) b.ariaPressed = String(b.textContent === section.name);
  draw();
}
for (const one of sections) {
  const button = element("button", "", one.name);
  button.type = "button";
  button.onclick = () => open(one);
  at("names").append(button);
}
for (const id of ["sort", "text", "category"]) at(id).oninput = () => { shown = STEP; draw(); };
at("more").onclick = () => { shown += STEP; draw(); };
open(section);
</script></body></html>
"""
