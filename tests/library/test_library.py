"""A library of photos: what an update reads, and what a search finds."""

import datetime
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import composers
from cir_jax.composers.compodiff import CompoDiff
from cir_jax.errors import CirError, ConfigError, DataError, WeightsError
from cir_jax.library import Library, library, photos
from cir_jax.library.library import Busy
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from tests import tiny as factory
from tests.library.folders import fill

BATCH = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": -1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def slerp(tiny, mesh, tmp_path_factory):
    composer = composers.build("slerp", tiny[0])
    cache = tmp_path_factory.mktemp("cache")
    frozen = {"backbone": tiny[1]}
    return Searcher(composer, {}, frozen, mesh=mesh, cache_dir=cache, batch_size=BATCH)


@pytest.fixture(scope="module")
def compodiff(tiny, mesh):
    sizes = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2}
    composer = CompoDiff(tiny[0], **sizes, steps=1, samples_per_query=1)
    params = jax.jit(composer.init)(jax.random.key(5))
    return Searcher(composer, params, {"backbone": tiny[1]}, mesh=mesh)


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "photos", 9)


@pytest.fixture
def lib(folder, slerp, tmp_path):
    with Library(folder, slerp, store=tmp_path / "s.sqlite") as made:
        yield made


def names(found):
    return [path.name for path, _ in found]


def changes(done):
    return {name: value for name, value in done._asdict().items() if value and name != "photos"}


def vectors(lib):
    """Path below the folder -> un-normalised vector, of the backbone."""
    found = {}
    for numbers, norms, units in lib.store.vectors(lib._plain.number):
        rows = units.astype(np.float32) * norms[:, None]
        found |= dict(zip(map(os.fsdecode, lib.store.paths(numbers)), rows, strict=True))
    return found


@pytest.fixture
def opened(monkeypatch):
    """Files that are read, and those that are decoded, by their names."""
    seen = {"read": [], "decoded": []}
    for key, name in (("decoded", "read"), ("read", "digest_of")):
        real = getattr(photos, name)

        def spy(path, *rest, key=key, real=real):
            seen[key].append(path.name)
            return real(path, *rest)

        monkeypatch.setattr(photos, name, spy)
    return seen


def test_it_finds_what_a_searcher_finds(lib, folder, slerp):
    """In half precision, and without the photo that was asked with."""
    done = lib.update()
    assert done.photos == 9 and changes(done) == {"added": 9, "decoded": 9} and len(lib) == 9
    slerp.index(folder)
    reference = folder / "2024" / "03.png"
    for query in (
        {"text": "make it red"},
        {"image": reference},
        {"image": reference, "text": "make it red"},
        {"image": reference, "text": "make it red", "alpha": 0.3},
    ):
        expected = {path: s for path, s in slerp.search(**query, k=9) if path != query.get("image")}
        found = lib.search(**query, k=9)
        assert not found.approximate and len(found) == len(expected)
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
        for path, score in found:
            assert score == pytest.approx(expected[path], abs=1e-3), (query, path)
    as_array = lib.search(np.asarray(Image.open(reference)), k=1)
    assert as_array[0] == (reference, pytest.approx(1, abs=1e-3))  # no file: nothing is left out


def test_an_update_touches_only_what_is_new(lib, folder, opened):
    lib.update()
    opened["decoded"].clear()
    assert changes(lib.update()) == {} and opened == {"read": [], "decoded": []}
    before = vectors(lib)
    (folder / "00.png").rename(folder / "2024" / "moved.png")
    (folder / "02.png").write_bytes(factory.png(np.random.default_rng(7), size=24))
    (folder / "04.png").unlink()
    (folder / "2024" / "new.png").write_bytes(factory.png(np.random.default_rng(8), size=26))
    shutil.copy(folder / "06.png", folder / "copy.png")
    os.utime(folder / "08.png")
    done = changes(lib.update())
    assert done == {"added": 2, "changed": 1, "renamed": 1, "deleted": 1, "decoded": 2}
    assert sorted(opened["decoded"]) == ["02.png", "new.png"]
    assert sorted(opened["read"]) == ["08.png", "copy.png", "moved.png"]  # of a size that is known
    after = vectors(lib)
    np.testing.assert_array_equal(after["2024/moved.png"], before["00.png"])
    np.testing.assert_array_equal(after["copy.png"], before["06.png"])
    assert np.abs(after["02.png"] - before["02.png"]).max() > 0.01
    assert set(after) == set(before) - {"00.png", "04.png"} | {
        "2024/moved.png", "2024/new.png", "copy.png",
    }  # fmt: skip
    opened["read"].clear()
    assert changes(lib.update()) == {} and not opened["read"]
    # what was kept is what a library made anew has
    with Library(folder, lib.searcher, store=lib.store.path.with_name("new")) as fresh:
        fresh.update()
        for path, vector in vectors(fresh).items():
            np.testing.assert_allclose(vector, after[path], rtol=2e-3, atol=2e-3)


