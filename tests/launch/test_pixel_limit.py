"""--max_megapixels of the binaries that decode images."""

import shutil

import pytest
from PIL import Image

from tests.launch.binaries import ROOT, SMOKE, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("flags", [("main", f"--config={SMOKE}"), ("eval", f"--config={SMOKE}")])
def test_a_limit_that_lets_nothing_through_is_refused(flags, tmp_path):
    status, text = run(*flags, "--max_megapixels=0", scratch=tmp_path)
    assert status == 2 and "error: max_megapixels=0.0: expected a number above 0" in text


def test_images_over_the_limit_are_listed_and_not_built(tmp_path):
    source = tmp_path / "circo"
    shutil.copytree(ROOT / "data" / "circo" / "dummy", source)
    large = source / "COCO2017_unlabeled" / "unlabeled2017" / "000000000091.jpg"
    Image.new("RGB", (64, 64)).save(large)
    flags = ("prepare", "--dataset=circo", f"--source={source}", "--check")
    assert "unreadable" not in run(*flags, scratch=tmp_path)[1]
    status, text = run(*flags, "--max_megapixels=0.003", scratch=tmp_path)
    assert status == 1, text
    assert "91.jpg: is unreadable (it has 64 x 64 pixels, 0.004096 megapixels; the limit is" in text
