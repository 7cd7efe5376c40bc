"""CLIP + InstructPix2Pix on a tiny random pipeline: queries are the features of edited images."""

import io
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import composers
from cir_jax.composers.image_only import ImageOnly
from cir_jax.composers.instruct_pix2pix import fitted
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation import evaluate, protocols
from cir_jax.loading import read_experiment
from cir_jax.retrieval import features
from cir_jax.retrieval.editing import Edited
from cir_jax.retrieval.search import Searcher
from tests import pipelines
from tests.evaluation import worlds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(pipelines.instruct_pix2pix(tmp_path_factory.mktemp("ip2p") / "ip2p"))


@pytest.fixture(scope="module")
def composer(model, tiny):
    return composers.build("instruct_pix2pix", tiny[0], model=model, steps=2, resolution=64)


def test_sides_are_multiples_of_64_as_instruct_pix2pix_makes_them():
    for size, expected in (
        ((512, 512), (512, 512)),
        ((640, 480), (512, 384)),
        ((480, 640), (384, 512)),
        ((500, 333), (576, 384)),  # 333 at 512 / 500 is 341, which goes up to 384; 577 is cut
        ((16, 16), (512, 512)),
        ((1000, 20), (3200, 64)),
    ):
        assert fitted(Image.new("L", size), 512).size == expected, size
    assert fitted(Image.new("RGBA", (100, 50)), 512).mode == "RGB"


def test_an_edit_depends_on_image_text_and_stream(composer):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    made = composer.edit(image, "make it red", "0/1")
    assert made.size == (64, 64)
    assert made.tobytes() == composer.edit(image, "make it red", "0/1").tobytes()
    for other in (("make it blue", "0/1"), ("make it red", "0/2")):
        assert made.tobytes() != composer.edit(image, *other).tobytes()
    assert (
        made.tobytes() != composer.edit(Image.new("RGB", (30, 40)), "make it red", "0/1").tobytes()
    )


