"""Metrics against the official code's numbers, and by hand."""

from pathlib import Path

import numpy as np
import pytest

from cir_jax.evaluation import metrics, protocols
from cir_jax.evaluation.protocols import Outcome
from cir_jax.retrieval import ranking
from cir_jax.retrieval.features import unit

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    return dict(np.load(GOLDEN / f"metrics_{name}.npz"))


KS = (5, 10, 25, 50)


def circo_numbers(data):
    """What we measure on the features of a fixture, after comparing the ranking."""
    where = {int(image): i for i, image in enumerate(data["in/index_ids"])}
    targets = np.vectorize(lambda x: where.get(x, -1))(data["in/gt_img_ids"]).astype(np.int32)
    assert (targets[:, 0] == [where[i] for i in data["in/target_img_id"]]).all()
    ranked = ranking.rank(
        unit(data["in/query_features"]),
        unit(data["in/index_features"]),
        k=50,
        targets=targets,
        gallery_block=1000,
        query_block=96,
    )
    np.testing.assert_array_equal(data["in/index_ids"][ranked.top], data["out/top50_ids"])
    aspects = tuple(
        tuple(str(i) for i, on in enumerate(row) if on) for row in data["in/semantic_aspects"]
    )
    count = len(targets)
    outcome = Outcome(ranked.target_ranks, np.full(count, -1), ("",) * count, aspects)
    return protocols.measure(protocols.CIRCO, outcome)


def check_circo(data):
    found = circo_numbers(data)
    for prefix, key in (("mAP", "out/map_at"), ("R", "out/recall_at")):
        ours = [found[f"{prefix}@{k}"].value for k in KS]
        np.testing.assert_allclose(ours, 100 * data[key], rtol=1e-6)
    ours = [found[f"mAP@10/{i}"].value for i in range(9)]
    np.testing.assert_allclose(ours, 100 * data["out/semantic_map_at10"], rtol=1e-6)


def test_circo_equals_the_official_evaluation():
    check_circo(load("circo"))


def test_cirr_equals_the_official_evaluation():
    data = load("cirr")
    query, gallery = unit(data["in/query_features"]), unit(data["in/index_features"])
    target = data["in/target_index"][:, None]
    ranked = ranking.rank(
        query, gallery, k=50, targets=target, exclude=data["in/reference_index"], gallery_block=150
    )
    np.testing.assert_array_equal(ranked.top, data["out/top50_index"])
    np.testing.assert_array_equal(ranked.target_ranks[:, 0], data["out/target_rank"])
    subset = ranking.rank_candidates(query, gallery, data["in/group_members"], target)
    count = len(target)
    outcome = Outcome(ranked.target_ranks, subset.target_ranks[:, 0], ("",) * count, ((),) * count)
    found = protocols.measure(protocols.CIRR, outcome)
    ours = [found[f"R@{k}"].value for k in (1, 5, 10, 50)]
    np.testing.assert_allclose(ours, data["out/recall_at"], rtol=1e-6)
    ours = [found[f"Rs@{k}"].value for k in (1, 2, 3)]
    np.testing.assert_allclose(ours, data["out/group_recall_at"], rtol=1e-6)
    assert found["Avg"].value == pytest.approx((found["R@5"].value + found["Rs@1"].value) / 2)


def test_fashioniq_equals_the_official_evaluation():
    data = load("fashioniq")
    ranked = ranking.rank(
        unit(data["in/query_features"]),
        unit(data["in/index_features"]),
        k=50,
        targets=data["in/target_index"][:, None],
        gallery_block=256,
    )
    np.testing.assert_array_equal(ranked.target_ranks[:, 0], data["out/target_rank"])
    count = len(ranked.top)
    outcome = Outcome(ranked.target_ranks, np.full(count, -1), ("dress",) * count, ((),) * count)
    found = protocols.measure(protocols.FASHIONIQ, outcome)
    ours = [found["R@10"].value, found["R@50"].value]
    np.testing.assert_allclose(ours, data["out/recall_at"], rtol=1e-6)


