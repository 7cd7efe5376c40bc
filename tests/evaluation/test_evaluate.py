"""One evaluation for all benchmarks: protocols, baselines, meshes."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import (
    benchmarks,
    evaluate,
    page,
    protocols,
    published,
    report,
)
from cir_jax.evaluation.result import combine
from cir_jax.input import images
from cir_jax.retrieval import features
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
    (alone,) = evaluate.evaluate_with_baselines(
        *slerp, benchmark, mesh=worlds.mesh(1), method="slerp", alone=True
    )
    assert alone.method == "slerp" and np.array_equal(alone.top, results[-1].top)
    # the image-only baseline finds what is nearest to the reference: itself, were it not removed
    image_only = results[0]
    backbone, params = slerp[0].backbone, slerp[2]["backbone"]
    raw = original(backbone, params, benchmark.gallery, mesh=worlds.mesh(1), normalise=True)
    for query, top in zip(benchmark.queries, image_only.top, strict=True):
        scores = raw @ raw[query.reference]
        scores[query.reference] = -np.inf
        assert scores[top[0]] >= scores.max() - 1e-6


def test_benchmarks_of_about_one_size_share_programs(slerp):
    """14 and 11 queries are batches of 16, and the baselines are the same objects."""
    for queries in (worlds.queries(protocols.CIRR), worlds.queries(protocols.CIRR)[:11]):
        benchmark = worlds.benchmark(protocols.CIRR, queries=queries)
        evaluate.evaluate_with_baselines(*slerp, benchmark, mesh=worlds.mesh(1), method="slerp")
        if len(queries) == 14:
            programs = features._compose.jitted._cache_size()
    assert features._compose.jitted._cache_size() == programs


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
    gallery[7]["name"] = b"000000000033"  # as the authors call it
    with pytest.raises(DataError, match=r"record 7 \(000000000033\): not a readable image"):
        evaluate.evaluate(*oracle, worlds.benchmark(gallery=gallery), mesh=worlds.mesh(1))


@pytest.mark.parametrize("where", ["load", "resize"])
def test_too_little_memory_for_one_image_names_the_record(oracle, where, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise MemoryError
        return original(*args, **kwargs)

    owner = PngImagePlugin.PngImageFile if where == "load" else Image.Image
    original = getattr(owner, where)
    rng = np.random.default_rng(0)
    gallery = [{**record, "image": factory.png(rng)} for record in worlds.gallery()]
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(DataError, match="record [0-9]+: not a readable image .MemoryError: too li"):
        evaluate.evaluate(*oracle, worlds.benchmark(gallery=gallery), mesh=worlds.mesh(1))
    with (
        images.limited(1e-5),
        pytest.raises(
            DataError,
            match="record [0-9]+ has .* the limit is 1e-05. Make it smaller.*--max_megapixels",
        ),
    ):
        evaluate.evaluate(*oracle, worlds.benchmark(), mesh=worlds.mesh(1))


def test_table_and_json(oracle, tmp_path):
    mesh = worlds.mesh(1)
    results = [
        evaluate.evaluate(*oracle, worlds.benchmark(), mesh=mesh, method=name) for name in "ab"
    ]
    row = published.Row("tiles/circo", "val", "paper", "a", "clip_l14", {"mAP@5": 12.3})
    text = report.format_table(results, [row])
    lines = text.splitlines()
    assert "tiles/circo val: 14 queries, 45 gallery images" in lines[0]
    assert protocols.CIRCO.id in lines[1] and "tiny@0" in lines[1]
    assert lines[3].split()[:3] == ["method", "mAP@5", "mAP@10"]
    x = results[0].metrics["mAP@5"]
    assert lines[5].split()[:3] == ["a", f"{x.value:.2f}", f"+-{x.se:.2f}"]
    # never in a row of ours
    assert lines[8:] == ["published:", lines[9]]
    assert lines[9].split()[:5] == ["a", "(paper;", "clip_l14)", "12.30", "-"]
    assert lines[3].split()[-1] == "setting" and lines[5].split()[-1] == results[0].setting_id
    hidden = report.format_table(results, [row, dataclasses.replace(row, split="test1")])
    assert hidden.splitlines()[10].startswith("a (paper; clip_l14; paper, test)  ")
    with pytest.raises(ValueError, match="a published row of circo"):
        report.format_table(results, [dataclasses.replace(row, benchmark="circo")])
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
    setting = first["setting"]
    assert setting["dtype"] == "float32" and "resize=16" in setting["preprocessing"]
    assert first["setting_id"] == results[0].setting_id
    assert whole["published"] == [] and first["partial"] is False and first["seed"] == 0


def test_many_groups_of_a_gallery_are_not_listed(oracle):
    result = evaluate.evaluate(*oracle, worlds.benchmark(), mesh=worlds.mesh(1))

    def first_line(groups):
        counts = {"queries": 9, "gallery": 70} | {f"gallery object {i}": 7 for i in range(groups)}
        text = report.format_table([dataclasses.replace(result, counts=counts)])
        return text.splitlines()[0].partition(";")[0]

    assert first_line(2).endswith("70 gallery images (object 0 7, object 1 7)")
    assert first_line(202).endswith("70 gallery images (in 202 groups)")


def test_composition_gap_is_that_to_the_better_modality(oracle, tmp_path):
    result = evaluate.evaluate(*oracle, worlds.benchmark(), mesh=worlds.mesh(1))

    def of(method, **values):
        found = {n: dataclasses.replace(x, value=values.get(n.replace("@", ""), 7.0))
                 for n, x in result.metrics.items()}  # fmt: skip
        return dataclasses.replace(result, method=method, metrics=found)

    results = [of("image_only", R10=20.0), of("text_only", R10=30.5), of("sum", R10=26.25),
               of("slerp", R10=42.0)]  # fmt: skip
    line = report.format_table(results).splitlines()[-1]
    assert line == "composition gap, R@10 minus that of text_only: sum -4.25, slerp +11.50"
    report.write_results(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())["composition_gaps"]
    assert written[1] == {"benchmark": "tiles/circo", "split": "val", "method": "slerp",
                          "metric": "R@10", "value": 11.5, "over": "text_only"}  # fmt: skip
    # one modality alone says nothing, nor do hidden labels; without R@10 the first number counts
    assert report.composition_gaps(results[1:]) == []
    hidden = [dataclasses.replace(one, metrics={}) for one in results]
    assert report.composition_gaps(hidden) == [] and "gap" not in report.format_table(hidden)
    for one in results:
        del one.metrics["R@10"]
    assert [gap.metric for gap in report.composition_gaps(results)] == ["mAP@5", "mAP@5"]


def test_partial_data_are_marked_in_table_json_picture_and_page(oracle, tmp_path):
    benchmark = worlds.benchmark(name="circo (partial)", partial=True, data="circo@1.0.0")
    result = evaluate.evaluate(*oracle, benchmark, mesh=worlds.mesh(1), method="searle")
    text = report.format_table([result], report.published_rows([result]))
    assert "PARTIAL DATA" in text and "circo (partial) val" in text and "published" not in text
    content = report.to_dict([result])
    assert content["results"][0]["partial"] and content["results"][0]["data"] == "circo@1.0.0"
    assert content["published"] == []
    html = page.page("title", [(benchmark, [result])])
    assert "circo (partial)" in html and "PARTIAL DATA" in html
    whole = dataclasses.replace(result, benchmark="circo", partial=False)
    rows = report.to_dict([whole])["published"]
    assert {row["method"] for row in rows} == {"searle"} and rows[0]["source"]
    # most papers print CIRCO's test split alone; it stands below, under its own name
    assert [row["split"] for row in rows] == sorted((r["split"] for r in rows), reverse=True)
    assert {row["split"] for row in rows} == {"val", "test"}
    text = report.format_table([whole], report.published_rows([whole]))
    assert "paper, test)" in text.splitlines()[-1] and "paper, val)" not in text


def test_a_table_holds_one_benchmark_only(oracle):
    mesh = worlds.mesh(1)
    a = evaluate.evaluate(*oracle, worlds.benchmark(), mesh=mesh)
    b = evaluate.evaluate(*oracle, worlds.benchmark(split="test"), mesh=mesh)
    with pytest.raises(ValueError, match="one table per benchmark"):
        report.format_table([a, b])


def soft_benchmark():
    """CIRR with graded answers: the target in full, another of its colour by half, and the
    reference, as in the official file."""
    made = []
    for query in worlds.queries(protocols.CIRR):
        target = query.targets[0]
        other = next(
            i
            for i in range(45)
            if i % 3 == target % 3 and i not in (target, query.reference, *query.candidates)
        )
        graded = ((query.reference, -1.0), (other, 0.5), (target, 1.0))
        made.append(dataclasses.replace(query, soft=graded))
    artemis = protocols.variant(protocols.CIRR, ["artemis"])
    return worlds.benchmark(artemis, queries=tuple(made))


def test_graded_answers_are_ranked_as_the_released_code_does(slerp):
    benchmark = soft_benchmark()
    result = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1))
    for k in (1, 5, 10):
        best = []
        for query, top in zip(benchmark.queries, result.top, strict=True):
            best.append(max([w for i, w in query.soft if i in top[:k]], default=0))
        assert result.metrics[f"R@{k}"].value == pytest.approx(100 * np.mean(best))
    for k in (1, 2, 3):
        best = []
        for query, top in zip(benchmark.queries, result.top, strict=True):
            members = [i for i in top if i in query.candidates][:k]
            best.append(max([w for i, w in query.soft if i in members], default=0))
        assert result.metrics[f"Rs@{k}"].value == pytest.approx(100 * np.mean(best))
    assert any(0 < result.metrics[name].value < 100 for name in result.headline)


def test_the_small_gallery_ranks_among_the_images_of_the_triplets(slerp):
    small = protocols.variant(protocols.FASHIONIQ, ["small_gallery"])
    queries = tuple(
        dataclasses.replace(query, category="ab"[i % 2])
        for i, query in enumerate(worlds.queries(protocols.FASHIONIQ))
    )
    categories = benchmarks._categories(small, range(45), queries)
    benchmark = worlds.benchmark(small, queries=queries, categories=categories)
    result = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1))
    for name in "ab":
        own = [q for q in queries if q.category == name]
        expected = {q.reference for q in own} | {q.targets[0] for q in own}
        assert benchmark.counts[f"gallery {name}"] == len(expected) < 45
        for query, top in zip(queries, result.top, strict=True):
            if query.category == name:
                assert set(top[top >= 0]) == expected


def test_references_of_their_own_are_squashed(tiny):
    """COCO objects: the query's image comes from another table, and keeps no aspect ratio."""
    backbone, params = tiny
    rng = np.random.default_rng(3)
    buffer = io.BytesIO()
    wide = Image.fromarray(rng.integers(0, 255, (20, 60, 3), np.uint8))
    wide.save(buffer, "PNG")
    reference = {"image": buffer.getvalue()}
    query = worlds.Query(0, 0, ("red and star and blue",), (4,))
    benchmark = worlds.benchmark(
        protocols.COCO_OBJECT, queries=(query,), references=[reference], name="coco_object"
    )
    image_only = evaluate.composers.build("image_only", backbone)
    frozen = {"backbone": params}
    result = evaluate.evaluate(image_only, {}, frozen, benchmark, mesh=worlds.mesh(1))
    pixels = np.asarray(wide.resize((16, 16), Image.Resampling.BICUBIC))[None]
    expected = unit(np.asarray(jax.jit(backbone.encode_image)(params, pixels)))[0]
    gallery = image_features(
        backbone, params, benchmark.gallery, mesh=worlds.mesh(1), normalise=True
    )
    np.testing.assert_allclose(result.scores[0], np.sort(gallery @ expected)[::-1], rtol=1e-4)
    assert result.metrics["mean rank"].value == 1 + result.outcome.target_ranks[0, 0]
    outside = dataclasses.replace(query, reference=1)
    with pytest.raises(DataError, match="reference 1 is outside the table of references of 1"):
        worlds.benchmark(protocols.COCO_OBJECT, queries=(outside,), references=[reference])


def test_inversion_wants_a_pseudo_word_and_has_no_baselines(tiny):
    backbone, params = tiny
    queries = tuple(worlds.Query(i, i, ("",), (i,)) for i in range(45))
    benchmark = worlds.benchmark(protocols.INVERSION, queries=queries, name="shapes/inversion")
    with pytest.raises(ConfigError, match="does not have"):
        evaluate.evaluate_with_baselines(
            evaluate.composers.build("slerp", backbone),
            {},
            {"backbone": params},
            benchmark,
            mesh=worlds.mesh(1),
        )

    class Named(evaluate.composers.composer_class("image_only")):
        """Stands for a perfect inversion."""

        def prompt(self, text):
            return f"a photo of red that {text}" if text else "a photo of red"

    results = evaluate.evaluate_with_baselines(
        Named(backbone), {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1), method="named"
    )
    assert [r.method for r in results] == ["named"]
    assert results[0].metrics["R@1"].value == 100