def test_the_guidance_is_that_of_the_paper(composer):
    """e = e(0, 0) + s_T (e(I, T) - e(I, 0)) + s_I (e(I, 0) - e(0, 0)), seen from outside: the batch
    that the network gets, and the scales."""
    import torch

    seen = []

    def look(module, args, kwargs, output):
        seen.append((args[0] if args else kwargs["sample"], output[0]))

    pipeline = composer._pipeline
    handle = pipeline.unet.register_forward_hook(look, with_kwargs=True)
    step, given = pipeline.scheduler.step, []

    def stepped(noise, *args, **kwargs):
        given.append(noise)
        return step(noise, *args, **kwargs)

    pipeline.scheduler.step = stepped
    try:
        composer.edit(Image.new("RGB", (64, 64), "red"), "make it blue", "0")
    finally:
        handle.remove()
        del pipeline.scheduler.step
    sample, (text, image, nothing) = seen[0][0], seen[0][1].chunk(3)
    assert sample.shape[1] == 8 and not sample[2, 4:].any()  # the null image is zeros
    torch.testing.assert_close(sample[0, 4:], sample[1, 4:])
    expected = nothing + 7.5 * (text - image) + 1.5 * (image - nothing)
    torch.testing.assert_close(given[0], expected)
    assert type(pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert len(given) == 2


def test_queries_are_features_of_the_edited_references(composer, tiny, tmp_path):
    backbone, params = tiny
    frozen, benchmark = {"backbone": params}, worlds.benchmark()
    options = dict(mesh=worlds.mesh(1), batch_size=8, seed=5)
    found = evaluate.evaluate(composer, {}, frozen, benchmark, cache_dir=tmp_path, **options)
    queries = benchmark.queries
    edited = []
    for position, query in enumerate(queries):
        image = Image.open(io.BytesIO(benchmark.gallery[query.reference]["image"]))
        text = composer.prompt(benchmark.protocol.join(query.texts, "")[0])
        made = composer.edit(image.convert("RGB"), text, f"5/{position}")
        buffer = io.BytesIO()
        made.save(buffer, "PNG")
        edited.append({"image": buffer.getvalue()})
    encode = lambda rows: features.image_features(  # noqa: E731
        backbone, params, rows, mesh=worlds.mesh(1), normalise=True
    )
    scores = encode(edited) @ encode(benchmark.gallery).T
    top = np.argmax(scores, axis=1)
    np.testing.assert_array_equal(found.top[:, 0], top)
    np.testing.assert_allclose(found.scores[:, 0], scores.max(axis=1), atol=1e-5)
    # what was edited is not edited again, and is the same as without a cache
    (folder,) = tmp_path.glob("edited-*")
    assert len(list(folder.glob("*.png"))) == len(queries)
    once = dict(vars(composer))
    composer._pipeline = None
    try:
        again = evaluate.evaluate(composer, {}, frozen, benchmark, cache_dir=tmp_path, **options)
    finally:
        composer._pipeline = once["_pipeline"]
    np.testing.assert_array_equal(again.scores, found.scores)
    alone = evaluate.evaluate(composer, {}, frozen, benchmark, **options)
    np.testing.assert_array_equal(alone.top, found.top)


def test_two_texts_of_a_query_are_two_edits(composer, tiny):
    benchmark = worlds.benchmark(protocols.FASHIONIQ)
    seen = []

    class Counted(type(composer)):
        def __init__(self):
            self.__dict__.update(vars(composer))

        def edit(self, image, text, stream):
            seen.append((text, stream))
            return image

    frozen = {"backbone": tiny[1]}
    counted = Counted()
    found = evaluate.evaluate(counted, {}, frozen, benchmark, mesh=worlds.mesh(1), seed=1)
    assert len(seen) >= len(benchmark.queries)
    assert {stream for _, stream in seen} == {f"1/{i}" for i in range(len(benchmark.queries))}
    # an edit that does nothing leaves the image-only baseline
    plain = evaluate.evaluate(
        ImageOnly(tiny[0]), {}, frozen, benchmark, mesh=worlds.mesh(1), method="image_only"
    )
    np.testing.assert_allclose(found.scores, plain.scores, atol=2e-2)  # files are 8 bits


def test_other_settings_edit_anew(composer, model, tiny, tmp_path):
    def folder(one):
        records = worlds.gallery(3)
        return Edited(one, records, np.zeros(1, int), ["a"], ["0"], tmp_path)._folder

    changed = composers.build("instruct_pix2pix", tiny[0], model=model, steps=3, resolution=64)
    assert folder(composer) == folder(composer) != folder(changed)


def test_search_edits_the_reference(composer, tiny, tmp_path, monkeypatch):
    for i, record in enumerate(worlds.gallery(6)):
        (tmp_path / f"{i}.png").write_bytes(record["image"])
    searcher = Searcher(
        composer, {}, {"backbone": tiny[1]}, mesh=worlds.mesh(1), cache_dir=tmp_path / "cache"
    )
    searcher.index(tmp_path)
    asked = []
    monkeypatch.setattr(
        composer, "edit", lambda image, text, stream: [asked.append(text), Image.open(
            tmp_path / "4.png")][1]
    )  # fmt: skip
    found = searcher.search(tmp_path / "0.png", "make it green", k=2)
    assert asked == ["make it green"] and found[0][0].name == "4.png"
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    searcher.search(tmp_path / "0.png")
    searcher.search(text="green")
    assert len(asked) == 1


def test_what_cannot_work_is_said(tiny, tmp_path, monkeypatch):
    build = lambda **settings: composers.build("instruct_pix2pix", tiny[0], **settings)  # noqa: E731
    for settings, message in (
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"resolution": 500}, "resolution=500: expected a multiple of 64"),
        ({"text_guidance": 1.0}, "text_guidance=1.0, image_guidance=1.5: expected more than 1"),
        ({"image_guidance": float("nan")}, "image_guidance=nan: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**settings)
    with pytest.raises(WeightsError, match="composer.model=.*no StableDiffusionInstructPix2Pix"):
        build(model=str(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"composer.model=timbrooks.*cir_jax\[synth\]"):
        build()


def test_the_defaults_are_those_of_the_authors():
    config = read_experiment("instruct_pix2pix:vit_l14")
    assert config.backbone == "openai/clip-vit-large-patch14"
    assert config.composer.to_dict() == {
        "name": "instruct_pix2pix", "model": "timbrooks/instruct-pix2pix", "steps": 100,
        "text_guidance": 7.5, "image_guidance": 1.5, "resolution": 512,
    }  # fmt: skip
    with pytest.raises(TypeError, match="ImageOnly edits no images"):
        ImageOnly.edit(ImageOnly.__new__(ImageOnly), None, "", "")
    assert jax.devices()