def test_average_precision_by_hand():
    ranks = np.array([[3, 0, -1], [7, 2, 4], [9, -1, -1]])
    # query 0: hits at 1 and 4; query 1: hits at 3, 5, (8); query 2: hit at 10
    expected5 = [(1 / 1 + 2 / 4) / 2, (1 / 3 + 2 / 5) / 3, 0]
    expected2 = [(1 / 1) / 2, 0, 0]
    expected10 = [(1 / 1 + 2 / 4) / 2, (1 / 3 + 2 / 5 + 3 / 8) / 3, 1 / 10]
    for k, expected in ((2, expected2), (5, expected5), (10, expected10)):
        ours = metrics.average_precision(ranks, k)
        np.testing.assert_allclose(ours, 100 * np.array(expected), rtol=1e-12)


def test_average_precision_divides_by_k_when_there_are_more_ground_truths():
    assert metrics.average_precision(np.array([[0, 1, 2, 30]]), 2)[0] == pytest.approx(100)
    with pytest.raises(ValueError, match="query 1 has no ground truth"):
        metrics.average_precision(np.array([[0], [-1]]), 5)


def test_recall_and_standard_error_by_hand():
    values = metrics.recall(np.array([0, 4, 5, 9]), 5)
    np.testing.assert_array_equal(values, [100, 100, 0, 0])
    found = metrics.estimate(values)
    # sample deviation of (100, 100, 0, 0) is 57.735, over sqrt(4)
    assert (found.value, found.n) == (50, 4) and found.se == pytest.approx(28.8675, abs=1e-4)
    assert np.isnan(metrics.estimate(values[:1]).se)
    with pytest.raises(ValueError, match="rank >= 0"):
        metrics.recall(np.array([0, -1]), 5)


def test_categories_count_the_same_whatever_their_size():
    # "a": 1 of 1 in the top 10 and "b": 1 of 3
    ranks = np.array([[0], [9], [10], [60]])
    outcome = Outcome(ranks, np.full(4, -1), ("a", "b", "b", "b"), ((),) * 4)
    found = protocols.measure(protocols.FASHIONIQ, outcome)
    assert found["R@10/a"].value == 100 and found["R@10/b"].value == pytest.approx(100 / 3)
    assert found["R@10"].value == pytest.approx((100 + 100 / 3) / 2)
    assert found["Avg"].value == pytest.approx((found["R@10"].value + found["R@50"].value) / 2)


def test_best_rank_ignores_padding():
    best = metrics.best_rank(np.array([[4, 2, -1], [-1, -1, -1]]))
    np.testing.assert_array_equal(best, [2, -1])


def test_concatenated_outcomes_measure_as_one():
    def outcome(ranks):
        return Outcome(np.array(ranks), np.full(len(ranks), -1), ("",) * len(ranks), ((),) * 2)

    both = protocols.concatenate([outcome([[0], [3]]), outcome([[1, 5], [2, -1]])])
    np.testing.assert_array_equal(both.target_ranks, [[0, -1], [3, -1], [1, 5], [2, -1]])
    assert protocols.measure(protocols.CIRCO, both)["R@5"].n == 4


def test_the_protocol_id_changes_with_what_moves_the_numbers():
    import dataclasses

    changed = dataclasses.replace(protocols.CIRCO, remove_reference=True)
    assert protocols.CIRCO.id == "circo(gallery=all, reference=kept, captions=single)"
    assert changed.id != protocols.CIRCO.id


def test_fashioniq_captions_are_stripped_and_joined_in_both_orders():
    texts = protocols.FASHIONIQ.join([" is red. ", "no sleeves?, "], "query")
    assert texts == ["is red and no sleeves", "no sleeves and is red"]
    assert protocols.CIRR.join([" kept as it is."], "query") == [" kept as it is."]
    with pytest.raises(Exception, match="record 3: 2 texts, protocol cirr"):
        protocols.CIRR.join(["a", "b"], "record 3")


