"""Blocked ranking equals the dense one, ties and exclusions included."""

import numpy as np
import pytest

from cir_jax.errors import CirError
from cir_jax.retrieval import ranking


def dense(scores, k, targets, exclude=None, allowed=None):
    """The definition: a stable sort of all scores."""
    top, ranks = [], []
    for i, row in enumerate(scores):
        order = [
            j
            for j in np.argsort(-row, kind="stable")
            if (exclude is None or j != exclude[i]) and (allowed is None or allowed[i][j])
        ]
        top.append([*order, *[-1] * k][:k])
        ranks.append([order.index(t) if t >= 0 else -1 for t in targets[i]])
    return np.array(top), np.array(ranks)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    # small integers: products are exact, and most scores are tied
    queries = rng.integers(-2, 3, (13, 4)).astype(np.float32)
    gallery = rng.integers(-2, 3, (101, 4)).astype(np.float32)
    targets = np.stack([rng.choice(101, 3, replace=False) for _ in queries]).astype(np.int32)
    targets[::2, 1:] = -1
    return queries, gallery, targets


@pytest.mark.parametrize(("gallery_block", "query_block"), [(17, 5), (101, 13), (1000, 1), (3, 4)])
def test_blocked_ranks_are_the_dense_ranks(data, gallery_block, query_block):
    queries, gallery, targets = data
    top, ranks = dense(queries @ gallery.T, 20, targets)
    assert any(len(set(row)) < 20 for row in queries @ gallery.T)  # there are ties
    found = ranking.rank(
        queries,
        gallery,
        k=20,
        targets=targets,
        gallery_block=gallery_block,
        query_block=query_block,
    )
    np.testing.assert_array_equal(found.top, top)
    np.testing.assert_array_equal(found.target_ranks, ranks)


def test_a_gallery_that_does_not_stay_on_the_device_ranks_the_same(data, monkeypatch):
    queries, gallery, targets = data
    options = dict(k=9, targets=targets, gallery_block=17, query_block=5)
    sent = ranking.rank(queries, gallery, **options)  # by block: this is a CPU
    monkeypatch.setattr(ranking, "SCORE_BYTES", 4 * 5 * 6)  # six images at a time
    fewer = ranking.rank(queries, gallery, **options)
    monkeypatch.setattr(ranking.jax, "default_backend", lambda: "gpu")
    kept = ranking.rank(queries, gallery, **options)
    monkeypatch.setattr(ranking, "RESIDENT_BYTES", 0)
    large = ranking.rank(queries, gallery, **options)
    for ours, *others in zip(sent, fewer, kept, large, strict=True):
        for theirs in others:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [1, -1])
def test_ranks_are_exact_where_the_last_bit_of_a_target_differs(data, bits, monkeypatch):
    """Its score is computed once alone and once in its block; the latter counts."""
    queries, gallery, targets = data
    top, ranks = dense(queries @ gallery.T, 20, targets)
    alone, passes = ranking._target_scores, []

    def other(*arguments):
        return np.nextafter(alone(*arguments), np.float32(bits * np.inf))

    def counted(*arguments):
        passes.append(1)
        return once(*arguments)

    once = ranking._pass
    monkeypatch.setattr(ranking, "_pass", counted)
    options = dict(k=20, targets=targets, gallery_block=17, query_block=5)
    ranking.rank(queries, gallery, **options)
    assert len(passes) == 3  # blocks of queries: the gallery passes once for each
    monkeypatch.setattr(ranking, "_target_scores", other)
    found = ranking.rank(queries, gallery, **options)
    np.testing.assert_array_equal(found.target_ranks, ranks)
    np.testing.assert_array_equal(found.top, top)
    assert len(passes) == 3 + 6


