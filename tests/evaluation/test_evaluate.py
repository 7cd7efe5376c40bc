"""One evaluation for all benchmarks: protocols, baselines, meshes."""

import json

import jax
import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import evaluate, protocols, report
from cir_jax.evaluation.benchmarks import CaptionBenchmark
from cir_jax.evaluation.result import combine
from cir_jax.retrieval.features import image_features, unit
from tests import tiny as factory
from tests.evaluation import worlds


@pytest.fixture(scope="module")
def oracle(tiny):
    backbone, params = tiny
    return worlds.ColourOracle(backbone), {}, {"backbone": params}


@pytest.fixture(scope="module")
def slerp(tiny):
    """One composer, so one program, for many tests."""
    backbone, params = tiny
    return evaluate.composers.build("slerp", backbone), {}, {"backbone": params}


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS.values(), ids=lambda p: p.name)
def test_an_oracle_solves_what_its_protocol_allows(oracle, protocol):
    benchmark = worlds.benchmark(protocol)
    result = evaluate.evaluate(*oracle, benchmark, mesh=worlds.mesh(1), batch_size=4)
    assert set(result.headline) <= set(result.metrics)
    assert result.protocol.id.startswith(protocol.name)
    for query, top in zip(benchmark.queries, result.top, strict=True):
        colour = query.targets[0] % 3
        found = top[top >= 0]
        # right colour before any other, and nothing that the protocol excludes
        right = (found % 3 == colour).tolist()
        assert right == sorted(right, reverse=True) and right[0]
        if protocol.remove_reference:
            assert query.reference not in found
        if protocol.gallery == "category":
            assert {x % 2 for x in found} == {query.targets[0] % 2}
        if protocol.gallery == "candidates":
            assert set(found) == set(query.candidates)
    if protocol.gallery == "candidates":
        assert result.metrics["R@1"].value == 100
    if protocol.subset_recall:
        assert result.metrics["Rs@1"].value == 100
        assert result.subset_top.shape == (14, 5)


@pytest.mark.parametrize("devices", [3, 8])
def test_metrics_do_not_depend_on_the_mesh(slerp, devices):
    benchmark = worlds.benchmark(protocols.FASHIONIQ)
    one = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1))
    many = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(devices), batch_size=10)
    assert one.metrics == many.metrics
    np.testing.assert_array_equal(one.top, many.top)
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-5)
    assert one.outcome.target_ranks.max() > 3  # not solved: ranks say something


def test_both_caption_orders_are_averaged_after_normalising(tiny):
    backbone, params = tiny
    benchmark = worlds.benchmark(protocols.FASHIONIQ)
    text = evaluate.composers.build("text_only", backbone)
    frozen = {"backbone": params}
    result = evaluate.evaluate(text, {}, frozen, benchmark, mesh=worlds.mesh(1))
    c1, c2 = (x.strip(".?, ") for x in benchmark.queries[0].texts)
    ids = backbone.tokenizer([f"{c1} and {c2}", f"{c2} and {c1}"])
    both = unit(np.asarray(jax.jit(backbone.encode_text)(params, ids)))
    query = both.mean(0) / np.linalg.norm(both.mean(0))
    gallery = image_features(
        backbone, params, benchmark.gallery, mesh=worlds.mesh(1), normalise=True
    )
    best = gallery[result.top[0][:3]]
    np.testing.assert_allclose(result.scores[0][:3], best @ query, rtol=1e-5)


