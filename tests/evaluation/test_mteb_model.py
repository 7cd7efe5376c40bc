"""mteb's code, which knows nothing of ours, ranks and measures as we do."""

import dataclasses

import numpy as np
import pytest

import cir_jax
from cir_jax import composers
from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import benchmarks, evaluate, metrics, mteb_model, protocols, trec
from cir_jax.retrieval.search import Searcher
from data import build
from tests.evaluation import worlds

KS = (1, 3, 5, 10, 20)


@pytest.fixture(scope="module")
def mteb(tmp_path_factory):
    pytest.importorskip("mteb", reason="mteb is not installed: pip install 'cir_jax[mteb]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTEB_CACHE", str(tmp_path_factory.mktemp("mteb")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import mteb

        yield mteb


def searcher(tiny, name, **settings):
    backbone, params = tiny
    if name == "oracle":
        composer = worlds.ColourOracle(backbone)
    else:
        composer = composers.build(name, backbone, **settings)
    return Searcher(composer, {}, {"backbone": params}, mesh=worlds.mesh(1), batch_size=16)


def ours(own, benchmark):
    return evaluate.evaluate(own.composer, own.params, own.frozen, benchmark, mesh=own.mesh,
                             batch_size=16)  # fmt: skip


def theirs(mteb, own, benchmark):
    """Scores of mteb's code, which rounds to five digits."""
    model = mteb_model.MtebModel(own)
    found = mteb.evaluate(
        model, mteb_model.task(benchmark), cache=None, show_progress_bar=False, co2_tracker=False,
        encode_kwargs={"batch_size": 16, "show_progress_bar": False},
    )  # fmt: skip
    (result,) = found.task_results
    assert result.task_name == f"{benchmark.name} {benchmark.split}"
    ((scores,),) = result.scores.values()
    return scores


def with_copies(benchmark):
    """A third of the gallery thrice: scores that are equal."""
    gallery = [benchmark.gallery[i % 15] for i in range(45)]
    return dataclasses.replace(benchmark, gallery=gallery)


@pytest.mark.parametrize("name", ("oracle", "slerp"))
@pytest.mark.parametrize("copies", (False, True))
def test_mteb_measures_what_we_measure_of_several_ground_truths(mteb, tiny, name, copies):
    benchmark, own = worlds.benchmark(protocols.CIRCO), searcher(tiny, name)
    benchmark = with_copies(benchmark) if copies else benchmark
    scores, result = theirs(mteb, own, benchmark), ours(own, benchmark)
    expected = trec.scores(result.outcome.target_ranks, KS)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=6e-6)
    assert len(set(expected.values())) > 3  # not all right, nor all wrong
    # no query has more than five ground truths: so far both divide alike
    circo = result.metrics["mAP@5"].value / 100
    assert circo == pytest.approx(scores["map_at_5"], abs=6e-6)
    if name == "oracle":  # one in k: CIRCO's is whole, trec_eval's a share
        first = metrics.average_precision(result.outcome.target_ranks, 1)
        assert first.mean() / 100 > scores["map_at_1"] + 0.01


@pytest.mark.slow
def test_mteb_measures_what_we_measure_in_the_embedded_world(mteb, tmp_path):
    build.prepare("shapes_tiny", ["gallery", "circo"], tmp_path)
    benchmark, own = benchmarks.load("shapes_tiny/circo", data_dir=tmp_path), cir_jax.load("slerp")
    scores, result = theirs(mteb, own, benchmark), ours(own, benchmark)
    expected = trec.scores(result.outcome.target_ranks, KS)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=6e-6)
    assert 0.1 < scores["ndcg_at_10"] < 0.9


@pytest.mark.parametrize("protocol", (protocols.CIRR, protocols.GENECIS))
def test_mteb_gives_recall_as_we_print_it_of_one_ground_truth(mteb, tiny, protocol):
    """Without the reference, and among a query's own candidates."""
    protocol = dataclasses.replace(protocol, by_category=False)
    benchmark, own = worlds.benchmark(protocol), searcher(tiny, "slerp")
    scores, result = theirs(mteb, own, benchmark), ours(own, benchmark)
    compared = [k for k in protocol.recall if k in KS]
    for k in compared:
        assert 100 * scores[f"recall_at_{k}"] == pytest.approx(
            result.metrics[f"R@{k}"].value, abs=1e-3
        )
    expected = trec.scores(result.outcome.target_ranks, KS)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=6e-6)
    assert 0 < scores["ndcg_at_20"] < 1 and len(compared) > 1


def test_a_model_says_what_it_is_and_equal_revisions_are_equal_models(mteb, tiny):
    from mteb.models import EncoderProtocol

    model = mteb_model.MtebModel(searcher(tiny, "slerp"))
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert meta.name == "cir_jax/slerp" and meta.framework == ["JAX"]
    assert meta.modalities == ["text", "image"] and meta.embed_dim == 24
    assert meta.n_parameters > 1000 and meta.similarity_fn_name.value == "cosine"
    revisions = {
        mteb_model.MtebModel(own).mteb_model_meta.revision
        for own in (
            searcher(tiny, "slerp"),
            searcher(tiny, "slerp"),
            searcher(tiny, "slerp", alpha=0.4),
            searcher((dataclasses.replace(tiny[0], weights_id="x@1"), tiny[1]), "slerp"),
        )
    }
    assert len(revisions) == 3
    named = mteb_model.MtebModel(searcher(tiny, "slerp"), name="me/mine")
    assert named.mteb_model_meta.name == "me/mine"