def test_equal_images_tie_wherever_they_lie():
    """Of many dimensions and in other blocks: the order of equal images is their position's."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((90, 300)).astype(np.float32)
    same = [3, 16, 17, 40, 41, 64, 89]
    gallery[same] = gallery[3]
    queries = rng.standard_normal((5, 300)).astype(np.float32)
    targets = np.tile(np.asarray(same, np.int32), (5, 1))
    for block in (17, 64, 90):
        found = ranking.rank(queries, gallery, k=90, targets=targets, gallery_block=block)
        for row, ranks in zip(found.top, found.target_ranks, strict=True):
            assert ranks.tolist() == list(range(ranks[0], ranks[0] + len(same)))
            assert row[ranks].tolist() == same


def test_reference_and_other_categories_are_not_ranked(data):
    queries, gallery, targets = data
    targets = targets[:, :1]
    exclude = np.asarray([(t + 1) % 101 for t in targets[:, 0]], np.int32)
    members = np.stack([np.arange(101) % 2 == 0, np.arange(101) < 70])
    groups = np.asarray([0 if t % 2 == 0 else 1 for t in targets[:, 0]], np.int32)
    members[1, targets[groups == 1, 0]] = True
    top, ranks = dense(queries @ gallery.T, 101, targets, exclude, members[groups])
    found = ranking.rank(
        queries,
        gallery,
        k=500,
        targets=targets,
        exclude=exclude,
        groups=groups,
        members=members,
        gallery_block=30,
    )
    np.testing.assert_array_equal(found.top, top)
    np.testing.assert_array_equal(found.target_ranks, ranks)
    assert (found.top == -1).any() and np.isneginf(found.scores[found.top == -1]).all()


def test_equal_scores_are_ordered_by_gallery_position():
    gallery = np.array([[0, 1], [1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    query = np.array([[1, 0]], np.float32)
    targets = np.array([[4, 1, 0]], np.int32)
    for block in (1, 2, 5):
        found = ranking.rank(query, gallery, k=5, targets=targets, gallery_block=block)
        assert found.top.tolist() == [[1, 2, 4, 0, 3]]
        assert found.target_ranks.tolist() == [[2, 0, 3]]
    short = ranking.rank_candidates(query, gallery, np.array([[4, 0, 2]]), targets[:, :1])
    assert short.top.tolist() == [[2, 4, 0]] and short.target_ranks.tolist() == [[1]]


def test_candidates_of_different_number():
    gallery = np.eye(4, dtype=np.float32)
    queries = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], np.float32)
    candidates = np.array([[0, 2, 3], [3, 1, -1]], np.int32)
    found = ranking.rank_candidates(queries, gallery, candidates, np.array([[2], [3]], np.int32))
    assert found.top.tolist() == [[3, 2, 0], [1, 3, -1]]
    assert found.target_ranks.tolist() == [[1], [1]]
    with pytest.raises(ValueError, match="query 1: its target is no candidate"):
        ranking.rank_candidates(queries, gallery, candidates, np.array([[2], [0]], np.int32))


def euclidean(params, queries, gallery):
    return -params * ((queries[:, None, :] - gallery[None, :, :]) ** 2).sum(-1)


def test_a_score_of_the_composers_own_decides(data):
    queries, gallery, targets = data
    scores = -((queries[:, None] - gallery[None]) ** 2).sum(-1)
    top, ranks = dense(scores, 7, targets)
    assert (top != dense(queries @ gallery.T, 7, targets)[0]).any()
    options = dict(score=euclidean, params=np.float32(2))
    found = ranking.rank(queries, gallery, k=7, targets=targets, gallery_block=40, **options)
    np.testing.assert_array_equal(found.top, top)
    np.testing.assert_array_equal(found.target_ranks, ranks)
    candidates = np.tile(np.arange(101, dtype=np.int32), (13, 1))
    short = ranking.rank_candidates(queries, gallery, candidates, targets, **options)
    np.testing.assert_array_equal(short.top[:, :7], top)
    np.testing.assert_array_equal(short.target_ranks, ranks)


def test_numbers_that_are_not_finite_are_errors(data):
    queries, gallery, targets = (x.copy() for x in data)
    queries[3, 1] = np.nan
    with pytest.raises(CirError, match="query features: row 3 is not finite"):
        ranking.rank(queries, gallery, k=3)
    with pytest.raises(ValueError, match="query 0: its target is not ranked"):
        ranking.rank(data[0], gallery, k=3, targets=targets, exclude=targets[:, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_gallery_that_is_held_ranks_as_it_did_before(dtype, monkeypatch):
    monkeypatch.setattr(ranking, "HELD_BLOCK", 64)
    rng = np.random.default_rng(3)
    gallery = rng.normal(size=(150, 8)).astype(dtype)
    gallery[120] = gallery[7]  # equal scores, in different blocks
    queries = rng.normal(size=(1, 8)).astype(np.float32)
    ranked = rng.random((1, 150)) < 0.7
    ranked[:, [7, 120]] = True
    pieces = (gallery[start : start + 40] for start in range(0, 150, 40))
    held = ranking.Held(pieces, 170)
    assert (
        len(held) == 150
        and len(held.blocks) == 3
        and {block.dtype for block in held.blocks} == {np.dtype(dtype)}
    )
    for members in (None, ranked):
        found = ranking.rank(queries, held, k=150, members=members)
        whole = ranking.rank(queries, gallery.astype(np.float32), k=150, members=members)
        np.testing.assert_array_equal(found.top, whole.top)
        np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-6)
        place = [int(np.flatnonzero(found.top[0] == row)[0]) for row in (7, 120)]
        assert place[1] == place[0] + 1


def test_what_cannot_be_held():
    rows = np.ones((5, 2), np.float16)
    rows[4, 0] = np.inf
    with pytest.raises(CirError, match="gallery features: row 9 is not finite"):
        ranking.Held([np.ones((5, 2), np.float16), rows], 10)
    held = ranking.Held([np.ones((5, 2), np.float16)], 5)
    with pytest.raises(ValueError, match="targets are not looked for"):
        ranking.rank(np.ones((1, 2), np.float32), held, k=1, targets=np.zeros((1, 1), np.int32))
