"""The embedded world: the same on every machine, true to its rules, and without leaks."""

import collections
import dataclasses
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from cir_jax.input import masks
from data.shapes import (
    benchmarks,
    captioned,
    edits,
    language,
    masked,
    queries,
    render,
    scene,
    words,
)
from data.shapes.scene import SHAPES, stream

SIZES = benchmarks.BenchmarkSizes(circo=60, cirr_sets=20, fashioniq=40, genecis=15)


@pytest.fixture(scope="module")
def world() -> benchmarks.World:
    return benchmarks.world("val", SIZES)


@pytest.fixture(scope="module")
def scenes() -> list[scene.Scene]:
    return [scene.sample_scene(stream("test", i)) for i in range(600)]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_golden_world():
    # Change these only together with VERSION in shapes_dataset_builder.py.
    drawn = list(captioned.scenes("pretrain", "train", 40))
    pixels = b"".join(render.render(s).tobytes() for s, _ in drawn)
    assert _digest(pixels) == "c5217817e0a250ed"
    captions = "\n".join(c for _, captions in drawn for c in captions)
    assert _digest(captions.encode()) == "b7a683bea7406532"
    triplets = [queries.triplet("train", i) for i in range(40)]
    assert _digest("\n".join(r["text"] for _, r in triplets).encode()) == "2ea451edc18e4430"
    parts = repr([(r["captions"], r["mask"]) for r in masked.records("train", 40)])
    assert _digest(parts.encode()) == "3a4e70899c82111b"
    small = benchmarks.BenchmarkSizes(8, 4, 8, 2)
    assert _digest(repr(benchmarks.world("val", small).queries).encode()) == "27daf2a01d3dcb90"


def test_render_range_and_png(scenes):
    for s in scenes[:50]:
        image = render.render(s)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        decoded = Image.open(io.BytesIO(render.encode_png(image)))
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), image)


def test_object_masks_are_exact(scenes):
    for s in scenes[:100]:
        masks = np.stack([render.object_mask(s, i) for i in range(len(s.things))])
        assert masks.sum(0).max() == 1
        assert masks.reshape(len(masks), -1).sum(1).min() > 40
        # Recolouring a thing changes its mask and at most the blended pixels around it.
        thing = s.things[-1]
        other = dataclasses.replace(thing, colour=(thing.colour + 1) % 8)
        changed = dataclasses.replace(s, things=(*s.things[:-1], other))
        differs = (render.render(s) != render.render(changed)).any(-1)
        assert differs[masks[-1]].mean() > 0.98
        assert differs[~masks[-1]].mean() < 0.05


def test_a_mask_is_where_its_captions_are_true():
    """Painted over, the captions' words are of what is gone: the thing, or the background."""
    names = {w: i for i, forms in enumerate(words.SHAPE_WORDS) for w in forms}
    colours = {w: i for i, forms in enumerate(words.COLOUR_WORDS) for w in forms}
    backgrounds = 0
    for (scene_, mask, captions), record in zip(
        masked.scenes("train", 200), masked.records("train", 200), strict=True
    ):
        assert mask.any() and not mask.all()
        np.testing.assert_array_equal(masks.unpack(record["mask"], "mask"), mask)
        shown = [render.object_mask(scene_, i) for i in range(len(scene_.things))]
        said = [word for caption in captions for word in caption.split()]
        shapes = {names[word] for word in said if word in names}
        if not shapes:
            backgrounds += 1
            assert not (mask & np.any(shown, axis=0)).any() and (mask | np.any(shown, axis=0)).all()
            continue
        (index,) = [i for i, thing in enumerate(shown) if np.array_equal(thing, mask)]
        thing = scene_.things[index]
        assert shapes == {thing.shape}
        assert {colours[word] for word in said if word in colours} == {thing.colour}
        for caption in captions:
            assert len(caption.split()) <= language.MAX_WORDS
            for side, places in list(scene.REGIONS.items())[:4]:
                assert side not in caption.split() or thing.position in places
    assert 15 < backgrounds < 50