def test_baselines_stand_beside_the_method_and_share_the_features(slerp, monkeypatch):
    benchmark = worlds.benchmark(protocols.CIRR)
    calls = []
    original = evaluate.features.image_features
    monkeypatch.setattr(
        evaluate.features, "image_features", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    results = evaluate.evaluate_with_baselines(
        *slerp, benchmark, mesh=worlds.mesh(1), method="slerp"
    )
    assert [r.method for r in results] == ["image_only", "text_only", "image_text", "slerp"]
    assert len(calls) == 1
    # the image-only baseline finds what is nearest to the reference: itself, were it not removed
    image_only = results[0]
    backbone, params = slerp[0].backbone, slerp[2]["backbone"]
    raw = original(backbone, params, benchmark.gallery, mesh=worlds.mesh(1), normalise=True)
    for query, top in zip(benchmark.queries, image_only.top, strict=True):
        scores = raw @ raw[query.reference]
        scores[query.reference] = -np.inf
        assert scores[top[0]] >= scores.max() - 1e-6


def test_one_program_composes_all_batches(oracle):
    composer, params, frozen = oracle
    fresh = worlds.ColourOracle(composer.backbone)
    before = worlds.ColourOracle.calls
    evaluate.evaluate(fresh, params, frozen, worlds.benchmark(), mesh=worlds.mesh(1), batch_size=4)
    assert worlds.ColourOracle.calls == before + 1  # 14 queries, 4 batches, one trace


def test_splits_are_combined_by_query(oracle):
    mesh = worlds.mesh(1)
    a = evaluate.evaluate(*oracle, worlds.benchmark(), mesh=mesh)
    few = worlds.benchmark(split="test", queries=worlds.queries(protocols.CIRCO)[:5])
    b = evaluate.evaluate(*oracle, few, mesh=mesh)
    both = combine([a, b])
    for name in both.headline:
        expected = (14 * a.metrics[name].value + 5 * b.metrics[name].value) / 19
        assert both.metrics[name].value == pytest.approx(expected)
    assert both.counts == {"queries": 19, "gallery": 90} and both.split == "val+test"


def test_without_public_ground_truth_there_are_rankings_but_no_metrics(oracle):
    import dataclasses

    hidden = tuple(
        dataclasses.replace(q, targets=(), aspects=()) for q in worlds.queries(protocols.CIRR)
    )
    benchmark = worlds.benchmark(protocols.CIRR, queries=hidden)
    result = evaluate.evaluate(*oracle, benchmark, mesh=worlds.mesh(1))
    assert result.metrics == {} and result.top.shape == (14, 45) and result.subset_top.shape[1] == 5
    assert "no public ground truth" in report.format_table([result])


def test_unreadable_gallery_images_are_an_error_that_names_the_record(oracle):
    gallery = worlds.gallery()
    gallery[7] = {**gallery[7], "image": b"not an image"}
    with pytest.raises(DataError, match="record 7: not a readable image"):
        evaluate.evaluate(*oracle, worlds.benchmark(gallery=gallery), mesh=worlds.mesh(1))


def test_table_and_json(oracle, tmp_path):
    mesh = worlds.mesh(1)
    results = [
        evaluate.evaluate(*oracle, worlds.benchmark(), mesh=mesh, method=name) for name in "ab"
    ]
    text = report.format_table(results, {("a", "mAP@5"): 12.3})
    lines = text.splitlines()
    assert "tiles/circo val: 14 queries, 45 gallery images" in lines[0]
    assert protocols.CIRCO.id in lines[1] and "tiny@0" in lines[1]
    assert lines[3].split()[:3] == ["method", "mAP@5", "paper"]
    x = results[0].metrics["mAP@5"]
    assert lines[5].split()[:4] == ["a", f"{x.value:.2f}", f"+-{x.se:.2f}", "12.30"]
    assert lines[6].split()[3] == "-"
    paths = [tmp_path / "x" / "results.json", tmp_path / "y.json"]
    for path, result in zip(paths, results, strict=True):
        report.write_results(path, [result], ["eval", "--seed=0"])
    first, second = (json.loads(path.read_text())["results"][0] for path in paths)
    assert first["metrics"] == second["metrics"] and first["metrics"]["mAP@5"]["value"] == x.value
    assert first["protocol"] == protocols.CIRCO.id and first["counts"]["gallery"] == 45
    assert list(first) == list(second)
    assert not list(tmp_path.glob("**/.*"))  # no temporary files are left
    whole = json.loads(paths[0].read_text())
    assert whole["versions"]["jax"] == jax.__version__ and whole["command"] == ["eval", "--seed=0"]


def test_a_table_holds_one_benchmark_only(oracle):
    mesh = worlds.mesh(1)
    a = evaluate.evaluate(*oracle, worlds.benchmark(), mesh=mesh)
    b = evaluate.evaluate(*oracle, worlds.benchmark(split="test"), mesh=mesh)
    with pytest.raises(ValueError, match="one table per benchmark"):
        report.format_table([a, b])


def test_caption_retrieval_finds_the_colour(tiny):
    backbone, params = tiny
    rng = np.random.default_rng(0)
    records = [{"image": worlds.tile(rng, c)} for c in (0, 1, 2)]
    captions = (("a red star", "star"), ("a green star", "red"), ("a blue circle", "blue"))
    benchmark = CaptionBenchmark("tiles/captions", "val", protocols.CAPTIONS, records, captions)
    result = evaluate.evaluate(
        worlds.ColourOracle(backbone), {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1)
    )
    value = {name: x.value for name, x in result.metrics.items()}
    assert value["t2i R@1/detailed"] == value["i2t R@1/detailed"] == 100
    # "star" has no colour, all scores are equal: image 0 is first; "red" is said of the green one
    assert value["t2i R@1/partial"] == pytest.approx(200 / 3)
    # image 0 finds "red", which is image 1's; image 1 ties at about zero; image 2 finds "blue"
    assert value["i2t R@1/partial"] <= 200 / 3
    assert result.counts == {"queries": 6, "gallery": 3}
    assert "t2i R@1/detailed" in report.format_table([result])


def test_every_caption_table_record_needs_both_kinds():
    table = factory.caption_table(3)
    with pytest.raises(DataError, match="record 1: 1 captions"):
        CaptionBenchmark("x", "val", protocols.CAPTIONS, table, (("a", "b"), ("c",), ("d", "e")))