def test_r_precision_and_map_at_r_by_hand():
    # two ground truths at 0 and 3; three at 1, 2 and 9; one at 0
    ranks = np.array([[0, 3, -1], [9, 1, 2], [0, -1, -1]])
    np.testing.assert_allclose(metrics.r_precision(ranks), [50, 200 / 3, 100])
    # R = 2: only the hit at 0 counts; R = 3: precisions 1/2 and 2/3 at its hits
    expected = [100 * 1 / 2, 100 * (1 / 2 + 2 / 3) / 3, 100]
    np.testing.assert_allclose(metrics.map_at_r(ranks), expected)
    with pytest.raises(ValueError, match="query 1 has no ground truth"):
        metrics.r_precision(np.array([[0], [-1]]))


def test_map_at_r_follows_the_definition_item_by_item():
    rng = np.random.default_rng(0)
    right = [set(rng.permutation(30)[: 1 + i % 9].tolist()) for i in range(40)]
    ranks = np.full((40, 9), -1)
    for line, found in zip(ranks, right, strict=True):
        line[: len(found)] = sorted(found)
    for value, precision, found in zip(
        metrics.map_at_r(ranks), metrics.r_precision(ranks), right, strict=True
    ):
        total = len(found)
        top = [sum(i in found for i in range(r)) / r for r in range(1, total + 1)]
        gains = [p for i, p in enumerate(top) if i in found]
        assert value == pytest.approx(100 * sum(gains) / total)
        assert precision == pytest.approx(100 * top[-1])


def test_graded_answers_score_the_best_grade_in_the_top():
    ranks = np.array([[0, 4, -1], [2, 0, 1], [9, -1, -1]])
    weights = np.array([[0.5, 1.0, 1.0], [0.2, -1.0, 0.5], [1.0, 0, 0]])
    for k, expected in ((1, [50, 0, 0]), (2, [50, 50, 0]), (5, [100, 50, 0]), (10, [100, 50, 100])):
        np.testing.assert_allclose(metrics.soft_score(ranks, weights, k), expected)


def test_graded_answers_count_among_the_first_fifty_only():
    ranks, subset = np.array([[60, 3]]), np.array([[0, 2]])
    graded = protocols.Graded(ranks, subset, np.array([[1.0, 0.5]]))
    outcome = Outcome(np.array([[60]]), np.array([0]), ("",), ((),), graded)
    found = protocols.measure(protocols.variant(protocols.CIRR, ["artemis"]), outcome)
    # the full answer is first in its set, but the ranking is cut before it
    assert found["Rs@1"].value == 0 and found["Rs@3"].value == 50 and found["R@5"].value == 50
    assert found["Avg"].value == pytest.approx((50 + 0) / 2)
    both = protocols.concatenate([outcome, outcome])
    assert protocols.measure(protocols.variant(protocols.CIRR, ["artemis"]), both)["R@5"].n == 2


def test_mean_and_median_ranks_count_from_one():
    ranks = np.array([0, 1, 4, 9])
    assert metrics.mean_rank(ranks).value == pytest.approx(4.5)
    assert metrics.median_rank(ranks).value == 3  # floor(2.5) + 1, as the released code
    outcome = Outcome(ranks[:, None], np.full(4, -1), ("",) * 4, ((),) * 4)
    found = protocols.measure(protocols.COCO_OBJECT, outcome)
    assert found["mean rank"].value == pytest.approx(4.5) and found["R@5"].value == 75


def test_ties_go_to_the_lowest_position_before_metrics_see_them():
    # all scores are equal: ground truths at positions 1 and 4 have ranks 1 and 4
    query, gallery = np.ones((1, 2), np.float32), np.ones((6, 2), np.float32)
    ranked = ranking.rank(unit(query), unit(gallery), k=6, targets=np.array([[4, 1]], np.int32))
    np.testing.assert_array_equal(ranked.target_ranks, [[4, 1]])
    expected = 100 * (1 / 2 + 2 / 5) / 2
    assert metrics.average_precision(ranked.target_ranks, 5)[0] == pytest.approx(expected)


