"""The real benchmarks from their files to numbers and submissions, on the shipped dummy data."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import benchmarks, evaluate, protocols, runner, submissions, validator
from cir_jax.experiment import Experiment
from cir_jax.input.tables import Table
from cir_jax.loading import read_experiment
from data import build
from tests.data.dummies import dummy
from tests.evaluation import worlds

DATASETS = ("circo", "cirr", "fashioniq", "genecis", "coco_object", "coco_captions", "icir")
BESIDE = ("circus", *(("cirr_mbeir", "fashioniq_mbeir") if find_spec("pyarrow") else ()))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with all of them, marked as partial: they are no 123,403 images."""
    folder = tmp_path_factory.mktemp("data")
    for dataset in (*DATASETS, *BESIDE):
        build.prepare(dataset, None, folder, source=dummy(dataset), allow_partial=True)
    return folder


@pytest.fixture(scope="module")
def slerp(tiny):
    backbone, params = tiny
    return evaluate.composers.build("slerp", backbone), {}, {"backbone": params}


NAMES = (
    *("circo", "circo:shared_concept", "circo:bge_vl", "cirr", "cirr:artemis", "cirr:compodiff"),
    "fashioniq",
    *(f"fashioniq:{name}" for name in protocols.VARIANTS["fashioniq"]),
    *("fashioniq:small_gallery+capitalised", "genecis", "coco_object", "coco_captions", "icir"),
    *("cirr:mbeir", "cirr:mbeir+validated", "cirr:validated", "circo:validated+shared_concept"),
    *("fashioniq:mbeir+shortcut_free", "fashioniq:artemis+validated"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_and_variant_gives_its_numbers(name, prepared, slerp):
    if "mbeir" in name:
        pytest.importorskip("pyarrow")
    benchmark = benchmarks.load(name, "", prepared, allow_partial=True)
    assert benchmark.partial and benchmark.name == f"{name} (partial)"
    data = name.partition(":")[0] + ("_mbeir" if "mbeir" in name else "") + "@1.0.0"
    assert benchmark.data == data + ("+circus@1.0.0" if benchmark.protocol.queries != "all" else "")
    result = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1), batch_size=8)
    assert set(result.headline) <= set(result.metrics)
    numbers = [result.metrics[n].value for n in result.headline if "rank" not in n]
    assert all(0 <= value <= 100 for value in numbers) and any(numbers)
    if name in ("fashioniq:artemis", "fashioniq:artemis_words"):
        whole = benchmarks.load("fashioniq", "", prepared, allow_partial=True)
        assert len(benchmark.queries) == 2 * len(whole.queries)
    if name.startswith("cirr") and "mbeir" not in name:
        for query, top in zip(benchmark.queries, result.top, strict=True):
            assert query.reference not in top


@pytest.mark.parametrize("dataset", DATASETS)
def test_partial_data_are_refused_unless_allowed(dataset, prepared):
    marked = Table(prepared, dataset, benchmarks.REGISTRY[dataset].table,
                   benchmarks.REGISTRY[dataset].split).mark()  # fmt: skip
    assert not all(split["complete"] for split in marked["splits"].values())
    with pytest.raises(DataError, match="--allow_partial"):
        benchmarks.load(dataset, "", prepared)


def test_test_splits_give_submissions_of_the_right_form(prepared, slerp, tmp_path):
    for name, files in (("circo", 1), ("cirr", 2)):
        benchmark = benchmarks.load(name, "test", prepared, allow_partial=True)
        assert not benchmark.labelled and benchmark.split == ("test1" if name == "cirr" else "test")
        result = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1))
        paths = submissions.write(result, benchmark, tmp_path)
        assert len(paths) == files and all("partial" in path.name for path in paths)
        for path in paths:
            content, _ = validator.read(path)
            keys = [key for key in content if key not in submissions.HEADER]
            assert keys == [str(query.id) for query in benchmark.queries]
            # shorter than the server wants: there are not enough images
            with pytest.raises(DataError, match="it is wrong"):
                validator.validate(path, validator.prepared(prepared))