def test_names_that_are_swapped(lib, folder, opened):
    lib.update()
    before = vectors(lib)
    (folder / "00.png").rename(folder / "x")
    (folder / "02.png").rename(folder / "00.png")
    (folder / "x").rename(folder / "02.png")
    opened["decoded"].clear()
    os.utime(folder / "02.png")  # of one size: only its time tells
    os.utime(folder / "00.png", ns=(1, 1))
    assert changes(lib.update()) == {"renamed": 2} and not opened["decoded"]
    np.testing.assert_array_equal(vectors(lib)["00.png"], before["02.png"])


def test_ten_thousand_photos_that_are_known(slerp, tmp_path, opened):
    """One photo under many names: its copies are recognised, and then nothing is opened."""
    folder = tmp_path / "many"
    fill(folder, 1)
    with Library(folder, slerp, store=tmp_path / "s.sqlite") as lib:
        lib.update()
        for i in range(9999):
            os.link(folder / "00.png", folder / f"copy{i}.png")
        opened["decoded"].clear()
        assert changes(lib.update()) == {"added": 9999} and not opened["decoded"]
        opened["read"].clear()
        began = time.monotonic()
        assert changes(lib.update()) == {} and time.monotonic() - began < 5
        assert opened == {"read": [], "decoded": []}
        (folder / "copy1.png").rename(folder / "renamed.png")
        (folder / "copy2.png").unlink()
        (folder / "copy3.png").unlink()
        (folder / "copy3.png").write_bytes(factory.png(np.random.default_rng(3), size=30))
        done = changes(lib.update())
        assert done == {"changed": 1, "renamed": 1, "deleted": 1, "decoded": 1}
        assert opened["decoded"] == ["copy3.png"] and len(lib) == 9999


def test_photos_that_cannot_be_read_are_told_once(lib, folder, opened):
    for name, data in (("broken.jpg", b"no image"), ("empty.png", b"")):
        (folder / name).write_bytes(data)
    (folder / "large.png").write_bytes(factory.png(np.random.default_rng(1), size=300))
    done = lib.update(max_megapixels=0.08)
    assert done.added == 12 and done.decoded == 9 and len(lib) == 9
    told = {path.name: why for path, why in done.problems}
    assert sorted(told) == ["broken.jpg", "empty.png", "large.png"]
    assert "of no format that PIL knows" in told["broken.jpg"]
    assert "has 300 x 300 pixels, 0.09 megapixels; the limit is 0.08" in told["large.png"]
    assert len(lib.search(text="red", k=20)) == 9
    opened["decoded"].clear()
    assert changes(lib.update()) == {} and not opened["decoded"]
    done = lib.update(retry=True)
    assert done.decoded == 1 and len(done.problems) == 2 and len(lib) == 10
    (folder / "broken.jpg").write_bytes(factory.png(np.random.default_rng(4)))
    assert changes(lib.update()) == {"changed": 1, "decoded": 1}


def test_a_file_that_goes_while_it_is_read_is_tried_again(lib, folder, monkeypatch):
    real = photos.read

    def gone(path, transform):
        if path.name == "00.png":
            raise PermissionError(13, "Permission denied")
        return real(path, transform)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "read", gone)
        done = lib.update()
    assert [(path.name, why) for path, why in done.problems] == [("00.png", "Permission denied")]
    assert len(lib) == 8
    assert changes(lib.update()) == {"added": 1, "decoded": 1} and len(lib) == 9


