"""One HTML page of what a run retrieved: no network, images inside, all queries and methods.

Tables are HTML from the start; what happened to the queries is JSON, from which `page.js` draws
what is looked at. Pictures are lines of text, decoded when they are shown.
"""

import html
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cir_jax.evaluation import per_query, report
from cir_jax.evaluation.page.pictures import Images, Pictures
from cir_jax.evaluation.page.tables import section_tables
from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import Result
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import place

SHOWN = 5
MISSED = 3
"""Ground truths outside the top that are shown per query and method: those of the best ranks."""

RIGHT = (1, 5, 10, 50)
"""Best ranks up to which a query may be called right, beside those of the benchmark's metrics."""

Section = tuple[Benchmark, Sequence[Result]]
"""A benchmark and its results, the method's last."""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all; on process 0 only.

    Raises DataError naming the image that cannot be read.
    """
    if jax.process_index() != 0:
        return
    text = page(title, sections)
    write_atomically(place(path), lambda file: file.write(text.encode()))


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML text."""
    pictures = Pictures()
    content = [_section(benchmark, results, pictures) for benchmark, results in sections]
    parts = {
        "TITLE": html.escape(title),
        "TABLES": "\n".join(
            section_tables(number, results, report.published_rows(results))
            for number, (_, results) in enumerate(sections)
        ),
        "CONTENT": _json({"group": pictures.GROUP, "missed": MISSED, "sections": content}),
        "PICTURES": pictures.scripts(),
        "STYLE": _file("page.css"),
        "PROGRAM": _file("page.js"),
    }
    first, *rest = _file("page.html").split("@@")  # text, name, text, name, text: each read once
    names, texts = rest[::2], rest[1::2]
    return first + "".join(parts[n] + text for n, text in zip(names, texts, strict=True))


def _section(benchmark: Benchmark, results: Sequence[Result], pictures: Pictures) -> dict[str, Any]:
    """What `page.js` reads of a benchmark. Images are positions in `images`: [picture, name].

    queries: targets are -1 where they are not pictured; found: per method, as `queries.jsonl`.
    """
    images = Images(benchmark, pictures)
    queries = []
    for i, query in enumerate(benchmark.queries):
        tops = [[int(one) for one in result.top[i][:SHOWN] if one >= 0] for result in results]
        ranks = [per_query.ranks(result.outcome, i) for result in results]
        pictured = {one for top in tops for one in top}
        for own, top in zip(ranks, tops, strict=True):
            missed = [t for _, t in sorted(zip(own, query.targets, strict=True)) if t not in top]
            pictured.update(missed[:MISSED])
        queries.append(
            {
                "id": query.id,
                "text": " / ".join(query.texts),
                "category": query.category,
                "aspects": list(query.aspects),
                "reference": images.reference(query),
                "targets": [images.gallery(t) if t in pictured else -1 for t in query.targets],
                "found": [
                    {
                        "ranks": own,
                        "subset": per_query.subset_rank(result.outcome, i),
                        "top": [images.gallery(one) for one in top],
                        "scores": [float(f"{x:.7g}") for x in result.scores[i][: len(top)]],
                    }
                    for result, own, top in zip(results, ranks, tops, strict=True)
                ],
            }
        )
    depths = (*benchmark.protocol.precision, *benchmark.protocol.recall)
    return {
        "name": f"{benchmark.name} {benchmark.split}",
        "methods": [result.method for result in results],
        "labelled": benchmark.labelled,
        "right": sorted({*RIGHT, *depths}),
        "usual": depths[0] if depths else SHOWN,
        "queries": queries,
        "images": images.listed,
    }


def _json(content: Any) -> str:
    """JSON that may stand in a script: no text of a query can end it."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
