"""Published numbers are those of the papers, and shown for the same benchmark only."""

import pytest

from cir_jax.evaluation import benchmarks, published

METHODS = {"image_only", "text_only", "image_text", "palavra", "searle_oti", "searle", "pic2word",
           "lincir", "slerp", "isa", "combiner", "artemis", "compodiff", "magiclens",
           "instruct_pix2pix"}  # fmt: skip


def one(benchmark, split, method, weights_id):
    (row,) = [
        row
        for row in published.rows(benchmark, split, [method], weights_id)
        if row.backbone == published.backbone_of(weights_id)
    ]
    return row.metrics


def test_numbers_are_those_of_the_papers():
    large = "openai/clip-vit-large-patch14@0"
    assert one("circo", "val", "searle", large)["mAP@10"] == 12.12
    assert one("cirr", "test1", "slerp", large)["Rs@1"] == 57.71
    assert one("genecis", "val", "artemis", "path/RN50.pt@0")["R@1"] == 13.52
    captions = published.rows("coco_captions", "test", ["compodiff"])
    assert [r.metrics["t2i ECCV mAP@R"] for r in captions] == [21.46, 20.82]
    assert one("circo:bge_vl", "test", "image_text", "BAAI/BGE-VL-large@0")["mAP@5"] == 39.2
    assert one("cirr", "test1", "image_text", "BGE-VL-base@0")["Rs@1"] == 71.6
    assert one("fashioniq:bge_vl", "val", "image_text", "BGE-VL-base@0")["R@10/dress"] == 26.1
    released = published.rows("circo:magiclens", "test", ["magiclens"], "clip-vit-base-patch16@0")
    assert [r.metrics["mAP@10"] for r in released] == [23.8, 23.2]
    tuned = [r for r in published.rows("circo", "test", ["slerp"], large) if "tat" in r.backbone]
    assert [r.metrics["mAP@5"] for r in tuned] == [18.46]


@pytest.mark.parametrize("paper", published.PAPERS)
def test_rows_are_of_known_benchmarks_and_consistent(paper):
    rows = published.of_paper(paper)
    assert rows and {row.paper for row in rows} == {paper}
    for row in rows:
        entry = benchmarks.find(row.benchmark)
        assert row.split in (entry.split, *entry.counts, *entry.aliases.values())
        assert row.method in METHODS and row.metrics, row
        assert all(0 <= value <= 100 for value in row.metrics.values()), row
        for prefix in ("R@", "Rs@"):  # more images are never worse
            ks = {n[len(prefix) :]: v for n, v in row.metrics.items() if n.startswith(prefix)}
            found = [ks[k] for k in sorted((k for k in ks if k.isdigit()), key=int)]
            assert found == sorted(found), row
        known = set(row.metrics) - {"Avg"}
        for k in (10, 50):  # the average is that of the categories, but for misprints
            parts = [row.metrics.get(f"R@{k}/{name}") for name in ("shirt", "dress", "toptee")]
            if None not in parts:
                assert row.metrics[f"R@{k}"] == pytest.approx(sum(parts) / 3, abs=0.2), row
        for name, printed in row.metrics.items():
            if name == "Avg" and known:
                both = (row.metrics["R@10"] + row.metrics["R@50"]) / 2
                assert printed == pytest.approx(both, abs=0.2), row
            if name.startswith(published.MEAN) and len(known) > 1:
                assert printed == pytest.approx(published.value(row.metrics, name), abs=0.2), row
    runs = [(r.benchmark, r.split, r.method, r.backbone, r.variant, r.note, *r.metrics)
            for r in rows]  # fmt: skip
    assert len(set(runs)) == len(runs)  # a cell stands once


def test_a_mean_is_that_of_what_was_measured():
    metrics = {"R@1": 10.0, "Rs@1": 30.0}
    assert published.value(metrics, "mean(R@1+Rs@1)") == 20.0
    assert published.value(metrics, "R@1") == 10.0
    assert published.value(metrics, "mean(R@1+R@5)") is published.value(metrics, "R@5") is None


def test_ablations_and_quotations_are_shown_to_who_reproduces_the_paper_only():
    of_all = published.of_paper("searle")
    ablated = [row for row in of_all if row.variant]
    assert ablated[0].variant == "L2 loss" and ablated[0].metrics == {"R@10": 16.46, "R@50": 29.04}
    assert ablated[0].table == "4" and ablated[0].source == "searle"
    quoted = [row for row in of_all if row.quoted]
    assert [(row.method, row.table, row.note) for row in quoted] == [
        ("pic2word", "1", "quoted from pic2word")
    ]
    for split in ("val", "test1"):
        shown = published.rows("cirr", split, list(METHODS))
        assert shown and not any(row.variant or row.quoted for row in shown)
    noted = [row for row in published.of_paper("rtd") if row.note]
    assert noted and not any(row.variant for row in noted)


def test_what_is_left_out_is_said_with_its_reason():
    for paper in ("searle", "slerp", "rtd", "isa", "compodiff"):
        left_out = published.read(paper).left_out
        assert left_out
        for one in left_out:
            what, _, why = one.partition(": ")
            assert what.startswith(("Table", "Figure")) and why.endswith("."), one


def test_no_row_for_other_benchmarks_protocols_and_methods():
    assert not published.rows("shapes/circo", "test_0", list(METHODS))
    assert not published.rows("circo (partial)", "val", list(METHODS))
    assert not published.rows("circo:shared_concept", "val", list(METHODS))
    assert not published.rows("circo", "test", list(METHODS), "BAAI/BGE-VL-base@0")
    assert [r.source for r in published.rows("fashioniq:reversed", "val", ["pic2word"])] == [
        "pic2word"
    ]
    assert published.backbone_of("openai/clip-vit-large-patch16@0") == ""
