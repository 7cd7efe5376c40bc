"""Runs beside each other: exact differences, honest intervals, and no comparison of unlike runs."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.evaluation import comparison, contact_sheet, per_query, report
from tests.evaluation import worlds
from tests.evaluation.test_per_query import evaluated

FACTS = {
    "benchmark": "circo", "split": "val", "method": "m", "protocol": "p", "data": "circo@1",
    "counts": {"queries": 3}, "weights_id": "w",
}  # fmt: skip


def record(i, value, **changes):
    fields = {
        "benchmark": "circo",
        "split": "val",
        "method": "m",
        "id": i,
        "ranks": [1],
        "category": "",
        "metrics": {"R@1": value},
        "AP": value,
        "top": [],
        "positions": [],
        "scores": [],
    }
    return fields | changes  # fmt: skip


def run(values, label="a", categories=None, **facts):
    names = categories or [""] * len(values)
    rows = {i: record(i, v, category=names[i]) for i, v in enumerate(values)}
    return comparison.Run(label, FACTS | facts, rows)


def put(folder, records, **facts):
    folder.mkdir()
    with open(folder / per_query.FILE, "w") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)
    (folder / "results.json").write_text(json.dumps({"results": [FACTS | facts]}))
    return folder


def test_differences_are_exact_and_counted():
    (row,) = comparison.differences(run([0, 100, 100, 0, 0]), run([100, 0, 100, 100, 0]))
    assert (row.first, row.second, row.value) == (40.0, 60.0, 20.0)
    assert (row.wins, row.losses, row.ties) == (2, 1, 2)
    assert row.low < 20 < row.high


def test_the_interval_is_that_of_the_paired_mean():
    """Of many queries: the normal one. Noise that both runs share does not widen it."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 30, 2000)
    one, two = shared + rng.normal(0, 3, 2000), shared + rng.normal(1, 3, 2000)
    (row,) = comparison.differences(run(one.tolist()), run(two.tolist()), samples=4000)
    half = 1.96 * (two - one).std(ddof=1) / np.sqrt(2000)
    assert row.high - row.low == pytest.approx(2 * half, rel=0.06)
    assert (row.low + row.high) / 2 == pytest.approx((two - one).mean(), abs=half / 10)
    assert row.high - row.low < 1.96 * 30 / np.sqrt(2000)  # unpaired, it were ten times as wide
    again = comparison.differences(run(one.tolist()), run(two.tolist()), samples=4000)
    assert again == [row]
    other = comparison.differences(run(one.tolist()), run(two.tolist()), samples=4000, seed=1)
    assert other != [row]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        delta = rng.choice([-100.0, 0.0, 100.0], size=(80, 1), p=[0.2, 0.5, 0.3])
        drawn = comparison.resampled(delta, [np.arange(80)], 400, 0)
        low, high = np.percentile(drawn[:, 0], [2.5, 97.5])
        covered.append(low <= 10 <= high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_a_mean_over_categories_is_resampled_within_each():
    categories = ["dress"] * 2 + ["shirt"] * 6
    one = run([0.0] * 8, categories=categories, benchmark="fashioniq:reversed (partial)")
    two = run([100.0] * 2 + [0.0] * 6, categories=categories, benchmark="fashioniq:reversed")
    (row,) = comparison.differences(one, two)
    # constant within each category: half of the mean of categories is sure, whatever is drawn
    assert (row.value, row.low, row.high) == (50.0, 50.0, 50.0)
    (row,) = comparison.differences(run([0.0] * 8), run([100.0] * 2 + [0.0] * 6))
    assert row.value == 25.0 and row.low < row.high


def test_blocks_do_not_change_what_is_drawn_on_average(monkeypatch):
    values = np.arange(12.0).reshape(6, 2)
    monkeypatch.setattr(comparison, "_BLOCK", 7)
    drawn = comparison.resampled(values, [np.arange(6)], 3000, 0)
    assert drawn.shape == (3000, 2)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 1.0)  # the same queries for all metrics
    np.testing.assert_allclose(drawn.mean(axis=0), values.mean(axis=0), atol=0.15)


def test_the_queries_apart_are_wins_then_losses():
    first, second = run([50.0] * 6), run([60.0, 90.0, 50.0, 10.0, 40.0, 70.0])
    assert comparison.apart(first, second, 4) == [1, 5, 4, 3]
    assert comparison.apart(first, second, 100) == [1, 5, 0, 4, 3]
    assert comparison.apart(first, first, 4) == []