def test_a_folder_that_is_not_there_loses_nothing(lib, folder, monkeypatch):
    lib.update()
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(DataError, match="photos: no such folder"):
        lib.update()
    folder.mkdir()
    with pytest.raises(DataError, match="no photo is left of 9. Is a disk not there"):
        lib.update()
    folder.rmdir()
    folder.with_name("elsewhere").rename(folder)
    real = photos.walk

    def closed(root):
        found = real(root)
        files = {path: file for path, file in found.files.items() if not path.startswith(b"2024")}
        return found._replace(files=files, closed={b"2024": "Permission denied"})

    with monkeypatch.context() as patch:
        patch.setattr(photos, "walk", closed)
        done = lib.update()
    assert done.problems == [(folder / "2024", "Permission denied")] and not done.deleted
    assert changes(lib.update()) == {} and len(lib) == 9


def test_methods_on_one_backbone_share_its_vectors(lib, folder, tiny, mesh, opened):
    lib.update()
    opened["decoded"].clear()
    composer = composers.build("pic2word", tiny[0])
    params = jax.jit(composer.init)(jax.random.key(0))
    pic2word = Searcher(composer, params, {"backbone": tiny[1]}, mesh=mesh)
    with Library(folder, pic2word, store=lib.store.path) as other:
        assert changes(other.update()) == {} and len(other) == 9
        assert len(other.search(text="red", k=3)) == 3
    assert not opened["decoded"]
    backbone = factory.backbone(seed=3)
    searcher = Searcher(
        composers.build("slerp", backbone[0]), {}, {"backbone": backbone[1]}, mesh=mesh
    )
    with Library(folder, searcher, store=lib.store.path) as other:
        assert len(other) == 0 and other.search(text="red") == []
        assert changes(other.update()) == {"decoded": 9} and len(other) == 9
    assert changes(lib.update()) == {}


def test_a_method_with_a_gallery_of_its_own(folder, tiny, mesh, tmp_path):
    composer = composers.build("tat", tiny[0], rank=2)
    params = jax.tree.map(lambda x: x + 0.05, jax.jit(composer.init)(jax.random.key(0)))
    made = (composer, params, {"backbone": tiny[1]})
    searcher = Searcher(*made, mesh=mesh, cache_dir=tmp_path / "cache")
    searcher.index(folder)
    with Library(folder, searcher, store=tmp_path / "s.sqlite") as lib:
        assert lib.update().decoded == 18  # with its encoder, and with the backbone's
        for query in ({"image": folder / "00.png", "text": "red"}, {"text": "red"}):
            expected = dict(searcher.search(**query, k=9))
            for path, score in lib.search(**query, k=9):
                assert score == pytest.approx(expected[path], abs=2e-3)
        with pytest.raises(ConfigError, match="negative: Tat ranks by features of its own, among"):
            lib.search(folder / "00.png", "red", negative="blue")
        assert lib.search(text="red", negative="blue", k=1).approximate  # the backbone's space


def test_negatives_and_several_images_are_arithmetic(lib, folder):
    lib.update()
    a, b = folder / "00.png", folder / "02.png"
    gallery = vectors(lib)
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    compose = lambda *given: lib.searcher.composing.compose(*given).features[0]  # noqa: E731
    said = "approximate: 2 images are composed one by one and added"
    for query, expected, approximate in (
        ({"images": [a, b]}, compose(a, None) + compose(b, None), said),
        ({"images": [a, b], "weights": [1, -0.5], "text": "is red"},
         compose(a, "is red") - 0.5 * compose(b, "is red"), said),
        ({"image": a, "text": "is red", "negative": ["two", "blue"]},
         compose(a, "is red") - 0.5 * compose(None, "two") - 0.5 * compose(None, "blue"),
         "approximate: the negative text is subtracted"),
    ):  # fmt: skip
        found = lib.search(**query, k=20)
        assert found.approximate == approximate
        assert not {a, *query.get("images", ())} & {path for path, _ in found}
        for path, score in found:
            cosine = unit(gallery[str(path.relative_to(folder))]) @ unit(expected)
            assert score == pytest.approx(cosine, abs=1e-3)


