"""benchmarks/conditions.py: its worlds, answered by oracles whose numbers are known."""

import json
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import conditions
from cir_jax import weights
from cir_jax.evaluation import protocols
from cir_jax.evaluation.queries import Benchmark, Query
from cir_jax.sharding.mesh import make_mesh
from data.shapes import benchmarks as worlds
from data.shapes import words
from data.shapes.scene import stream
from tests.launch.binaries import environment, run_command


class Oracle:
    """In the place of `conditions.Trained`: the world without a method."""

    split, seed = "val", 0

    def __init__(self):
        sizes = worlds.BenchmarkSizes(circo=30, cirr_sets=1, fashioniq=1, genecis=1)
        world = worlds.world("val", sizes)
        self.scenes = world.gallery
        self.queries = world.queries["circo"]
        queries = tuple(
            Query(
                id=i,
                reference=row["reference"],
                texts=tuple(row["texts"]),
                targets=tuple(row["targets"]),
                aspects=tuple(row["aspects"]),
            )
            for i, row in enumerate(self.queries)
        )
        gallery = [{"image": b""}] * len(self.scenes)
        self.benchmark = Benchmark("shapes/circo", "val", protocols.CIRCO, gallery, queries)
        self.composer = types.SimpleNamespace(
            prompt=lambda text: text, pools_text=False, mask_fill="noise"
        )


@pytest.fixture(scope="module")
def world():
    return Oracle()


def test_what_is_unwanted_is_shown_by_the_reference_and_named_by_no_text(world):
    for chosen, table in (
        (conditions._backgrounds(world), words.BACKGROUND_WORDS),
        (conditions._shapes(world), words.SHAPE_WORDS),
    ):
        assert len(chosen) > 3
        for number, text, shows in chosen:
            query = world.benchmark.queries[number]
            assert shows(world.scenes[query.reference])
            (named,) = [forms for forms in table if forms[0] in text.split()]
            assert not set(named) & set(query.texts[0].split())
            assert set(text.split()) <= set(words.vocabulary())


def test_rates_of_negative_texts_are_counted_on_the_scenes(world, monkeypatch):
    """A one-hot gallery; the oracle names the image that is to be first."""
    n = len(world.scenes)
    world.raw = np.eye(n, dtype=np.float32)
    world.composer.backbone = types.SimpleNamespace(
        context_length=8, tokenizer=lambda texts, length: np.zeros((len(texts), 8), np.int32)
    )
    references = np.asarray([query.reference for query in world.benchmark.queries])
    shown = []

    def compose(texts, *, fields, reference_features):
        """Plain: images with the reference's background; negative: with another one."""
        out = np.zeros((len(texts), n), np.float32)
        backgrounds = np.asarray([scene.background for scene in world.scenes])
        for row, feature in zip(out, reference_features, strict=True):
            same = backgrounds == backgrounds[feature.argmax()]
            row[same == ("negative_token_ids" not in fields)] = 1
        shown.append(len(texts))
        return out

    world.compose = compose
    found = conditions.negative(world)
    assert found["background"]["plain"]["unwanted"] == 100
    assert found["background"]["negative"]["unwanted"] == 0
    assert found["background"]["queries"] == len(conditions._backgrounds(world)) == shown[0]
    assert 0 < found["shape"]["plain"]["unwanted"] < 60 and len(references) >= shown[0]


def test_the_mask_alone_says_which_of_two_things_is_meant():
    for i in range(40):
        reference, five, kind = conditions._case(stream("test", i))
        first, second = reference.things
        in_a, in_b, same, elsewhere, both = five
        assert in_a.things[0].kind == kind and in_a.things[1].kind == second.kind
        assert in_b.things[0].kind == first.kind and in_b.things[1].kind == kind
        assert {in_a.background, in_b.background, same.background} == {reference.background}
        assert elsewhere.background != reference.background
        assert [thing.kind for thing in both.things] == [kind, kind]
        for scene in five:
            places = [thing.position for thing in scene.things]
            assert places == [first.position, second.position]
        assert len({first.shape, second.shape, kind[0]}) == 3