def test_vocabulary_covers_all_texts_and_has_no_idle_word(world):
    seen = collections.Counter()
    texts = [c for _, captions in captioned.scenes("pretrain", "train", 3000) for c in captions]
    for caption in texts:
        assert len(caption.split()) <= language.MAX_WORDS
        seen.update(caption.split())
    # Every word must be learnt from captions, also those that only edits are likely to use.
    assert set(seen) == set(words.vocabulary())
    for i in range(2000):
        record = queries.triplet("train", i)[1]
        for key in ("text", "reference_caption", "target_caption"):
            assert len(record[key].split()) <= language.MAX_WORDS
            assert set(record[key].split()) <= set(seen)
    for records in world.queries.values():
        assert {w for r in records for t in r["texts"] for w in t.split()} <= set(seen)
    assert list(words.vocabulary()) == sorted(set(words.vocabulary()))


def test_articles(scenes):
    rng = stream("articles")
    for s in scenes:
        text = f" {language.caption(rng, s)} "
        assert " a o" not in text and " a e" not in text and " an b" not in text


def test_captions_are_true(scenes):
    """Each shape a plain caption names is there, each it denies is not."""
    names = {w: i for i, forms in enumerate(words.SHAPE_WORDS) for w in forms}
    rng = stream("truth")
    for s in scenes:
        assert {names[w] for w in language.detailed_caption(s).split() if w in names} == s.shapes
        for told in edits.facts(rng, s):
            if told.kind == "remove":
                assert told.value not in s.shapes
            else:
                assert edits.goal_of(s, [told]).reached_by(s)


def test_twins_differ_in_the_denied_shape():
    names = {w: i for i, forms in enumerate(words.SHAPE_WORDS) for w in forms}
    names |= {words.plural(w): i for w, i in names.items()}
    twins = 0
    for k in range(300):
        (first, shown), (second, denied) = captioned.scene_pair("pretrain", "train", k)
        if not all({"no", "without", "not"} & set(c.split()) for c in denied[-3:]):
            continue
        (shape,) = {names[w] for c in denied[-3:] for w in c.split() if w in names} or {None}
        if {names[w] for c in shown[-3:] for w in c.split() if w in names} == {shape}:
            twins += 1
            assert shape in first.shapes and shape not in second.shapes
    assert 0.2 < twins / 300 < 0.4


def test_training_and_evaluation_are_disjoint(world):
    training = [s for t in ("pretrain", "captions") for s, _ in captioned.scenes(t, "train", 2000)]
    triplets = [queries.triplet("train", i) for i in range(1000)]
    training += [s for case, r in triplets for s in (case.reference, r["target"])]
    other = benchmarks.world("test_0", SIZES)
    assert len(set(training)) == len(training)
    assert not set(training) & set(world.gallery)
    assert not set(other.gallery) & set(world.gallery)
    for case, _ in triplets:
        assert queries.parity(case.reference.subject.kind) == queries.TRAIN_PARITY
        assert queries.parity(case.goal.kind) == queries.TRAIN_PARITY
    for record in world.queries["circo"]:
        assert queries.parity(world.gallery[record["reference"]].subject.kind) == 0


def test_edits_reach_their_goal():
    for i in range(1500):
        case, record = queries.triplet("train", i)
        assert case.goal.reached_by(case.target) and case.goal.reached_by(record["target"])
        assert not case.goal.reached_by(case.reference)
        places = [t.position for t in case.target.things]
        assert len(set(places)) == len(places) <= scene.MAX_THINGS
        kept = {"colour", "texture", "shape", "size"} - {e.kind for e in case.edits}
        for name in kept:
            assert getattr(case.target.subject, name) == getattr(case.reference.subject, name)


