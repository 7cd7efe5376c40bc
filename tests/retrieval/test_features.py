"""Each row once on any mesh; features stored, resumed, and never reused for something else."""

import dataclasses
import errno
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cir_jax.composers.base import Composer, normalise
from cir_jax.errors import DataError, WeightsError
from cir_jax.input import identity, images
from cir_jax.retrieval import features
from cir_jax.sharding.mesh import make_mesh, replicated
from cir_jax.sharding.rows import map_rows
from cir_jax.storage import atomic, chunk_store
from tests import tiny as factory


def mesh(devices):
    return make_mesh({"data": -1}, jax.devices()[:devices])


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_every_row_counts_once_whatever_the_number_of_rows(devices):
    place = mesh(devices)
    step = jax.jit(lambda batch: batch["x"] * 2, out_shardings=replicated(place))
    loaded = []

    def load(row):
        loaded.append(row)
        return {"x": np.full(3, row, np.float32)}

    for n in range(1, 34):
        loaded.clear()
        out = np.concatenate(list(map_rows(step, load, n, mesh=place, batch_size=8)))
        np.testing.assert_array_equal(out, np.tile(2.0 * np.arange(n)[:, None], (1, 3)))
        assert sorted(loaded) == list(range(n))  # padding is not loaded again
    tail = np.concatenate(list(map_rows(step, load, 33, first=20, mesh=place, batch_size=8)))
    np.testing.assert_array_equal(tail[:, 0], 2.0 * np.arange(20, 33))


def test_fsdp_and_tensor_axes_give_the_same_rows():
    place = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    step = jax.jit(lambda batch: batch["x"], out_shardings=replicated(place))
    load = lambda row: {"x": np.float32(row)}  # noqa: E731
    out = np.concatenate(list(map_rows(step, load, 11, mesh=place, batch_size=4)))
    np.testing.assert_array_equal(out, np.arange(11))


def test_an_error_of_the_loader_arrives_and_ends_the_threads():
    import threading

    place = mesh(1)

    def load(row):
        if row == 5:
            raise DataError("record 5 is broken")
        return {"x": np.float32(row)}

    with pytest.raises(DataError, match="record 5 is broken"):
        list(map_rows(lambda batch: batch["x"], load, 9, mesh=place, batch_size=2))
    assert not [t for t in threading.enumerate() if t.name.startswith("load")]


class Table(factory.MemoryTable):
    """Counts what is read, and can be killed."""

    def __init__(self, records):
        super().__init__(records)
        self.reads, self.dies_at = [], None

    def identity(self):
        return "table 1"

    def __getitem__(self, index):
        if index == self.dies_at:
            raise KeyboardInterrupt
        self.reads.append(int(index))
        return super().__getitem__(index)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return Table([{"image": factory.png(rng)} for _ in range(22)])


def run(tiny, table, cache_dir, devices=1, params=None, **kwargs):
    backbone, own = tiny
    return features.image_features(
        backbone,
        own if params is None else params,
        table,
        "image",
        mesh=mesh(devices),
        batch_size=4,
        cache_dir=cache_dir,
        **kwargs,
    )