def test_conditions_go_to_the_method_that_takes_them(folder, compodiff, tmp_path, slerp):
    mask = np.zeros((20, 20), np.uint8)
    mask[:, :10] = 255
    with Library(folder, compodiff, store=tmp_path / "s.sqlite") as lib:
        lib.update()
        compodiff.index(folder)
        asked = {"image": folder / "00.png", "text": "red", "k": 20}
        given = {"mask": mask, "guidance": (0.5, 3.0), "seed": 2}
        found = lib.search(**asked, **given, negative=["two", "blue"])
        assert not found.approximate and len(found) == 8
        expected = dict(compodiff.search(**asked, **given, negative_text="two, blue"))
        for path, score in found:
            assert score == pytest.approx(expected[path], abs=1e-3)
        for name, value in {**given, "mask": mask.T.copy()}.items():  # each of them counts
            other = given | {name: value if name == "mask" else (2.0, 2.0) if name[0] == "g" else 3}
            assert lib.search(**asked, **other, negative=["two", "blue"]) != found, name
        assert lib.search(**asked, **given, negative="red") != found
        with pytest.raises(ConfigError, match="mask: the region of one image; here are several"):
            lib.search(images=[folder / "00.png", folder / "02.png"], mask=mask)
    with Library(folder, slerp, store=tmp_path / "s.sqlite") as lib:
        for given, message in (
            ({"mask": mask}, "Slerp takes no mask. Methods that do: compodiff."),
            ({"steps": 3}, "Slerp takes no steps. Methods that do: compodiff."),
        ):
            with pytest.raises(ConfigError, match=message):
                lib.search(folder / "00.png", "red", **given)


def test_filters(lib, folder):
    day = datetime.datetime(2024, 5, 17, 12).timestamp()
    for path in folder.rglob("*.png"):
        os.utime(path, (day, day + 86400 * int(path.stem)))
    lib.update()
    everything = lib.search(text="red", k=20)
    assert len(everything) == 9
    under = lib.search(text="red", k=20, under="2024")
    assert under == [(path, s) for path, s in everything if path.parent.name == "2024"]
    assert lib.search(text="red", k=20, under=folder / "2024") == under
    assert lib.search(text="red", k=20, under=folder) == everything
    late = lib.search(text="red", k=20, after="2024-05-20")
    assert sorted(names(late)) == [f"{i:02}.png" for i in range(3, 9)]
    assert lib.search(text="red", k=20, after=datetime.date(2024, 5, 20)) == late
    assert lib.search(text="red", k=20, after="2025") == []
    level = everything[3][1]
    assert lib.search(text="red", k=20, min_score=level) == everything[:4]
    assert lib.search(text="red", k=2, min_score=level) == everything[:2]


def test_copies_are_shown_once(lib, folder):
    shutil.copy(folder / "00.png", folder / "2024" / "copy.png")
    lib.update()
    whole = lib.search(text="red", k=20)
    assert {"00.png", "copy.png"} <= set(names(whole))
    once = lib.search(text="red", k=20, dedup=0.999)
    twins = [n for n in names(whole) if n in ("00.png", "copy.png")]
    assert names(once) == [n for n in names(whole) if n != twins[1]]
    rows = {path: v / np.linalg.norm(v) for path, v in vectors(lib).items()}
    for path, _ in (few := lib.search(text="red", k=20, dedup=0.5)):
        own = rows[str(path.relative_to(folder))]
        others = [rows[str(p.relative_to(folder))] for p, _ in few if p != path]
        assert all(own @ other <= 0.5 + 1e-3 for other in others)
    # both are the photo that is asked with
    assert not {"00.png", "copy.png"} & set(names(lib.search(folder / "00.png", k=20)))


def test_another_process_that_indexes_is_seen(lib, folder, slerp):
    lib.update()
    assert len(lib.search(text="red", k=20)) == 9
    with Library(folder, slerp, store=lib.store.path) as other:
        (folder / "new.png").write_bytes(factory.png(np.random.default_rng(8)))
        with other.store.indexing(), pytest.raises(Busy, match="another process is indexing it"):
            lib.update()
        other.update()
    assert len(lib.search(text="red", k=20)) == 10


def test_nothing_is_indexed_yet(lib):
    assert len(lib) == 0 and lib.search(text="red") == []