def _right(s: scene.Scene, case: queries.Case) -> bool:
    """The rule of a right answer once more, from the edits and written otherwise."""
    want = dict(zip(("shape", "colour", "texture"), case.reference.subject.kind, strict=True))
    for e in case.edits:
        if e.kind in want:
            want[e.kind] = e.value
    fits = [t for t in s.things if all(getattr(t, k) == v for k, v in want.items())]
    names = [(SHAPES[t.shape], scene.COLOURS[t.colour]) for t in s.things]
    count = len(fits)
    for e in case.edits:
        if e.kind == "size":
            fits = [t for t in fits if t.size == e.value]
        if e.kind == "region":
            name = list(scene.REGIONS)[e.value]
            fits = [t for t in fits if name in scene.POSITIONS[t.position]]
        background = scene.BACKGROUNDS[s.background]
        if (
            (e.kind == "background" and s.background != e.value)
            or (e.kind == "light" and e.value > 0 and background not in ("gray", "white"))
            or (e.kind == "light" and e.value < 0 and background not in ("black", "navy"))
            or (e.kind == "add" and (SHAPES[e.value], scene.COLOURS[e.other]) not in names)
            or (e.kind == "remove" and SHAPES[e.value] in [shape for shape, _ in names])
            or (e.kind == "count" and count != 2)
            or (e.kind == "more" and count < 2)
        ):
            return False
    return bool(fits)


def test_rule_of_right_answers(world):
    rng, right = stream("rule"), 0
    for i in range(150):
        case = queries.draw_case(rng, queries.EVAL_PARITY, queries.training_kinds)
        probes = [edits.realise(rng, case.goal), queries.near_miss(rng, case.goal), case.target]
        for s in (*probes, *world.gallery[i % 7 :: 7]):
            assert case.goal.reached_by(s) == _right(s, case)
            right += _right(s, case)
    assert right > 300


def test_circo(world):
    records = world.queries["circo"]
    assert len(records) == SIZES.circo
    names = {a for values in queries.ASPECTS.values() for a in values}
    for r in records:
        assert 2 <= len(set(r["targets"])) == len(r["targets"]) <= benchmarks.MAX_TARGETS
        assert r["reference"] not in r["targets"]
        assert r["aspects"] and set(r["aspects"]) <= names | {
            "statement_with_conjunction", "compare_change"
        }  # fmt: skip
        # What the text says of the background or a second subject holds in every right answer.
        text = r["texts"][0]
        for name in scene.BACKGROUNDS:
            if f"{name} background" in text:
                shown = {scene.BACKGROUNDS[world.gallery[t].background] for t in r["targets"]}
                assert shown == {name}
    aspects = collections.Counter(a for r in records for a in r["aspects"])
    assert aspects["negation"] > 4 and aspects["cardinality"] > 4


def test_cirr(world):
    records = world.queries["cirr"]
    assert len(records) == 2 * SIZES.cirr_sets
    for r in records:
        assert len(set(r["candidates"])) == 6
        assert r["reference"] in r["candidates"] and r["targets"][0] in r["candidates"]
        assert r["reference"] != r["targets"][0]


def test_fashioniq(world):
    records = world.queries["fashioniq"]
    assert {r["category"] for r in records} == set(benchmarks.CATEGORIES)
    for r in records:
        assert len(r["texts"]) == 2 and len(r["targets"]) == 1
        for i in (r["reference"], r["targets"][0]):
            assert benchmarks.categories(world.gallery[i]) == [r["category"]]


def test_genecis(world):
    records = world.queries["genecis"]
    counts = collections.Counter(r["category"] for r in records)
    assert counts == dict.fromkeys(benchmarks.TASKS, SIZES.genecis)
    for r in records:
        assert len(set(r["candidates"])) == benchmarks.TASKS[r["category"]]
        assert r["candidates"][0] == r["targets"][0] and r["reference"] not in r["candidates"]
        if r["category"] in ("focus_object", "change_object"):
            names = {w: i for i, forms in enumerate(words.SHAPE_WORDS) for w in forms}
            assert names[r["texts"][0]] in world.gallery[r["targets"][0]].shapes
