"""The contact sheet shows what the result says."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cir_jax.evaluation import contact_sheet as sheets
from cir_jax.evaluation import evaluate, protocols
from tests.evaluation import worlds


@pytest.fixture(scope="module")
def shown(tiny):
    backbone, params = tiny
    benchmark = worlds.benchmark()
    result = evaluate.evaluate(
        worlds.ColourOracle(backbone), {}, {"backbone": params}, benchmark, mesh=worlds.mesh(1)
    )
    return result, benchmark


def test_frames_are_green_where_the_hits_are(shown, tmp_path):
    result, benchmark = shown
    sheet = sheets.contact_sheet(result, benchmark, tmp_path / "x" / "sheet.png", rows=6)
    written = np.asarray(Image.open(tmp_path / "x" / "sheet.png"))
    np.testing.assert_array_equal(written, np.asarray(sheet))
    assert 1100 <= sheet.width <= 1300
    chosen = sheets._choose(result.best_rank, 6)
    assert len(chosen) == 6
    _, _, columns, missed = sheets._columns()
    seen = set()
    for line, position in enumerate(chosen):
        y = sheets.HEADER + line * sheets.ROW + 4 + sheets.TILE // 2
        targets = benchmark.queries[position].targets
        for x, image in zip(columns, result.top[position], strict=False):
            frame = tuple(written[y, x - 2])
            assert frame == (sheets.HIT if image in targets else sheets.OTHER)
            seen.add(frame)
        left = set(targets) - set(result.top[position][: sheets.SHOWN].tolist())
        assert tuple(written[y, missed - 2]) == (sheets.MISSED if left else sheets.BACKGROUND)
        # the tile itself: its strongest channel is the image's colour
        tile = written[y - 40 : y + 40, columns[0] + 20 : columns[0] + 100].mean(axis=(0, 1))
        assert tile.argmax() == result.top[position][0] % 3
    assert seen == {sheets.HIT, sheets.OTHER}


def test_a_long_footer_is_wrapped(shown):
    result, benchmark = shown
    plain = sheets.contact_sheet(result, benchmark, rows=2)
    long = dataclasses.replace(result, weights_id="a/long-name+another/long-name@0123 " * 6)
    sheet = sheets.contact_sheet(long, benchmark, rows=2)
    assert sheet.height == plain.height + 18
    foot = np.asarray(sheet)[plain.height - 8 :]
    assert (foot != sheets.BACKGROUND).any(), "nothing in the second line"
    assert (np.asarray(sheet)[:, -sheets.MARGIN + 8 :] == sheets.BACKGROUND).all()


def test_rows_are_hits_then_failures_spread_over_each():
    best = np.array([7, 0, 30, 2, 900, 0, 4, 60])
    assert sheets._choose(best, 4) == [1, 6, 0, 4]
    assert sheets._choose(best, 100) == [1, 5, 3, 6, 0, 2, 7, 4]
    assert sheets._choose(np.array([0, 1, 2]), 2) == [0, 2]  # no failures to show
    assert sheets._choose(np.array([8, 9]), 2) == [0, 1]


def test_a_sheet_of_another_benchmark_is_refused(shown):
    result, _ = shown
    with pytest.raises(ValueError, match="not of tiles/cirr"):
        sheets.contact_sheet(result, worlds.benchmark(protocols.CIRR))
