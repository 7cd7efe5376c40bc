"""Masks by CLIPSeg: a tiny random one through transformers, and what is made of its numbers."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input import masks
from cir_jax.input.tables import Table
from data import build, shards
from data.masked_pairs import clipseg
from tests.data.corpora import jpeg

WORDS = ["fox", "number", "star"]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A directory as transformers saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clipseg")
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": 1}
    config = transformers.CLIPSegConfig(
        text_config={"hidden_size": 16, "vocab_size": len(tokens), **ids, **shared},
        vision_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, **shared},
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPSegForImageSegmentation(config)
    model.save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    resize = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=resize)
    transformers.CLIPSegProcessor(processor, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def source(tmp_path):
    """Ten pairs with a dictionary of nouns."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [f"{i}.jpg\ta fox and a star" if i % 2 else f"{i}.jpg\tnothing" for i in range(10)]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(jpeg(25 * i, side=24))
    nouns = tmp_path / "nouns.json"
    nouns.write_text(json.dumps({"NOUN": WORDS}))
    options = {"source": folder, "name": "own", "segmenter": "", "keywords": str(nouns)}
    return options


def read(built):
    table = Table(built, "own", "masked", "train")
    return [dict(table[i]) for i in range(len(table))]


def test_a_mask_is_of_the_largest_probabilities_of_its_words():
    levels = np.zeros((64, 64))
    levels[:32] = 0.6
    np.testing.assert_array_equal(clipseg.cut(levels), levels > 0.5)
    levels = np.arange(4096).reshape(64, 64) / 10_000  # none is over a half
    mask = clipseg.cut(levels)
    assert mask.sum() == 409 and mask.ravel()[-409:].all()
    assert clipseg.cut(np.full((64, 64), 0.2)).sum() == 409  # ties, too


def test_masks_as_transformers_gives_them_joined_over_words(segmenter, monkeypatch):
    import torch

    model = clipseg.ClipSeg.load(str(segmenter))
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    words = [["fox", "star"], ["number"]]
    found = []
    monkeypatch.setattr(clipseg, "cut", lambda levels: found.append(levels) or levels > 0.5)
    together = model.masks(images, words)
    assert [mask.shape for mask in together] == [(64, 64)] * 2
    for image, of, got in zip(images, words, found, strict=True):
        levels = []
        for word in of:
            inputs = model.processor(text=[word], images=[image], return_tensors="pt")
            with torch.no_grad():
                logits = model.model(**inputs).logits.reshape(1, 1, 32, 32)
            size = {"size": (64, 64), "mode": "bilinear", "antialias": True}
            levels.append(torch.sigmoid(torch.nn.functional.interpolate(logits, **size)))
        np.testing.assert_allclose(got, torch.cat(levels).amax(0)[0].numpy(), atol=1e-5)


def test_the_table_and_a_build_that_goes_on(segmenter, source, tmp_path, monkeypatch):
    source["segmenter"] = str(segmenter)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build.prepare("masked_pairs", None, whole, **source)
    rows = read(whole)
    assert len(rows) == 10 and rows[1]["captions"] == [b"a fox and a star"]
    assert all(masks.unpack(row["mask"], "mask").any() for row in rows)
    assert build.check("masked_pairs", None, whole, "own") == {"masked": {"train": 10}}

    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    monkeypatch.setattr("data.masked_pairs.masked_pairs_dataset_builder.TOGETHER", 2)
    segment, calls = clipseg.ClipSeg.masks, []

    def stopping(self, images, words):
        calls.append(words)
        if len(calls) == 4 and os.environ.get("STOP"):
            raise KeyboardInterrupt
        return segment(self, images, words)

    monkeypatch.setattr(clipseg.ClipSeg, "masks", stopping)
    monkeypatch.setenv("STOP", "1")
    with pytest.raises(KeyboardInterrupt):
        build.prepare("masked_pairs", None, killed, **source)
    monkeypatch.delenv("STOP")
    calls.clear()
    build.prepare("masked_pairs", None, killed, **source)
    assert read(killed) == rows and len(calls) < 5
    with pytest.raises(DataError, match="is there already, made of other files"):
        changed = source | {"segmenter": "another/clipseg"}
        build.prepare("masked_pairs", None, whole, **changed)


def test_what_there_is_no_segmenter_in(segmenter, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="no CLIPSeg could be loaded.*clipseg-rd64-refined"):
        clipseg.ClipSeg.load(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'cir_jax\[clipseg\]'"):
        clipseg.ClipSeg.load(str(segmenter))


def test_a_corpus_without_masks_says_how_to_make_them(tmp_path):
    with pytest.raises(DataError, match="no prepared table own/masked.*--dataset=masked_pairs"):
        Table(tmp_path, "own", "masked", "train")
