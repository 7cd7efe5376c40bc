"""Composed queries, decoded by tiny random unCLIPs, in the contact sheet."""

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

from cir_jax.composers.image_text import ImageText
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation import contact_sheet as sheets
from cir_jax.evaluation import decoding, evaluate, runner
from cir_jax.evaluation.decoding import Unclip
from cir_jax.loading import read_experiment
from cir_jax.retrieval import features
from tests import pipelines
from tests.evaluation import worlds

DIM = 24  # of the tiny CLIP


@pytest.fixture(scope="module", params=["karlo", "stable_unclip"])
def unclip(request, tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("unclip") / request.param
    model = getattr(pipelines, request.param)(folder, DIM)
    return Unclip(str(model), tiny[0], steps=2)


@pytest.fixture(scope="module")
def shown(tiny):
    backbone, params = tiny
    benchmark = worlds.benchmark()
    composer = ImageText(backbone)
    result = evaluate.evaluate(
        composer, {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1), method="image_text"
    )
    return result, benchmark


def test_an_image_depends_on_the_features_and_the_stream(unclip):
    rows = np.random.default_rng(0).standard_normal((2, DIM)).astype(np.float32)
    image = unclip(rows[0], "0/3")
    assert isinstance(image, Image.Image) and min(image.size) >= 16
    assert image.tobytes() == unclip(rows[0], "0/3").tobytes()
    assert image.tobytes() != unclip(rows[0], "0/4").tobytes()
    assert image.tobytes() != unclip(rows[1], "0/3").tobytes()
    assert image.tobytes() != unclip(5 * rows[0], "0/3").tobytes()  # length counts, too
    with pytest.raises(ConfigError, match="not finite cannot be decoded"):
        unclip(rows[0] * np.nan, "0")


def test_queries_are_as_long_as_the_gallery(shown, tiny):
    result, benchmark = shown
    raw = features.image_features(tiny[0], tiny[1], benchmark.gallery, mesh=worlds.mesh(1))
    lengths = np.linalg.norm(result.composed, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(raw, axis=1).mean(), rtol=1e-5)
    scores = features.unit(result.composed) @ features.unit(raw).T
    np.testing.assert_allclose(scores.max(axis=1), result.scores[:, 0], atol=1e-5)
    oracle = evaluate.evaluate(  # its queries are colours
        worlds.ColourOracle(tiny[0]), {}, {"backbone": tiny[1]}, benchmark, mesh=worlds.mesh(1)
    )
    assert oracle.composed is None
    with pytest.raises(ValueError, match="composes no features of the backbone: none to decode"):
        sheets.contact_sheet(oracle, benchmark, decode=lambda x, s: None)


def test_the_sheet_has_them_beside_what_was_retrieved(shown, tmp_path):
    result, benchmark = shown
    asked = []

    def decode(row, stream):
        asked.append((row, stream))
        return Image.new("RGB", (32, 32), (len(asked), 200, 90))

    plain = sheets.contact_sheet(result, benchmark, rows=4)
    sheet = sheets.contact_sheet(result, benchmark, tmp_path / "sheet.png", rows=4, decode=decode)
    wider = sheet.width - plain.width
    assert wider == sheets.TILE + 2 * sheets.GAP and sheet.height == plain.height
    chosen = sheets._choose(result.best_rank, 4)
    assert [stream for _, stream in asked] == [f"0/{position}" for position in chosen]
    for (row, _), position in zip(asked, chosen, strict=True):
        np.testing.assert_array_equal(row, result.composed[position])
    _, text, columns, _ = sheets._columns(True)
    for line in range(4):
        y = sheets.HEADER + line * sheets.ROW + 4 + sheets.TILE // 2
        assert sheet.getpixel((sheets._decoded(text) + 64, y)) == (line + 1, 200, 90)
    # nothing else has changed; the line at the foot begins at the left of both
    y = (sheets.HEADER, plain.height - sheets.FOOTER)
    old = plain.crop((columns[0] - wider - sheets.FRAME, y[0], plain.width, y[1]))
    assert (
        old.tobytes() == sheet.crop((columns[0] - sheets.FRAME, y[0], sheet.width, y[1])).tobytes()
    )


def test_the_runner_decodes_what_can_be(shown, tiny, tmp_path, capsys):
    result, benchmark = shown
    decode = lambda row, stream: Image.new("RGB", (9, 9))  # noqa: E731
    runner._retrieved(result, benchmark, tmp_path / "a", decode)
    oracle = dataclasses.replace(result, composed=None, method="oracle")
    runner._retrieved(oracle, benchmark, tmp_path / "b", decode)
    with_, without = (Image.open(next((tmp_path / x).glob("*.png"))).width for x in "ab")
    assert with_ - without == sheets.TILE + 2 * sheets.GAP
    said = "not decoded: oracle composes no features of the backbone"
    assert capsys.readouterr().out.count(said) == 1
    assert read_experiment("slerp").evaluation.decoder == ""


def test_another_width_or_kind_is_refused(tiny, tmp_path, monkeypatch):
    karlo = str(pipelines.karlo(tmp_path / "karlo", 16))
    with pytest.raises(WeightsError, match="decodes features of width 16, those of tiny@0 have 24"):
        Unclip(karlo, tiny[0])
    other = str(pipelines.stable_diffusion(tmp_path / "sd"))
    with pytest.raises(WeightsError, match="a StableDiffusionPipeline, expected UnCLIPImageVari"):
        Unclip(other, tiny[0])
    with pytest.raises(
        WeightsError, match="config.evaluation.decoder=.*no UnCLIPImageVariationPipeline or Stable"
    ):
        Unclip(str(tmp_path), tiny[0])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"config.evaluation.decoder=.*cir_jax\[synth\]"):
        Unclip(karlo, tiny[0])
    assert decoding.FLAG == "config.evaluation.decoder"
    assert dataclasses.fields(evaluate.Result)[-1].name == "composed"