def test_runs_are_found_by_benchmark(tmp_path):
    rows = [record(i, 0.0) for i in range(3)]
    a = put(tmp_path / "a", [*rows, record(0, 1.0, ranks=[], split="test")])
    facts = json.loads((a / "results.json").read_text())["results"]
    facts.append(FACTS | {"split": "test"})
    (a / "results.json").write_text(json.dumps({"results": facts}))
    b = put(tmp_path / "b", rows)
    found = comparison.load([a, b, put(tmp_path / "c", rows)])
    assert list(found) == [("circo", "val")]  # hidden labels cannot be compared
    assert [one.label for one in found["circo", "val"]] == ["a", "b", "c"]
    (tmp_path / "x").mkdir()
    c = put(tmp_path / "x" / "a", rows)
    labels = [one.label for one in comparison.load([a, c])["circo", "val"]]
    assert labels == [f"{tmp_path.name}/a", "x/a"]


@pytest.mark.parametrize(
    ("records", "facts", "message"),
    [
        ([0, 1, 2], {"protocol": "q"}, "circo val: a and b differ in protocol: p and q"),
        ([0, 1, 2], {"data": "circo@2"}, "differ in data"),
        ([0, 1, 2], {"counts": {"queries": 9}}, "differ in counts"),
        ([0, 1, 4], {}, "have other queries, such as query 2"),
        ([0, 2, 1], {}, "have other queries in their order"),
        ([0, 1, 2], {"method": "n"}, "queries.jsonl has circo val m, results.json has not"),
    ],
    ids=str,
)
def test_unlike_runs_are_refused(records, facts, message, tmp_path):
    a = put(tmp_path / "a", [record(i, 0.0) for i in range(3)])
    b = put(tmp_path / "b", [record(i, 0.0) for i in records], **facts)
    with pytest.raises(DataError, match=message):
        comparison.load([a, b])


def test_runs_that_share_nothing_are_refused(tmp_path):
    a = put(tmp_path / "a", [record(0, 0.0)])
    b = put(tmp_path / "b", [record(0, 0.0, split="test_0")], split="test_0")
    with pytest.raises(DataError, match="is in two of these runs .circo val: a; circo test_0: b"):
        comparison.load([a, b])
    with pytest.raises(DataError, match="give two folders"):
        comparison.load([a])
    with pytest.raises(DataError, match="a folder is given twice"):
        comparison.load([a, a])
    with pytest.raises(DataError, match="queries.jsonl: no such file"):
        comparison.load([a, tmp_path])
    (b / "results.json").write_text("{")
    with pytest.raises(DataError, match="results.json: not readable as results"):
        comparison.load([a, b])


@pytest.fixture(scope="module")
def two_runs(tiny, tmp_path_factory):
    """The oracle and a baseline on the tiles, as evaluation writes them."""
    benchmark = worlds.benchmark(name="circo")
    results = evaluated(tiny, benchmark)
    folders = []
    for name, shown in (("poor", results[:1]), ("good", results)):
        folder = tmp_path_factory.mktemp("runs") / name
        per_query.write(folder / per_query.FILE, [(benchmark, shown)])
        report.write_results(folder / "results.json", shown)
        folders.append(folder)
    return benchmark, folders


def test_what_evaluation_writes_is_compared_and_drawn(two_runs, tmp_path):
    benchmark, folders = two_runs
    found = comparison.load(folders)
    (key,) = found
    first, second = found[key]
    rows = {row.metric: row for row in comparison.differences(first, second)}
    assert rows["mAP@5"].value > 0 and rows["mAP@5"].wins > rows["mAP@5"].losses
    text = comparison.format_table(key, first, second, list(rows.values()))
    assert text.startswith("circo val: good (oracle) minus poor (image_only), 14 queries, percent")
    assert f"protocol {benchmark.protocol.id}; weights " in text and "wins" in text
    path = tmp_path / "sheet.png"
    assert comparison.draw(benchmark, first, second, path, 4)
    sheet = np.asarray(Image.open(path))
    chosen = comparison.apart(first, second, 4)
    _, _, shown, _ = contact_sheet._columns()
    line = contact_sheet.LINE
    queries = {query.id: query for query in benchmark.queries}
    for i, number in enumerate(chosen):
        for j, one in enumerate((first, second)):
            y = contact_sheet.HEADER + i * (2 * line + 16) + j * line + 24 + contact_sheet.TILE // 2
            for x, position in zip(shown, one.records[number]["positions"], strict=False):
                hit = position in queries[number].targets
                expected = contact_sheet.HIT if hit else contact_sheet.OTHER
                assert tuple(sheet[y, x - 2]) == expected
    assert not comparison.draw(benchmark, first, first, tmp_path / "none.png", 4)
    assert not (tmp_path / "none.png").exists()


def test_images_of_another_gallery_are_not_drawn(two_runs, tmp_path):
    benchmark, folders = two_runs
    ((first, second),) = comparison.load(folders).values()
    names = [{"name": f"x{i}".encode()} for i in range(45)]
    other = dataclasses.replace(benchmark, labels=names)
    with pytest.raises(DataError, match="it was prepared anew since.*--nosheets"):
        comparison.draw(other, first, second, tmp_path / "x.png", 4)