def test_features_are_the_backbones_and_stored_once(tiny, table, tmp_path):
    backbone, params = tiny
    pixels = np.stack(
        [features.read_image(table, i, "image", backbone.image_transform) for i in range(22)]
    )
    expected = np.asarray(jax.jit(backbone.encode_image)(params, pixels))
    table.reads.clear()
    found = run(tiny, table, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(table.reads) == 22 and found.dtype == np.float32
    again = run(tiny, table, tmp_path)
    np.testing.assert_array_equal(again, found)
    assert len(table.reads) == 22  # nothing was read
    unit = run(tiny, table, tmp_path, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    assert len(table.reads) == 22  # the normalised ones share the store


def test_a_killed_extraction_resumes_with_the_same_features(tiny, table, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 6)
    whole = run(tiny, table, None)
    table.reads.clear()
    table.dies_at = 19
    with pytest.raises(KeyboardInterrupt):
        run(tiny, table, tmp_path)
    stored = sorted(path.name for path in tmp_path.glob("*/chunk_*"))
    assert stored[:2] == ["chunk_00000.npy", "chunk_00001.npy"] and len(stored) < 4
    table.dies_at = None
    table.reads.clear()
    resumed = run(tiny, table, tmp_path)
    assert min(table.reads) == 6 * len(stored)
    np.testing.assert_allclose(resumed, whole, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("*/.*"))


def test_a_damaged_chunk_is_computed_again(tiny, table, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 6)
    whole = run(tiny, table, tmp_path)
    second = next(tmp_path.glob("*/chunk_00001.npy"))
    second.write_bytes(second.read_bytes()[:100])
    table.reads.clear()
    np.testing.assert_allclose(run(tiny, table, tmp_path), whole, rtol=1e-5, atol=1e-6)
    assert min(table.reads) == 6


def test_other_weights_preprocessing_or_images_are_never_reused(tiny, table, tmp_path):
    backbone, params = tiny
    first = run(tiny, table, tmp_path)

    def reads(*args, **kwargs):
        table.reads.clear()
        found = run(*args, **kwargs)
        return len(table.reads), found

    # fine-tuned parameters under the old name
    tuned = jax.tree.map(lambda x: x * 1.01, params)
    count, found = reads(tiny, table, tmp_path, params=tuned)
    assert count == 22 and not np.allclose(found, first, atol=1e-4)
    transform = dataclasses.replace(backbone.image_transform, resize=18)
    other = dataclasses.replace(backbone, image_transform=transform)
    assert reads((other, params), table, tmp_path)[0] == 22
    renamed = dataclasses.replace(backbone, weights_id="other@1")
    assert reads((renamed, params), table, tmp_path)[0] == 22
    half = backbone.with_dtype(jnp.bfloat16)
    count, found = reads((half, params), table, tmp_path)
    assert count == 22 and not np.allclose(found, first, atol=1e-6)
    # those of float32 that a device might have rounded, of an earlier version
    assert backbone.identity["products"] == "highest" != half.identity["products"]
    table.identity = lambda: "table 2"
    assert reads(tiny, table, tmp_path)[0] == 22
    assert reads(tiny, table, tmp_path)[0] == 0


def test_each_preprocessing_of_the_config_has_its_own_features(tiny, tmp_path):
    backbone, params = tiny
    rng = np.random.default_rng(1)
    wide = [Image.fromarray(rng.integers(0, 255, (20, 60, 3), np.uint8)) for _ in range(3)]
    buffers = [io.BytesIO() for _ in wide]
    for image, buffer in zip(wide, buffers, strict=True):
        image.save(buffer, "PNG")
    table, found = Table([{"image": buffer.getvalue()} for buffer in buffers]), []
    for name in ("clip", "targetpad", "squarepad"):
        other = backbone.with_preprocessing(name)
        assert other.image_transform.statistics == backbone.image_transform.statistics
        for reads in (3, 0):  # computed, then from its own entry of the cache
            table.reads.clear()
            result = run((other, params), table, tmp_path)
            assert len(table.reads) == reads
        found.append(result)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[i] - found[j]).max() > 1e-3
    padded = other.image_transform(wide[0])  # to a square, with black
    assert not padded[0].any() and not padded[-1].any() and padded[8].any()


def test_a_description_that_does_not_match_is_not_trusted(tiny, table, tmp_path):
    run(tiny, table, tmp_path)
    meta = next(tmp_path.glob("*/meta.json"))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"weights": "forged"}))
    table.reads.clear()
    run(tiny, table, tmp_path)
    assert len(table.reads) == 22


def test_records_without_an_identity_are_told_apart_by_content(table):
    records = [dict(record) for record in table.records]
    before = identity.source_identity(records, "image")
    assert before == identity.source_identity([dict(r) for r in records], "image")
    records[3]["image"] += b"0"
    assert before != identity.source_identity(records, "image")


def test_unreadable_images_are_errors_or_rows_of_nan(tiny, table, tmp_path):
    table.records[4] = {"image": b"nothing"}
    with pytest.raises(DataError, match="record 4"):
        run(tiny, table, tmp_path)
    for _ in range(2):  # computed, then from the store
        found = run(tiny, table, tmp_path, skip_unreadable=True, normalise=True)
        assert np.isnan(found[4]).all() and np.isfinite(np.delete(found, 4, axis=0)).all()


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_what_the_weights_spoil_is_no_unreadable_image(tiny, table, tmp_path, skip_unreadable):
    """Nothing of it is stored, and what earlier versions stored of it is computed again."""
    backbone, params = tiny
    damaged = jax.tree.map(lambda x: x * 1e30, params)
    message = (
        r"un-normalised: not finite, though the input was read: MemoryTable\(memory\), record 0, .*"
        "and 1 more. Computed in float32 with tiny@0: these weights or .*get the weights again"
    )
    with pytest.raises(WeightsError, match=message):
        run(tiny, table, tmp_path, params=damaged, skip_unreadable=skip_unreadable)
    assert not list(tmp_path.glob("*/chunk*"))
    good = run(tiny, table, tmp_path, skip_unreadable=skip_unreadable)
    (chunk,) = tmp_path.glob("*/chunk*")
    stored = np.load(chunk)
    stored[3, 5] = np.nan
    np.save(chunk, stored)
    again = run(tiny, table, tmp_path, skip_unreadable=skip_unreadable)
    np.testing.assert_array_equal(again, good)
    np.testing.assert_array_equal(np.load(chunk), good)


