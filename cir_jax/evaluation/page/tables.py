"""The numbers of a benchmark as HTML tables: best in bold, below it papers and our distance."""

import html
import math
from collections.abc import Sequence

from cir_jax.evaluation import published, report
from cir_jax.evaluation.published import Row
from cir_jax.evaluation.result import Result

LOWER = ("mean rank", "median rank")
"""Metrics of which less is better."""


def section_tables(number: int, results: Sequence[Result], papers: Sequence[Row]) -> str:
    """The part of the page with benchmark `number`'s headline, and its other numbers folded.

    papers: published rows, as `report.published_rows` gives them.
    """
    first = results[0]
    name = html.escape(f"{first.benchmark} {first.split}")
    facts = (
        f"{report.counted(first.counts)}; percent, \xb1 standard error over queries; protocol "
        f"{first.protocol.id}; weights {first.weights_id}"
    )
    lines = [
        f'<section class="benchmark" id="benchmark-{number}">',
        f"<h2>{name}</h2>",
        f'<p class="note">{html.escape(facts)}</p>',
    ]
    if first.partial:
        lines.append('<p class="partial">PARTIAL DATA: these numbers are not comparable</p>')
    if any(result.metrics for result in results):
        lines.append(_table(f"{name}, headline", first.headline, results, papers))
        gaps = report.gap_lines(report.composition_gaps(results))
        lines += [f'<p class="note">{html.escape(line)}</p>' for line in gaps]
        others = [x for x in first.metrics if x not in first.headline]
        if others:
            lines += [
                f"<details><summary>{len(others)} more numbers</summary>",
                _table(f"{name}, more numbers", others, results, papers),
                "</details>",
            ]
    else:
        lines.append('<p class="note">no public ground truth</p>')
    return "\n".join([*lines, "</section>"])


def _table(
    caption: str, columns: Sequence[str], results: Sequence[Result], papers: Sequence[Row]
) -> str:
    """caption: HTML. Rows of papers with none of the columns are left out."""
    first = results[0]
    papers = [row for row in papers if any(name in row.metrics for name in columns)]
    best = {name: _best(name, results) for name in columns}
    head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in ["method", *columns])
    body = []
    for result in results:
        cells = "".join(_ours(result, name, best[name]) for name in columns)
        setting = html.escape(result.setting_id or "-")
        body.append(_row(html.escape(result.method), f"{cells}<td><code>{setting}</code></td>"))
    parts = [f"<tbody>{''.join(body)}</tbody>"]
    if papers:
        # weights that are none of the papers' are compared with nothing
        known = bool(published.backbone_of(first.weights_id))
        comparable = known and any(row.split == first.split for row in papers)
        what = "published" + ("; in brackets ours minus theirs" if comparable else "")
        title = f'<tr><th class="what" colspan="{len(columns) + 2}" scope="rowgroup">{what}</th>'
        body = []
        for row in papers:
            ours = _distance_to(row, results) if known and row.split == first.split else None
            cells = "".join(_theirs(row, name, ours) for name in columns)
            body.append(_row(html.escape(report.label(row, first)), f"{cells}<td></td>"))
        parts.append(f'<tbody class="papers">{title}</tr>{"".join(body)}</tbody>')
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table>'
        f'<thead><tr>{head}<th scope="col">setting</th></tr></thead>{"".join(parts)}</table></div>'
    )


def _row(name: str, cells: str) -> str:
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _best(name: str, results: Sequence[Result]) -> float | None:
    """The best number of a column, as printed; None where all are equal."""
    values = {round(r.metrics[name].value, 2) for r in results if name in r.metrics}
    if len(values) < 2:
        return None
    return min(values) if name in LOWER else max(values)


def _ours(result: Result, name: str, best: float | None) -> str:
    if name not in result.metrics:
        return "<td>-</td>"
    x = result.metrics[name]
    text = f"{x.value:.2f}"
    text = f"<b>{text}</b>" if round(x.value, 2) == best else text
    if not math.isnan(x.se):
        text += f" <small>\xb1{x.se:.2f}</small>"
    return f"<td>{text}</td>"


def _distance_to(row: Row, results: Sequence[Result]) -> Result | None:
    """Our result of a paper's method."""
    return next((result for result in results if result.method == row.method), None)


def _theirs(row: Row, name: str, ours: Result | None) -> str:
    if name not in row.metrics:
        return "<td>-</td>"
    text = f"{row.metrics[name]:.2f}"
    if ours is not None and name in ours.metrics:
        distance = f"{ours.metrics[name].value - row.metrics[name]:+.2f}".replace("-", "\u2212")
        text += f" <small>({distance})</small>"
    return f"<td>{text}</td>"