def test_rates_of_masks(world):
    """An oracle that reads the mask's place; without one it answers with A's."""
    backbone, params = weights.load("data/shapes/clip")
    world.composer.backbone, world.frozen = backbone, {"backbone": params}
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    world.options = {"mesh": mesh, "batch_size": 40}
    from cir_jax.retrieval import features
    from data.shapes.render import encode_png, render

    cases = [
        conditions._case(stream("shapes", "conditions", world.split, i))
        for i in range(conditions.REGION_QUERIES["smoke"])
    ]
    pictures = [{"image": encode_png(render(s))} for _, five, _ in cases for s in five[:2]]
    right = features.image_features(backbone, params, pictures, normalise=True, **world.options)
    asked = []

    def compose(texts, *, reference_images):
        out = []
        for row in range(len(texts)):
            pixels, mask = reference_images(row)
            whole = backbone.image_transform(Image.fromarray(render(cases[row][0])))
            assert (pixels != whole).any() == bool(mask.any())
            place = 0
            if mask.any():
                x, y = mask.sum(0) @ np.arange(64), mask.sum(1) @ np.arange(64)
                centre = np.array([x, y]) / mask.sum()
                at = [(t.position % 2 * 31 + 16, t.position // 2 * 31 + 16) for t in
                      cases[row][0].things]  # fmt: skip
                place = int(np.argmin([np.abs(centre - one).sum() for one in at]))
            out.append(right[2 * row + place])
        asked.append(texts)
        return np.stack(out)

    world.compose = compose
    found = conditions.region(world, len(cases))
    assert found["on A"] == {"before": 100, "first": 100}
    assert found["none"] == found["on A"]
    assert found["on B"] == {"before": 0, "first": 0}
    for texts in asked:
        for text, (_, _, kind) in zip(texts, cases, strict=True):
            assert set(words.SHAPE_WORDS[kind[0]]) & set(text.split())


def test_the_table_and_the_picture(tmp_path):
    rates = {"queries": 5, "plain": {"unwanted": 40.0, "mAP@10": 20.0}}
    rates["negative"] = {"unwanted": 10.0, "mAP@10": 21.0}
    run = {
        "negative": {"background": rates},
        "mask": {name: {"before": 80.0, "first": 50.0} for name in conditions.MASKS},
        "plane": {"0.0": {"1.0": 3.0, "2.0": 9.0}, "1.5": {"1.0": 12.0, "2.0": 15.0}},
    }
    other = json.loads(json.dumps(run))
    other["negative"]["background"]["plain"]["unwanted"] = 50.0
    measured = conditions.mean([run, other])
    row = "| background | 45.0 ± 7.1 | 10.0 ± 0.0 | 20.0 ± 0.0 | 21.0 ± 0.0 |"
    assert row in conditions.table(measured)
    assert "| on A | 80.0 ± 0.0 | 50.0 ± 0.0 |" in conditions.table(measured)
    conditions.draw(measured, tmp_path / "plane.png")
    picture = np.asarray(Image.open(tmp_path / "plane.png")).astype(int)
    at = {  # the corner of a square: the darker the more
        (i, j): picture[50 + conditions.CELL * i + 4, conditions.LEFT + conditions.CELL * j + 4]
        for i in range(2)
        for j in range(2)
    }
    order = sorted(at, key=lambda cell: -at[cell].sum())
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.slow
def test_a_run_at_a_small_size(tmp_path, monkeypatch):
    """And the steps that benchmarks/compodiff.py measures of what was trained here."""
    output, variables = tmp_path / "conditions.json", environment(tmp_path)
    command = [sys.executable, conditions.__file__, "--preset=smoke", "--seeds", "0"]
    command += [f"--workdir={tmp_path}", f"--output={output}"]
    status, said = run_command(command, variables)
    assert status == 0, said[-3000:]
    measured = json.loads(output.read_text())
    assert set(measured["plane"]) == {"1.0", "2.5"} and set(measured["mask"]) == set(
        conditions.MASKS
    )
    assert "| mask |" in said and output.with_suffix(".png").is_file()
    for name in ("CIR_JAX_DATA", "CIR_JAX_CACHE"):
        monkeypatch.setenv(name, variables[name])
    pytest.importorskip("torch")
    from benchmarks import compodiff

    args = types.SimpleNamespace(preset="smoke", workdir=tmp_path, table=(1,))
    (row,) = compodiff.measure_steps(args)
    assert row["steps"] == 1 and 0 <= row["mAP@10"] <= 100 and row["ms_per_query"] > 0


def test_the_committed_sentences_are_the_measurement():
    measured = json.loads((conditions.ROOT / "benchmarks" / "conditions.json").read_text())
    text = (conditions.ROOT / "benchmarks" / "README.md").read_text()
    assert measured["seeds"] == [0, 1, 2]
    assert conditions.said(measured) in " ".join(text.split())