def test_rows_of_nan_are_of_one_limit_of_pixels(tiny, table, tmp_path):
    """What was left out under another limit is not taken from the store."""
    table.records[4] = {"image": factory.png(np.random.default_rng(0), size=100)}
    options = dict(skip_unreadable=True)
    for limit, left_out in ((None, False), (0.009, True), (None, False)):
        with images.limited(limit):
            found = run(tiny, table, tmp_path, **options)
        assert np.isnan(found[4]).all() == left_out, limit


class Scaled(Composer):
    """Has gallery features of its own."""

    def __init__(self, backbone, factor=1.0):
        super().__init__(backbone)
        self.factor = factor

    def embed_gallery(self, params, frozen, images):
        x = images.astype(np.float32).mean(axis=(1, 2)) + params["shift"] * self.factor
        return normalise(x)


def test_gallery_features_of_a_composers_own_are_stored_by_parameters_and_settings(
    tiny, table, tmp_path
):
    backbone, params = tiny

    def reads(shift, factor=1.0):
        table.reads.clear()
        found = features.gallery_features(
            Scaled(backbone, factor),
            {"shift": np.full((1, 3), shift, np.float32)},
            {"backbone": params},
            table,
            mesh=mesh(1),
            batch_size=4,
            cache_dir=tmp_path,
        )
        assert found.shape == (22, 3)
        return len(table.reads)

    assert [reads(1), reads(1), reads(2), reads(1, 3.0), reads(1, 3.0)] == [22, 0, 22, 22, 0]


class Logarithm(Composer):
    """Has no features of black images, and no query for the third."""

    def embed_gallery(self, params, frozen, images):
        return jnp.log(images.astype(np.float32).mean(axis=(1, 2)))

    def compose(self, params, frozen, query, rng):
        return jnp.log(jnp.abs(query["query_index"].astype(jnp.float32) - 2))[:, None]


def test_the_record_and_the_query_that_go_wrong_are_named(tiny, table, tmp_path):
    composer, where = Logarithm(tiny[0]), dict(mesh=mesh(1), batch_size=4)
    black = io.BytesIO()
    Image.new("RGB", (20, 20)).save(black, "PNG")
    table.records[4] = {"image": b"nothing"}
    table.records[6] = {"image": black.getvalue(), "name": b"night.png"}
    message = r"Logarithm.embed_gallery: not finite.* read: Memory.*, record 6 \(night.png\)\. Comp"
    with pytest.raises(WeightsError, match=message):
        features.gallery_features(
            composer, {}, {}, table, cache_dir=tmp_path, skip_unreadable=True, **where
        )
    message = "circo queries, composed by Logarithm: not finite, .* read: query 2. Computed in fl"
    with pytest.raises(WeightsError, match=message):
        features.query_features(
            composer,
            {},
            {},
            np.ones((7, 8), np.int32),
            np.arange(7, dtype=np.int32),
            reference_features=np.zeros((7, 24), np.float32),
            description="circo queries",
            **where,
        )


def test_noise_belongs_to_the_query_not_to_the_batch(tiny):
    backbone, params = tiny

    class Noisy(Composer):
        def compose(self, params, frozen, query, rng):
            def one(i):
                return jax.random.normal(jax.random.fold_in(rng, i), (4,))

            return jax.vmap(one)(query["query_index"])

    def run(seed, **kwargs):
        return features.query_features(
            Noisy(backbone),
            {},
            {"backbone": params},
            np.ones((7, 8), np.int32),
            np.arange(7, dtype=np.int32),
            reference_features=np.zeros((7, 24), np.float32),
            seed=seed,
            **kwargs,
        )

    first = run(0, mesh=mesh(1), batch_size=7)
    np.testing.assert_array_equal(first, run(0, mesh=mesh(3), batch_size=3))
    assert not np.array_equal(first, run(1, mesh=mesh(1), batch_size=7))