def test_the_methods_own_score_is_mtebs_similarity(mteb, tiny, monkeypatch):
    own = searcher(tiny, "slerp")
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 24)).astype(np.float32) for n in (7, 9))
    np.testing.assert_allclose(mteb_model.MtebModel(own).similarity(a, b), a @ b.T, rtol=1e-5)

    class Distance(type(own.composer)):
        def score(self, params, query, gallery):
            return -((query[:, None] - gallery[None]) ** 2).sum(-1) + params["shift"]

    own.composer.__class__ = Distance
    own.params = {"shift": np.float32(3)}
    monkeypatch.setattr(mteb_model.ranking, "QUERY_BLOCK", 3)
    monkeypatch.setattr(mteb_model.ranking, "GALLERY_BLOCK", 4)
    model = mteb_model.MtebModel(own)
    assert model.mteb_model_meta.similarity_fn_name is None
    expected = 3 - ((a[:, None] - b[None]) ** 2).sum(-1)
    np.testing.assert_allclose(model.similarity(a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(model.similarity_pairwise(a, b[:7]), np.diag(expected), rtol=1e-5)


def loader(rows):
    datasets = pytest.importorskip("datasets")
    from torch.utils.data import DataLoader

    described = {name: datasets.Value("string") for name in rows}
    if "image" in rows:
        described["image"] = datasets.Image()
    return DataLoader(datasets.Dataset.from_dict(rows, features=datasets.Features(described)))


def test_queries_are_those_without_mtebs_instruction(mteb, tiny, tmp_path):
    """And images are read from files, where the dataset has only their paths."""
    own = searcher(tiny, "slerp")
    model = mteb_model.MtebModel(own)
    images = [record["image"] for record in worlds.gallery(3)]
    (tmp_path / "a.png").write_bytes(images[0])
    stored = [{"bytes": None, "path": str(tmp_path / "a.png")}, *({"bytes": x} for x in images[1:])]
    what = dict(task_metadata=mteb_model.task(worlds.benchmark()).metadata, hf_split="test",
                hf_subset="default", prompt_type="query", batch_size=2)  # fmt: skip
    rows = {"image": stored, "query": ["make it red", "is blue", "no star"]}
    told = {**rows, "text": [f"{x} Find a photo." for x in rows["query"]]}
    found = model.encode(loader(told), **what)
    for i, text in enumerate(rows["query"]):
        pixels = np.asarray(worlds.Image.open(worlds.io.BytesIO(images[i])))
        np.testing.assert_allclose(found[i], own.query(pixels, text)[0], atol=1e-6)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="a.png: cannot be read"):
        model.encode(loader(told), **what)
    for wrong, kind in (({"text": ["a"]}, "query"), ({"image": stored}, "query"),
                        ({"image": stored, "text": ["a"] * 3}, "document")):  # fmt: skip
        with pytest.raises(ConfigError, match='tiles/circo val: .* of .*tasks of category "it2i"'):
            model.encode(loader(wrong), **{**what, "prompt_type": kind})


@pytest.mark.parametrize(
    ("benchmark", "said"),
    [
        (worlds.benchmark(protocols.FASHIONIQ), "fashioniq.gallery=category.* is no task for mteb"),
        (
            worlds.benchmark(
                queries=tuple(
                    dataclasses.replace(q, targets=()) for q in worlds.queries(protocols.CIRCO)
                )
            ),
            "without public ground truth, is no task",
        ),
        (worlds.benchmark(references=worlds.gallery()), "is no task for mteb"),
    ],
)
def test_what_is_no_task_is_refused(benchmark, said):
    with pytest.raises(ConfigError, match=said):
        mteb_model.task(benchmark)


def test_words_of_a_dataset_are_refused_and_the_extra_is_named(tiny, monkeypatch):
    own = searcher(tiny, "slerp")
    monkeypatch.setattr(type(own.composer), "word_rows", lambda self, names: names)
    with pytest.raises(ConfigError, match="slerp has words of the images of a prepared dataset"):
        mteb_model.MtebModel(own)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "mteb.models.model_meta", None)
    with pytest.raises(ConfigError, match=r"pip install 'cir_jax\[mteb\]'"):
        mteb_model.MtebModel(own)


def test_trec_evals_measures_by_hand():
    ranks = np.array([[0, 3, -1], [2, -1, -1], [9, 1, 0], [40, 41, 42]])
    np.testing.assert_allclose(trec.recall(ranks, 2), [1 / 2, 0, 2 / 3, 0])
    np.testing.assert_allclose(trec.recall(ranks, 10), [1, 1, 1, 0])
    gain = 1 / np.log2(np.arange(10) + 2)
    perfect = gain[0] + gain[1]
    np.testing.assert_allclose(
        trec.ndcg(ranks, 4), [(1 + gain[3]) / perfect, gain[2], perfect / gain[:3].sum(), 0]
    )
    np.testing.assert_allclose(trec.ndcg(ranks, 1), [1, 0, 1, 0])  # min(k, G) in the perfect one
    np.testing.assert_allclose(trec.average_precision(ranks, 1), [1 / 2, 0, 1 / 3, 0])
    np.testing.assert_allclose(trec.average_precision(ranks, 10)[2], (1 + 1 + 3 / 10) / 3)
    with pytest.raises(ValueError, match="query 1 has no ground truth"):
        trec.recall(np.array([[0], [-1]]), 1)
