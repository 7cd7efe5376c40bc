"""Captions and images find each other: the embedded world's protocol, and COCO's."""

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import captions, evaluate, protocols, report
from cir_jax.evaluation.queries import CaptionBenchmark, Truth
from cir_jax.retrieval.features import unit
from tests import tiny as factory
from tests.evaluation import worlds


def test_caption_retrieval_finds_the_colour(tiny):
    backbone, params = tiny
    rng = np.random.default_rng(0)
    records = [{"image": worlds.tile(rng, c)} for c in (0, 1, 2)]
    texts = (("a red star", "star"), ("a green star", "red"), ("a blue circle", "blue"))
    benchmark = CaptionBenchmark("tiles/captions", "val", protocols.CAPTIONS, records, texts)
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


def coco_benchmark(rng, images=10):
    """Two captions per image, listed in an official order that is not ours."""
    captions = tuple((f"{i}a", f"{i}b") for i in range(images))
    owner = np.repeat(np.arange(images), 2)
    own = [tuple(np.flatnonzero(owner == i).tolist()) for i in range(images)]
    original = {
        "t2i": Truth(np.arange(2 * images), tuple((int(i),) for i in owner)),
        "i2t": Truth(np.arange(images), tuple(own)),
    }
    more = {
        "t2i": Truth(np.arange(4), ((0, 3, 5), (1,), (1, 2), (0, 9))),
        "i2t": Truth(np.asarray([2, 7]), ((4, 5, 0), (1, 14))),
    }
    # folds are of whole images: captions 2i and 2i + 1 stay neighbours
    order = rng.permutation(images).repeat(2) * 2 + np.tile([0, 1], images)
    official = np.empty(2 * images, np.int64)
    official[order] = np.arange(2 * images)
    return CaptionBenchmark(
        "coco_captions",
        "test",
        protocols.COCO_CAPTIONS,
        [{"image": b""}] * images,
        captions,
        truths={"original": original, "cxc": more, "eccv": more},
        order=official,
    ), owner.astype(np.int32)


def test_coco_captions_are_measured_as_the_package_does():
    rng = np.random.default_rng(5)
    benchmark, owner = coco_benchmark(rng)
    images = unit(rng.normal(size=(10, 6)).astype(np.float32))
    texts = unit(images[owner] + 0.9 * rng.normal(size=(20, 6)).astype(np.float32))
    found, headline, _ = captions.coco_metrics(benchmark, texts, images, owner)
    scores = {"t2i": texts @ images.T, "i2t": images @ texts.T}

    def retrieved(direction, query, allowed=None):
        order = np.argsort(-scores[direction][query], kind="stable")
        return [int(i) for i in order if allowed is None or i in allowed]

    for direction in ("i2t", "t2i"):
        for table, name in (("original", "COCO 5k"), ("cxc", "CxC")):
            truth = benchmark.truths[table][direction]
            for k in (1, 5, 10):
                hits = [
                    bool(set(retrieved(direction, q)[:k]) & set(t))
                    for q, t in zip(truth.queries, truth.targets, strict=True)
                ]
                expected = 100 * np.mean(hits)
                assert found[f"{direction} {name} R@{k}"].value == pytest.approx(expected)
        truth = benchmark.truths["eccv"][direction]
        precision = [
            len(set(retrieved(direction, q)[: len(t)]) & set(t)) / len(t)
            for q, t in zip(truth.queries, truth.targets, strict=True)
        ]
        assert found[f"{direction} ECCV R-P"].value == pytest.approx(100 * np.mean(precision))
    position = np.argsort(benchmark.order)  # official number -> our position
    for k in (1, 5):
        recalls = {"t2i": [], "i2t": []}
        for fold in range(5):
            mine = [int(i) for i in position[4 * fold : 4 * fold + 4]]
            here = {int(owner[i]) for i in mine}
            recalls["t2i"].append(
                np.mean([owner[q] in retrieved("t2i", q, here)[:k] for q in mine])
            )
            recalls["i2t"].append(
                np.mean([any(owner[c] == i for c in retrieved("i2t", i, mine)[:k]) for i in here])
            )
        for direction, values in recalls.items():
            expected = 100 * np.mean(values)
            assert found[f"{direction} COCO 1k R@{k}"].value == pytest.approx(expected)
    assert "i2t ECCV mAP@R" in headline and not any("1k" in name for name in headline)