def test_names_in_a_submission_are_those_of_the_official_files(prepared, slerp, tmp_path):
    benchmark = benchmarks.load("cirr", "test", prepared, allow_partial=True)
    result = evaluate.evaluate(*slerp, benchmark, mesh=worlds.mesh(1))
    recall, subset = submissions.write(result, benchmark, tmp_path)
    names = [benchmark.gallery[i]["name"].decode() for i in range(len(benchmark.gallery))]
    content, _ = validator.read(recall)
    for query, top in zip(benchmark.queries, result.top, strict=True):
        assert content[str(query.id)] == [names[i] for i in top if i >= 0]
        assert names[query.reference] not in content[str(query.id)]
    content, _ = validator.read(subset)
    for query in benchmark.queries:
        assert {names.index(x) for x in content[str(query.id)]} <= set(query.candidates)


def test_an_attribute_image_is_cut_out_before_it_is_encoded(prepared, slerp):
    benchmark = benchmarks.load("genecis", "", prepared, allow_partial=True)
    crops = [tuple(int(x) for x in benchmark.gallery[i]["crop"]) for i in range(8)]
    assert any(any(crop) for crop in crops) and not all(any(crop) for crop in crops)
    assert {query.category for query in benchmark.queries} >= {"focus_attribute", "change_object"}


def test_missing_ground_truths_of_captions_are_left_out_and_named(
    prepared, slerp, tmp_path, monkeypatch, capsys
):
    shutil.copytree(prepared / "coco_captions", tmp_path / "coco_captions")
    whole = benchmarks.load("coco_captions", "", prepared, allow_partial=True)
    for table in ("cxc", "eccv"):
        shutil.rmtree(tmp_path / "coco_captions" / table)
    monkeypatch.setenv("CIR_JAX_DATA", str(tmp_path))
    benchmark = benchmarks.load("coco_captions", allow_partial=True)
    assert benchmark.absent == ("cxc", "eccv") and whole.absent == ()
    mesh = worlds.mesh(1)
    result, expected = (evaluate.evaluate(*slerp, b, mesh=mesh) for b in (benchmark, whole))
    left = {name for name in expected.metrics if "CxC" not in name and "ECCV" not in name}
    assert result.metrics.keys() == left and len(left) == 12
    assert all(result.metrics[name].value == expected.metrics[name].value for name in left)
    for name in ("published_rows", "print_table", "write_results"):
        monkeypatch.setattr(runner.report, name, lambda *args: [])
    monkeypatch.setattr(runner, "evaluate_with_baselines", lambda *args, **kwargs: [result])
    config = read_experiment("experiments/slerp.py:smoke")
    config.evaluation.benchmarks, config.evaluation.allow_partial = ("coco_captions",), True
    composer, _, frozen = slerp
    runner.run(Experiment(config, mesh, composer.backbone, composer, frozen), {}, tmp_path / "out")
    assert "without the ground truths cxc, eccv: they are not prepared" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "coco_captions" / "original")
    with pytest.raises(DataError, match="no prepared table coco_captions/original"):
        benchmarks.load("coco_captions", "", tmp_path, allow_partial=True)


def test_caption_positions_follow_the_tables(prepared):
    benchmark = benchmarks.load("coco_captions", "", prepared, allow_partial=True)
    table = Table(prepared, "coco_captions", "captions", "test")
    flat = [text for captions in benchmark.captions for text in captions]
    for here, official in enumerate(benchmark.order):
        assert flat[here] == table[int(official)]["text"].decode()
    owner = np.repeat(np.arange(len(benchmark.captions)), list(map(len, benchmark.captions)))
    truth = benchmark.truths["original"]["t2i"]
    for caption, images in zip(truth.queries, truth.targets, strict=True):
        assert images == (owner[caption],)
