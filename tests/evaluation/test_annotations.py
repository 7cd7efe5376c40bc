"""The official annotations through evaluation and submissions, with made-up features."""

import json
from pathlib import Path

import numpy as np
import pytest

from cir_jax.evaluation import benchmarks, evaluate, submissions, validator
from data import benchmark as builders
from data.circo import circo_dataset_builder as circo
from data.cirr.cirr_dataset_builder import Cirr
from data.fashioniq.fashioniq_dataset_builder import Fashioniq
from data.genecis.genecis_dataset_builder import Genecis
from data.official import facts
from tests import tiny as factory
from tests.evaluation import worlds

ANNOTATIONS = Path(__file__).resolve().parents[3] / "shared" / "annotations"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the official annotations are not here"),
]
BUILDERS = {"cirr": Cirr, "fashioniq": Fashioniq, "genecis": Genecis}


@pytest.fixture(scope="module")
def image():
    return factory.png(np.random.default_rng(0))


@pytest.fixture
def tables(monkeypatch, image, tmp_path):
    """Tables as the builders make them, of images that are all the same."""
    made = {}

    def table(directory, dataset, name, split):
        key = (dataset, "val" if split == "unlabeled" else split)
        if key not in made:
            raw = raw_of(dataset, key[1])
            builders.check(raw)
            pictures = [
                {"name": p.name.encode(), "image": image, "categories": list(p.categories)}
                for p in raw.pictures
            ]
            records, lost = builders.resolve(
                raw.questions, {p.key: i for i, p in enumerate(raw.pictures)}
            )
            assert not any(lost.values())
            made[key] = {"queries": records, "gallery": pictures}
        found = factory.MemoryTable(made[key][name], f"{dataset} {name} {split}")
        found.identity = lambda: f"{key} {name}"
        return found

    monkeypatch.setattr(benchmarks, "Table", table)
    monkeypatch.setattr(validator, "Table", table)
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def raw_of(dataset, split):
    if dataset != "circo":
        return BUILDERS[dataset].read(ANNOTATIONS / dataset, split)
    # the list of 123,403 images is no annotation: those that are named, and made-up ones
    entries = json.loads((ANNOTATIONS / "circo" / f"{split}.json").read_text())
    questions = [circo._question(e, f"{split} {i}", split == "val") for i, e in enumerate(entries)]
    named = dict.fromkeys(x for q in questions for x in (q.reference, *q.targets))
    rest = [str(i) for i in range(1, 200000) if str(i) not in named][: 123403 - len(named)]
    names = sorted([*named, *rest], key=int)
    pictures = [builders.Picture(n, n, Path(n)) for n in names]
    return builders.Raw(pictures, questions, Path("image_info_unlabeled2017.json"))


def result_of(name, split, tiny):
    """The benchmark with random features for its images."""
    backbone, params = tiny
    benchmark = benchmarks.load(name, split)
    raw = np.random.default_rng(1).normal(size=(len(benchmark.gallery), backbone.dim))
    composer = evaluate.composers.build("image_text", backbone)
    result = evaluate.evaluate(
        composer,
        {},
        {"backbone": params},
        benchmark,
        mesh=worlds.mesh(1),
        image_features=raw.astype(np.float32),
        batch_size=512,
    )
    return benchmark, result


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("circo", {"queries": 220, "gallery": 123403}),
        ("circo:shared_concept", {"queries": 220, "gallery": 123403}),
        ("cirr", {"queries": 4181, "gallery": 2297}),
        ("cirr:artemis", {"queries": 4181, "gallery": 2297}),
        ("fashioniq", {"queries": 6016, "gallery": 15415, "gallery dress": 3817}),
        ("genecis", {"queries": 3920}),  # two of the four tasks are here
        ("fashioniq:small_gallery", {"gallery dress": 2628, "gallery shirt": 3089}),
    ],
)
def test_official_annotations_of_val_are_evaluated(name, counts, tables, tiny):
    benchmark, result = result_of(name, "", tiny)
    assert not benchmark.partial and counts.items() <= benchmark.counts.items()
    assert set(result.headline) <= set(result.metrics)
    if name == "genecis":
        per_task = {n: result.metrics[f"R@1/{n}"].n for n in ("focus_object", "change_object")}
        assert per_task == {"focus_object": 1960, "change_object": 1960}
        assert abs(result.metrics["R@1"].value - 100 / 15) < 2  # random features: chance
    if name == "circo":
        assert sum(len(q.targets) for q in benchmark.queries) == 916
        assert len({a for q in benchmark.queries for a in q.aspects}) == 9


@pytest.mark.parametrize(("name", "files"), [("circo", 1), ("cirr", 2)])
def test_official_annotations_of_test_give_valid_submissions(name, files, tables, tiny):
    benchmark, result = result_of(name, "test", tiny)
    assert not benchmark.labelled
    paths = submissions.write(result, benchmark, tables)
    assert len(paths) == files
    for path in paths:
        line = validator.validate(path, validator.prepared(tables)).text
        assert f"compared with the prepared {benchmark.split} split" in line, line


def test_official_examples_of_submissions_are_valid_annotations(tables):
    """With the annotations alone, and with tables; the lists of images of CIRCO are not here."""
    cirr, circo = ANNOTATIONS / "cirr", ANNOTATIONS / "circo"
    for kind in ("recall", "recall_subset"):
        file = cirr / f"submission_example_{kind}.json"
        for known in (validator.prepared(tables), facts(cirr)):
            assert validator.validate(file, known).kind == "accepted"
    for split, kind in (("val", "local"), ("test", "accepted")):
        file = circo / f"submission_example_{split}.json"
        verdict = validator.validate(file, facts(circo))
        assert verdict.kind == kind and ("mAP@5" in verdict.metrics) == (split == "val")


def test_what_the_official_script_retrieves_on_val_scores_as_it_says(tmp_path):
    golden = np.load(ANNOTATIONS / "golden_real" / "metrics_circo_val.npz")
    path = tmp_path / "searle.json"
    lists = {str(i): [str(x) for x in row] for i, row in enumerate(golden["out/top50_ids"])}
    path.write_text(json.dumps(lists, sort_keys=True))
    metrics = validator.validate(path, facts(ANNOTATIONS / "circo")).metrics
    for name, where in (("mAP", "map_at"), ("R", "recall_at")):
        ours = [metrics[f"{name}@{k}"].value for k in (5, 10, 25, 50)]
        np.testing.assert_allclose(ours, 100 * golden[f"out/{where}"], rtol=1e-6)