def part(picture, box):
    """A record of which the part in the box is meant."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"image": buffer.getvalue(), "crop": np.asarray(box, np.int32)}


def test_stored_tokens_are_those_of_the_tower(tiny_blip, table, tmp_path):
    """A row of each image; of a tower in bfloat16, too, which no file of numbers holds."""
    backbone = tiny_blip[0].with_dtype(jnp.bfloat16)
    options = dict(mesh=mesh(1), batch_size=32, cache_dir=tmp_path, tokens=True)
    stored = features.stored_features(backbone, tiny_blip[1], table, **options)
    assert stored.shape == (22, *backbone.visual_shape)
    read = [features.read_image(table, row, "image", backbone.image_transform) for row in range(22)]
    with backbone.full_precision():
        tokens = jax.jit(backbone.visual_tokens)(tiny_blip[1], np.stack(read))
    for row in range(22):
        np.testing.assert_allclose(stored[row], tokens[row].astype(np.float32), atol=0.05)


def test_a_part_is_cut_out_and_padded_to_a_black_square():
    pixels = np.random.default_rng(0).integers(1, 255, (10, 20, 3), np.uint8)
    picture = Image.fromarray(pixels)
    square = np.asarray(features.open_image(part(picture, (3, 2, 10, 6)), "image", "record"))
    # 7 x 4: three missing rows, one above (rounded down) and two below
    expected = np.zeros((7, 7, 3), np.uint8)
    expected[1:5] = pixels[2:6, 3:10]
    np.testing.assert_array_equal(square, expected)
    whole = features.open_image(part(picture, (0, 0, 0, 0)), "image", "record")
    np.testing.assert_array_equal(np.asarray(whole), pixels)
    with pytest.raises(DataError, match=r"record 3: crop \(3, 2, 30, 6\) is not inside"):
        features.open_image(part(picture, (3, 2, 30, 6)), "image", "record 3")
    said = "record 3: its part as a square has 20 x 20 pixels, 0.0004 megapixels"
    with images.limited(0.0003), pytest.raises(DataError, match=said):
        features.open_image(part(picture, (0, 0, 20, 1)), "image", "record 3")


def test_two_parts_of_one_image_are_two_images_for_the_cache(tiny, tmp_path):
    pixels = np.random.default_rng(0).integers(1, 255, (40, 40, 3), np.uint8)
    picture = Image.fromarray(pixels)
    one, other = [part(picture, (0, 0, 20, 20))], [part(picture, (20, 20, 40, 40))]
    a, b = run(tiny, one, tmp_path), run(tiny, other, tmp_path)
    assert not np.allclose(a, b, atol=1e-4)
    alone = [{"image": part(Image.fromarray(pixels[20:, 20:]), (0, 0, 0, 0))["image"]}]
    np.testing.assert_allclose(b, run(tiny, alone, tmp_path), rtol=1e-4, atol=1e-5)


def test_a_full_disk_is_an_error_that_says_what_to_do(tiny, table, tmp_path, monkeypatch):
    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match="x.json: cannot be written .No space left on device.*Free"):
        atomic.write_atomically(tmp_path / "x.json", full)
    assert not list(tmp_path.iterdir())  # nothing half-written
    monkeypatch.setattr(chunk_store.np, "save", lambda file, rows: full(file))
    with pytest.raises(DataError, match="chunk_00000.npy: cannot be written"):
        run(tiny, table, tmp_path)
    assert not list(tmp_path.glob("*/chunk*"))


def test_text_queries_say_that_they_have_no_reference(tiny):
    backbone, params = tiny

    class Says(Composer):
        def compose(self, params, frozen, query, rng):
            given = query.get("has_reference", jnp.ones(len(query["token_ids"]), bool))
            return given.astype(jnp.float32)[:, None]

    arguments = dict(reference_features=np.zeros((3, 24), np.float32), mesh=mesh(1), batch_size=2)
    ids, index = np.ones((3, 8), np.int32), np.arange(3, dtype=np.int32)
    for given in (True, False):
        found = features.query_features(
            Says(backbone), {}, {"backbone": params}, ids, index, has_reference=given, **arguments
        )
        assert (found == given).all()
