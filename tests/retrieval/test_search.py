"""Search in a folder of one's own."""

import copy
import functools

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cir_jax import composers
from cir_jax.errors import CirError, DataError
from cir_jax.retrieval.features import unit
from cir_jax.retrieval.search import Searcher, find
from cir_jax.sharding.mesh import make_mesh
from tests import tiny as factory


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for i in range(7):
        (root / ("more" if i % 2 else ".") / f"{i}.PNG").write_bytes(factory.png(rng))
    (root / "broken.jpg").write_bytes(b"not an image")
    (root / "notes.txt").write_text("no image at all")
    return root


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    backbone, params = tiny
    slerp = composers.build("slerp", backbone)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    cache = tmp_path_factory.mktemp("cache")
    return Searcher(slerp, {}, {"backbone": params}, cache_dir=cache, mesh=mesh)


@pytest.fixture
def searcher(shared):
    """Without an index, but with the programs of the tests before."""
    fresh = copy.copy(shared)
    fresh.paths, fresh._gallery, fresh._plain = [], None, None
    return fresh


def test_search_by_image_by_text_and_by_both(searcher, folder, tiny, caplog):
    backbone, params = tiny
    assert searcher.index(folder) == 7
    assert searcher.unreadable == [folder / "broken.jpg"]
    assert "broken.jpg" in caplog.text and "skipped 1 of 8 files" in caplog.text

    reference = folder / "2.PNG"
    found = searcher.search(image=reference, k=3)
    assert len(found) == 3 and found[0][0] == reference
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert found == searcher.search(image=Image.open(reference), k=3)

    pixels = np.stack([backbone.image_transform(Image.open(path)) for path in searcher.paths])
    gallery = unit(np.asarray(jax.jit(backbone.encode_image)(params, pixels)))
    ids = backbone.tokenizer(["make it red"])
    text = unit(np.asarray(jax.jit(backbone.encode_text)(params, ids)))[0]
    by_text = searcher.search(text="make it red", k=100)
    assert len(by_text) == 7
    scores = {path: score for path, score in by_text}
    np.testing.assert_allclose([scores[p] for p in searcher.paths], gallery @ text, atol=1e-5)
    assert [s for _, s in by_text] == sorted(scores.values(), reverse=True)

    both = searcher.search(reference, "make it red", k=7)
    image = gallery[searcher.paths.index(reference)]
    mixed = {path: score for path, score in both}
    # on the arc between the two, at 0.8 of the angle from the image
    angle = np.arccos(image @ text)
    arc = (np.sin(0.2 * angle) * image + np.sin(0.8 * angle) * text) / np.sin(angle)
    np.testing.assert_allclose([mixed[p] for p in searcher.paths], gallery @ arc, atol=1e-5)
    query = searcher.query(Image.open(reference), "make it red")
    assert query.shape == (1, backbone.dim)
    np.testing.assert_allclose(query[0], arc, atol=1e-5)


def test_a_second_index_reads_no_image(searcher, folder, monkeypatch):
    searcher.index(folder)
    before = searcher.search(text="red star")
    from cir_jax.retrieval import features

    def fail(*args):
        raise AssertionError("an image was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", fail)
        assert searcher.index(folder) == 7
    assert searcher.search(text="red star") == before
    (folder / "0.PNG").write_bytes(factory.png(np.random.default_rng(9), size=24))
    searcher.index(folder)
    assert searcher.search(text="red star") != before


def test_errors_say_what_to_do(searcher, folder, tmp_path):
    with pytest.raises(CirError, match=r"nothing is indexed yet: call index\(folder\) first"):
        searcher.search(text="red")
    with pytest.raises(DataError, match="no such folder"):
        searcher.index(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        DataError, match=r"empty: no images. Give a folder that holds files .*\.jpg"
    ):
        searcher.index(empty)
    with pytest.raises(DataError, match="none of the 2 files is a readable image: .*broken.jpg"):
        searcher.index([folder / "broken.jpg", folder / "notes.txt"])
    assert searcher.index([folder / "0.PNG", folder / "missing.png"]) == 1
    assert searcher.unreadable == [folder / "missing.png"]
    with pytest.raises(CirError, match="an empty query: give an image, a text, or both"):
        searcher.search(text="  ")
    with pytest.raises(DataError, match="nothing.png: cannot be read"):
        searcher.search(image=folder / "nothing.png")
    with pytest.raises(CirError, match="k=0"):
        searcher.search(text="red", k=0)


def test_a_folder_called_as_an_image_is_none(tmp_path):
    (tmp_path / "holidays.jpg").mkdir()
    (tmp_path / "holidays.jpg" / "a.png").write_bytes(b"")
    assert find(tmp_path) == [tmp_path / "holidays.jpg" / "a.png"]


def test_any_failure_of_one_file_is_skipped(searcher, folder, monkeypatch, caplog):
    """A file cut off, one over the limit, one for which memory is too little, at any step."""
    (folder / "cut.png").write_bytes((folder / "0.PNG").read_bytes()[:200])
    (folder / "large.png").write_bytes(factory.png(np.random.default_rng(1), size=300))
    odd = ["broken.jpg", "cut.png", "large.png"]
    assert searcher.index(folder, max_megapixels=0.08) == 7
    assert [path.name for path in searcher.unreadable] == odd
    assert "large.png has 300 x 300 pixels, 0.09 megapixels; the limit is 0.08" in caplog.text
    assert searcher.index(folder) == 8  # the limit is 200 again
    assert searcher.search(folder / "large.png", k=1)[0][0] == folder / "large.png"
    for image in (folder / "large.png", Image.open(folder / "large.png")):
        with pytest.raises(DataError, match="has 300 x 300 pixels, .* the limit is 0.08. Make"):
            searcher.search(image, max_megapixels=0.08)

    def fail(image, *args, original, **kwargs):
        if 301 in image.size:
            raise MemoryError
        return original(image, *args, **kwargs)

    (folder / "large.png").write_bytes(factory.png(np.random.default_rng(2), size=301))
    for owner, where in ((PngImagePlugin.PngImageFile, "load"), (Image.Image, "resize")):
        failing = functools.partialmethod(fail, original=getattr(owner, where))
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, failing)
            assert searcher.index(folder) == 7
            assert [path.name for path in searcher.unreadable] == odd
            with pytest.raises(DataError, match="large.png: not a readable image .MemoryError"):
                searcher.search(folder / "large.png")


def test_search_by_arrays(searcher, folder):
    searcher.index(folder)
    expected = searcher.search(folder / "2.PNG", "make it red")
    pixels = np.asarray(Image.open(folder / "2.PNG"))
    for array in (pixels, (pixels / 255).astype(np.float32), jax.numpy.asarray(pixels)):
        assert searcher.search(array, "make it red") == expected
    with pytest.raises(DataError, match="image: floats of 0 to 25[0-9]; expected 0 to 1. Give"):
        searcher.search(pixels.astype(np.float32))