REAL = Path(__file__).resolve().parents[3] / "shared" / "annotations" / "golden_real"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the official annotations are not here")
def test_circo_val_annotations_give_the_official_numbers():
    data = dict(np.load(REAL / "metrics_circo_val.npz"))
    check_circo(data)
    ours = circo_numbers(data)
    np.testing.assert_allclose([ours[f"mAP@{k}"].value for k in KS], data["out/searle_map_at_pct"])
    ours = [ours[f"R@{k}"].value for k in KS]
    np.testing.assert_allclose(ours, data["out/searle_recall_at_pct"], rtol=1e-6)


def of_several(seed):
    """Random ranks of one to five targets each, padded, unsorted."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(40, size=rng.integers(1, 6), replace=False) for _ in range(60)]
    table = np.full((60, 5), metrics.PAD)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return rows, table


def trec_ndcg(right, k):
    """trec_eval's ndcg_cut of a run in which the documents `right` are the relevant ones."""
    gains = [1.0 if rank in right else 0.0 for rank in range(k)]
    ideal = [1.0] * min(k, len(right)) + [0.0] * max(0, k - len(right))

    def dcg(values):
        return sum(value / np.log2(i + 2) for i, value in enumerate(values))

    return 100 * dcg(gains) / dcg(ideal)


def oxford_ap(right):
    """What i-CIR's released code computes of the sorted ranks of the right answers."""
    area = 0.0
    for found, rank in enumerate(sorted(right)):
        before = 1.0 if rank == 0 else found / rank
        area += (before + (found + 1) / (rank + 1)) * (1 / (len(right) + 1e-5)) / 2
    return 100 * area


@pytest.mark.parametrize("seed", [0, 1])
def test_ndcg_and_area_are_those_of_the_official_code(seed):
    rows, table = of_several(seed)
    for k in (1, 3, 10):
        expected = [trec_ndcg(set(row), k) for row in rows]
        np.testing.assert_allclose(metrics.ndcg(table, k), expected, rtol=1e-12)
    expected = [oxford_ap(row) for row in rows]
    np.testing.assert_allclose(metrics.trapezoid_precision(table), expected, rtol=1e-12)


def test_ndcg_and_area_by_hand():
    ranks = np.asarray([[0, -1], [1, 0], [2, -1], [10, 1]])
    np.testing.assert_allclose(
        metrics.ndcg(ranks, 10), [100, 100, 50, 100 * np.log(2) / np.log(3) / 1.63092975357], 1e-9
    )
    areas = [1, 1, (0 + 1 / 3) / 2, ((0 + 1 / 2) / 2 + (1 / 10 + 2 / 11) / 2) / 2]
    np.testing.assert_allclose(metrics.trapezoid_precision(ranks), 100 * np.asarray(areas), 2e-5)
    for metric in (lambda r: metrics.ndcg(r, 10), metrics.trapezoid_precision):
        with pytest.raises(ValueError, match="query 1 has no ground truth"):
            metric(np.asarray([[0], [-1]]))


def test_m_beir_counts_any_right_answer_and_i_cir_all():
    outcome = Outcome(
        np.asarray([[30, 4], [7, -1]]), np.full(2, -1), ("a", "b"), ((), ())
    )  # fmt: skip
    mbeir = protocols.variant(protocols.CIRR, ["mbeir"])
    numbers = protocols.measure(mbeir, outcome)
    assert mbeir.headline == ("R@1", "R@5", "R@10", "R@50", "nDCG@10")
    assert [numbers[f"R@{k}"].value for k in (1, 5, 10, 50)] == [0, 50, 100, 100]
    assert numbers["nDCG@10"].value == metrics.ndcg(outcome.target_ranks, 10).mean()
    strict = protocols.measure(protocols.CIRCO, outcome)
    assert strict["R@10"].value == 50  # the single target
    area = protocols.measure(protocols.ICIR, outcome)
    assert protocols.ICIR.headline == ("mAP",)
    assert area["mAP"].value == metrics.trapezoid_precision(outcome.target_ranks).mean()
