"""queries.jsonl says of each query what the run's numbers are the mean of."""

import dataclasses
import json

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import evaluate, per_query, protocols
from tests.evaluation import worlds


def evaluated(tiny, benchmark):
    backbone, params = tiny
    return evaluate.evaluate_with_baselines(
        worlds.ColourOracle(backbone), {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1),
        batch_size=8, method="oracle",
    )  # fmt: skip


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_the_numbers_are_means_of_what_is_written(name, tiny, tmp_path):
    benchmark = worlds.benchmark(protocols.PROTOCOLS[name])
    results = evaluated(tiny, benchmark)
    path = tmp_path / "out" / per_query.FILE
    per_query.write(path, [(benchmark, results)])
    records = per_query.read(path)
    assert [r["id"] for r in records] == [q.id for q in benchmark.queries]
    result = results[-1]
    categories = sorted({r["category"] for r in records})
    for metric in result.headline:
        if benchmark.protocol.by_category:
            groups = [[r for r in records if r["category"] == c] for c in categories]
        else:
            groups = [records]
        value = np.mean([np.mean([r["metrics"][metric] for r in group]) for group in groups])
        assert value == pytest.approx(result.metrics[metric].value, abs=1e-9)
    by_method = {one.method: one.outcome.target_ranks for one in results}
    for i, (record, query) in enumerate(zip(records, benchmark.queries, strict=True)):
        assert record["method"] == "oracle" and record["texts"] == list(query.texts)
        assert record["reference"] == str(query.reference)
        assert record["targets"] == [str(t) for t in query.targets]
        assert record["ranks"] == [r + 1 for r in result.outcome.target_ranks[i] if r >= 0]
        for target, rank in zip(record["targets"], record["ranks"], strict=True):
            if rank <= len(record["top"]):
                assert record["top"][rank - 1] == target
        assert [int(x) for x in record["top"]] == record["positions"]
        assert record["scores"] == sorted(record["scores"], reverse=True)
        np.testing.assert_allclose(
            record["scores"], result.scores[i][: len(record["scores"])], rtol=1e-6
        )
        hits = [n / rank for n, rank in enumerate(sorted(record["ranks"]), 1)]
        assert record["AP"] == pytest.approx(100 * sum(hits) / len(hits))
        assert (record["subset_rank"] is None) == (name != "cirr")
        for method in per_query.UNIMODAL:
            assert record[method] == [r + 1 for r in by_method[method][i] if r >= 0]
    if name == "cirr":
        assert {r["subset_rank"] for r in records} <= set(range(1, 6))


def test_without_labels_and_baselines_there_is_the_ranking_alone(tiny):
    benchmark = worlds.benchmark()
    hidden = tuple(dataclasses.replace(q, targets=()) for q in benchmark.queries)
    labels = [{"name": f"image {i}".encode()} for i in range(len(benchmark.gallery))]
    benchmark = dataclasses.replace(benchmark, queries=hidden, labels=labels)
    for record in per_query.records(benchmark, evaluated(tiny, benchmark)[-1:]):
        assert record["ranks"] == record["targets"] == [] and record["metrics"] == {}
        assert record["AP"] is record["image_only"] is record["text_only"] is None
        assert record["top"] == [f"image {i}" for i in record["positions"]]
        assert record["reference"].startswith("image ")
        assert len(record["top"]) == 45
        json.dumps(record, allow_nan=False)


def test_references_of_their_own_are_called_by_their_names(tiny):
    benchmark = worlds.benchmark()
    own = [record | {"name": f"query {i}".encode()} for i, record in enumerate(benchmark.gallery)]
    benchmark = dataclasses.replace(benchmark, references=own)
    records = list(per_query.records(benchmark, evaluated(tiny, benchmark)[-1:]))
    expected = [f"query {query.reference}" for query in benchmark.queries]
    assert [record["reference"] for record in records] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"id": 1', "line 1: not valid JSON .* truncated"),
        ("[]\n", r"line 1: no record of a query \(no object\)"),
        ('{"benchmark": "x", "split": "val"}\n', "line 1: no record of a query .has no 'method'"),
    ],
)
def test_what_is_no_such_file_is_named(text, message, tmp_path):
    path = tmp_path / per_query.FILE
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        per_query.read(path)
    with pytest.raises(DataError, match="absent.jsonl: no such file.*launch/eval.py"):
        per_query.read(tmp_path / "absent.jsonl")


def test_labels_of_another_number_are_refused():
    with pytest.raises(DataError, match="the names of 1 images for a gallery of 45"):
        worlds.benchmark(labels=[{"name": b"x"}])