def test_what_cannot_be_asked(lib, folder, tmp_path):
    lib.update()
    a, b = folder / "00.png", folder / "02.png"
    for given, error, message in (
        ({}, CirError, "an empty query"),
        ({"negative": "red"}, CirError, "an empty query"),
        ({"text": "red", "k": 0}, CirError, "k=0: ask for at least one"),
        ({"image": a, "images": [b]}, ConfigError, "image= and images= are both given"),
        ({"images": [a, b], "weights": [1]}, ConfigError, "expected one for each of several"),
        ({"image": a, "weights": [1]}, ConfigError, "expected one for each of several"),
        ({"images": [a, b], "weights": [0, 0]}, ConfigError, "not all of them 0"),
        ({"text": "red", "alpa": 1}, ConfigError, "of a search 'alpa'. Did you mean 'alpha'"),
        ({"text": "red", "under": "2025"}, DataError, "under='2025': no folder of"),
        ({"text": "red", "under": "../photos2"}, DataError, "under='../photos2': no folder of"),
        ({"text": "red", "after": "may"}, ConfigError, "after='may': expected a day such as"),
        ({"image": tmp_path / "nothing.png"}, DataError, "nothing.png: cannot be read"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            lib.search(**given)


def test_vectors_that_are_not_finite_are_refused(folder, tiny, mesh, tmp_path):
    params = jax.tree.map(lambda x: x * np.float32(1e30), tiny[1])
    searcher = Searcher(composers.build("slerp", tiny[0]), {}, {"backbone": params}, mesh=mesh)
    with (
        Library(folder, searcher, store=tmp_path / "s.sqlite") as lib,
        pytest.raises(WeightsError, match="not finite, though the input was read: .*00.png"),
    ):
        lib.update()


def test_photos_are_seen_upright(lib, folder):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.png", exif=exif)
    image.rotate(-90, expand=True).save(folder / "upright.png")
    lib.update()
    found = vectors(lib)
    np.testing.assert_allclose(found["turned.png"], found["upright.png"], rtol=1e-3, atol=1e-3)
    best = lib.search(folder / "turned.png", k=1)
    assert names(best) == ["upright.png"] and best[0][1] == pytest.approx(1, abs=1e-3)


def test_each_folder_has_a_store_of_its_own(monkeypatch, tmp_path, slerp):
    monkeypatch.setenv("CIR_JAX_LIBRARY", str(tmp_path / "stores"))
    for name in ("a/photos", "b/photos"):
        fill(tmp_path / name, 1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with Library(tmp_path / "a/photos", slerp) as one, Library(tmp_path / "b/photos", slerp) as two:
        one.update()
        assert len(one) == 1 and len(two) == 0
        assert one.store.path.parent == tmp_path / "stores"
        assert one.store.path.name.startswith("photos-")
        with Library(tmp_path / "link/photos", slerp) as same:
            assert len(same) == 1
    assert library.store_of(Path("/")).name.startswith("root-")


def test_what_image_and_text_alone_would_give(lib, folder):
    """The ranks of an explanation are those of the searches themselves."""
    lib.update()
    reference, text = folder / "2024" / "03.png", "make it red"
    found = lib.search(reference, text, k=3, explain=True)
    everything = names(lib.search(reference, text, k=9))
    assert len(everything) == 8
    for name, query in (("image", {"image": reference}), ("text", {"text": text})):
        alone = found.explained[name]
        order = lib.search(**query, k=9)
        paths = [path for path, _ in order if path != reference]
        by_number = dict(zip(order.numbers, names(order), strict=True))
        assert [by_number[number] for number, _ in alone.found] == [p.name for p in paths[:3]]
        assert alone.now == [everything.index(path.name) + 1 for path in paths[:3]]
        assert alone.ranks == [paths.index(path) + 1 for path, _ in found]
    below = lib.search(reference, text, k=3, explain=True, under="2024")
    numbers = {number for one in below.explained.values() for number, _ in one.found}
    assert numbers <= set(lib.search(text=text, under="2024").numbers)
    assert not lib.search(reference, explain=True).explained
    assert not lib.search(text=text, explain=True).explained
    nothing = lib.search(reference, text, after="2999", explain=True)
    assert not nothing and nothing.explained["image"].found == []
