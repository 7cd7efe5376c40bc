"""Published CLIP directories give the original's numbers, or a message: transformers is the judge.

Every row of `published.CLIP` is written to disk with its fields and quirks, small and with random
weights that transformers makes of that very config; then a string and a PNG go through both.
"""

import copy
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.input.text import OPENAI_VOCABULARY, read_merges
from cir_jax.models.backbone import pixels
from cir_jax.models.clip import ClipConfig
from tests import peers
from tests.weights import published
from tests.weights.published import (
    B16,
    B32,
    CASCADE,
    CLIP,
    FLUX,
    IP_ADAPTER,
    L14,
    PLAYGROUND,
    SD3,
    SD15,
    SD21,
    SDXL,
    XENOVA,
)

pytestmark = pytest.mark.peer
Rows = dict[str, tuple[str, str]]  # place in the directory -> (model, file)

CAPTIONS = ["a red cat", "It's $ , but 2 DOGS  run", "a photo of $ that has no people", "x"]
EXCLAMATION = ["look ! a dog!", "wow!!"]


def of(model: str, mark: str = "") -> Rows:
    """The files of a model whose names have this mark, or none."""
    named = r"\w+\.json(\.head)?"
    return {
        published.place(model, file): (model, file)
        for file in CLIP[model]
        if (mark in file if mark else re.fullmatch(named, file))
    }


def only(rows: Rows, *names: str) -> Rows:
    return {place: row for place, row in rows.items() if place.startswith(names)}


def moved(rows: Rows, folder: str) -> Rows:
    return {f"{folder}/{place}": row for place, row in rows.items()}


def repository(prefix: str) -> Rows:
    """A diffusers repository: every part in its own folder."""
    return {k: v for model in CLIP if model.startswith(prefix) for k, v in of(model).items()}


TOKENS = only(of(L14), "special", "tokenizer")
REVISIONS = ("352f696", "54e5da6", "e4d7ab3", "e45c025")
TWO_TOWERS: dict[str, Rows] = {
    "B/16": of(B16),
    "B/32 as documented": of(B16) | of(B32, "from-clip"),
    "B/32 by 4.52": of(B16) | of(B32, "taggui") | of(B32, "4.52.4"),
    "B/32 by 4.57": of(B32, "4.57.0"),
    "B/32 by 5.0": of(B32, "5.0.0"),
    "B/32 of Xenova": of(XENOVA),
    "L/14": of(L14),
    "L/14 by 5.5": of(L14, "v5"),
    **{f"L/14 at {revision}": of(L14) | of(L14, revision) for revision in REVISIONS},
}
# case: rows, the folder of the tower, of its tokenizer (texts) or preprocessing (images)
TEXTS: dict[str, tuple[Rows, str, str]] = {
    "L/14 texts by 4.26": (TOKENS | of(L14, "textonly"), "", ""),
    "L/14 texts by 4.51": (of(L14, "4.51.3"), "", ""),
    "SD 1.5": (repository(SD15), "text_encoder", "tokenizer"),
    "SD 2.1": (repository(SD21), "text_encoder", "tokenizer"),
    "SD 3": (repository(SD3) | moved(TOKENS, "tokenizer"), "text_encoder", "tokenizer"),
    "SD 3, second": (repository(SD3), "text_encoder_2", "tokenizer_2"),
    "SDXL": (repository(SDXL), "text_encoder", "tokenizer"),
    "SDXL, second": (repository(SDXL), "text_encoder_2", "tokenizer_2"),
    "Playground": (repository(PLAYGROUND), "text_encoder", "tokenizer"),
    "Playground, second": (repository(PLAYGROUND), "text_encoder_2", "tokenizer_2"),
    "Stable Cascade": (repository(CASCADE), "text_encoder", "tokenizer"),
    "FLUX": (repository(FLUX) | moved(TOKENS, "tokenizer"), "text_encoder", "tokenizer"),
}
IMAGES: dict[str, tuple[Rows, str, str]] = {
    "B/32 images by 4.35": (of(B32, "visiononly"), "", ""),
    "Stable Cascade's images": (repository(CASCADE), "image_encoder", "feature_extractor"),
    "IP-Adapter": (repository(IP_ADAPTER), "image_encoder", ""),
}
REFUSED: dict[str, Rows] = {
    "L/14 at eb96ff9": of(L14) | of(L14, "eb96ff9"),
    "SD 1.5's safety checker": repository(SD15),
}


def test_every_row_is_in_a_case():
    cases = [*TWO_TOWERS.values(), *REFUSED.values()]
    cases += [rows for rows, *_ in (*TEXTS.values(), *IMAGES.values())]
    used = {row for rows in cases for row in rows.values()}
    assert used == {(model, file) for model, files in CLIP.items() for file in files}
    assert len(used) == 80


# --- writing them


@pytest.fixture(scope="module")
def transformers():
    return published.transformers()


@pytest.fixture(scope="module")
def merges():
    """CLIP's own, which only open_clip's package has."""
    return read_merges(Path(peers.open_clip().__file__).with_name(OPENAI_VOCABULARY))


@pytest.fixture(scope="module")
def words(merges):
    """Token -> id, in CLIP's order."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    names = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges)]
    return {name: i for i, name in enumerate([*names, published.START, published.END])}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return published.picture(tmp_path_factory.mktemp("picture"))


def tokenizer_json(form, words, merges):
    """A tokenizer.json as its head shows it."""
    _, names_special, end, strings = form
    regex = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    regex = r"<\|startoftext\|>|<\|endoftext\|>|" + regex if names_special else regex
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": True} if names_special else {}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    replace = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    ends = {name: [token, words[token]] for name, token in
            (("sep", published.END), ("cls", published.START))}  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": published.END, "fuse_unk": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "vocab": words}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": words[token], "content": token, "normalized": normalized, **special}
            for token, normalized in ((published.START, True), (published.END, end))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, replace, {"type": "Lowercase"}],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "RobertaProcessing", **ends, "trim_offsets": False}
        | {"add_prefix_space": False},
        "decoder": level | {"add_prefix_space": True},
        "model": model | {"merges": [" ".join(m) for m in merges] if strings else merges},
    }


@pytest.fixture(scope="module")
def write(words, merges):
    """Writes rows to a directory, without weights."""
    heads: dict = {}

    def contents(row):
        value = CLIP[row[0]][row[1]]
        if isinstance(value, tuple):
            if value not in heads:
                heads[value] = json.dumps(tokenizer_json(value, words, merges))
            return heads[value]
        config = row[1].startswith("config")
        text = json.dumps(published.small(value) if config else value, indent=2)
        if "eb96ff9" in row[1]:
            text = re.sub(r'(_config_dict": \{[^}]*[^\s])(\s*\})', r"\1,\2", text)
        return text

    def run(path: Path, rows: Rows) -> Path:
        for place, row in rows.items():
            (path / place).parent.mkdir(parents=True, exist_ok=True)
            (path / place).write_text(contents(row))
        for folder in {(path / place).parent for place in rows if "tokenizer" in place}:
            if not (folder / "tokenizer.json").exists():
                (folder / "vocab.json").write_text(json.dumps(words))
                lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
                (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        return path

    return run


def model_of(transformers, path: Path):
    """The model that transformers makes of a config.json, with random weights saved beside it."""
    import torch
    from safetensors.torch import save_file

    config = transformers.AutoConfig.from_pretrained(path)
    kind = getattr(transformers, config.architectures[0])
    tensors = published.random_tensors(kind(config), config.dtype or torch.float32)
    if kind is transformers.CLIPTextModel:  # as it was saved before transformers 5
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return kind.from_pretrained(path, dtype=torch.float32).eval()


# --- comparing


def same_ids(backbone, theirs) -> np.ndarray:
    """Ids of texts alone and padded to 77; returns the padded ones."""
    ids = backbone.tokenizer(CAPTIONS, 77)
    padded = theirs(CAPTIONS, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids, padded)
    for row, alone in zip(ids, theirs(CAPTIONS)["input_ids"], strict=True):
        np.testing.assert_array_equal(row[: len(alone)], alone)
    assert (ids[:, 0] == 49406).all()
    return ids


def same_pixels(transformers, backbone, path: Path, picture: Path):
    """Pixels of the PNG as the model gets them: float[1, 224, 224, 3]."""
    # not the Auto class: it does not know the old name CLIPFeatureExtractor
    processor = transformers.CLIPImageProcessorPil.from_pretrained(path)
    theirs = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    transform = backbone.image_transform
    ours = transform(images.read(picture))[None]
    published.near(pixels(ours, transform), theirs.permute(0, 2, 3, 1), 1e-6)
    return ours, theirs


@pytest.mark.parametrize("case", TWO_TOWERS)
def test_two_towers(transformers, write, picture, tmp_path, case):
    import torch

    path = write(tmp_path, TWO_TOWERS[case])
    model = model_of(transformers, path)
    backbone, params = weights.load(path)
    ids = same_ids(backbone, transformers.AutoTokenizer.from_pretrained(path))
    ours, theirs = same_pixels(transformers, backbone, path, picture)
    with torch.no_grad():
        text = model.get_text_features(torch.tensor(ids).long())
        image = model.get_image_features(theirs)
    run = jax.jit(lambda p: (backbone.encode_text(p, ids), backbone.encode_image(p, ours)))
    for features, expected in zip(run(params), (text, image), strict=True):
        published.near(features, expected.pooler_output)


@pytest.fixture(scope="module")
def image_half(transformers, write, tmp_path_factory):
    """The image tower that text towers are paired with."""
    path = write(tmp_path_factory.mktemp("images"), of(B32, "visiononly"))
    model_of(transformers, path)
    return path


@pytest.fixture(scope="module")
def text_half(transformers, write, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("texts"), TEXTS["L/14 texts by 4.26"][0])
    model_of(transformers, path)
    return path


@pytest.mark.parametrize("case", TEXTS)
def test_text_towers(transformers, write, image_half, tmp_path, case):
    """Half of a pair: all 77 hidden states, which CompoDiff attends to, padding included."""
    import torch

    rows, folder, tokens = TEXTS[case]
    path = write(tmp_path, rows)
    model = model_of(transformers, path / folder)
    with pytest.raises(WeightsError, match=r"(?s)clip_text_model.*IMAGES\+TEXTS"):
        weights.load(path / folder)
    pair, params = weights.load(f"{image_half}+{path / folder}")
    theirs = transformers.AutoTokenizer.from_pretrained(path / tokens)
    ids = same_ids(pair, theirs)
    with torch.no_grad():
        hidden = model(torch.tensor(ids).long()).last_hidden_state
    published.near(jax.jit(pair.text_hidden_states)(params, ids), hidden)
    assert theirs.pad_token_id == pair.tokenizer.pad_id


def test_a_tower_that_transformers_5_saves(transformers, write, image_half, text_half, tmp_path):
    """Its names have no prefix, and its config the fields of today."""
    model = transformers.CLIPTextModel.from_pretrained(text_half)
    path = write(tmp_path / "now", TOKENS)
    model.save_pretrained(path)
    (_, before), (pair, after) = (
        weights.load(f"{image_half}+{texts}") for texts in (text_half, path)
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert pair.tokenizer.pad_id == 49407


@pytest.mark.parametrize("case", IMAGES)
def test_image_towers(transformers, write, text_half, picture, tmp_path, case):
    import torch

    rows, folder, processor = IMAGES[case]
    path = write(tmp_path, rows)
    model = model_of(transformers, path / folder)
    with pytest.raises(WeightsError, match=r"(?s)clip_vision_model.*IMAGES\+TEXTS"):
        weights.load(path / folder)
    if case == "IP-Adapter":  # has none
        with pytest.raises(WeightsError, match="preprocessor_config.json is missing"):
            weights.load(f"{path / folder}+{text_half}")
        write(path, moved(only(of(L14), "preprocessor"), folder))
        processor = folder
    pair, params = weights.load(f"{path / folder}+{text_half}")
    ours, theirs = same_pixels(transformers, pair, path / processor, picture)
    with torch.no_grad():
        expected = model(theirs)
    run = jax.jit(lambda p: (pair.encode_image(p, ours), pair.visual_tokens(p, ours)))
    for features, wanted in zip(
        run(params), (expected.image_embeds, expected.last_hidden_state), strict=True
    ):
        published.near(features, wanted)


def test_exclamation_marks_are_text(write, tmp_path, image_half, transformers):
    """Where "!" (id 0) pads, transformers takes every "!" of a text for padding. The towers were
    trained with OpenCLIP's tokenizer, to which it is a sign like any other; so it is here."""
    simple = peers.open_clip().tokenizer.SimpleTokenizer(context_length=77)
    rows, folder, tokens = TEXTS["SDXL, second"]
    path = write(tmp_path, rows)
    model_of(transformers, path / folder)
    theirs = transformers.AutoTokenizer.from_pretrained(path / tokens)
    assert theirs(EXCLAMATION)["input_ids"][0][2] == 0
    texts = [*EXCLAMATION, *CAPTIONS]
    for _ in range(2):
        pair, _ = weights.load(f"{image_half}+{path / folder}")
        np.testing.assert_array_equal(pair.tokenizer(texts, 77), simple(texts))
        # once more from the tokenizer.json that transformers makes of it, where "!" is special
        theirs.save_pretrained(path / tokens)


def test_refused(transformers, write, tmp_path):
    path = write(tmp_path / "L14", REFUSED["L/14 at eb96ff9"])
    with pytest.raises(WeightsError, match=r"config.json: not valid JSON .*copy it again"):
        weights.load(path)
    path = write(tmp_path / "SD", REFUSED["SD 1.5's safety checker"]) / "safety_checker"
    from safetensors.numpy import save_file

    names = ("concept_embeds", "vision_model.vision_model.embeddings.class_embedding")
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, path / "model.safetensors")
    with pytest.raises(WeightsError, match="StableDiffusionSafetyChecker.*expected CLIP"):
        weights.load(path)


def test_the_published_sizes(transformers):
    """The configs with their true sizes, class defaults included where a dict takes them."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    for rows in TWO_TOWERS.values():
        model, file = rows["config.json"]
        config = ClipConfig.from_dict(CLIP[model][file])
        theirs = transformers.CLIPConfig(**copy.deepcopy(CLIP[model][file]))
        for ours, expected in (
            (config.text, theirs.text_config),
            (config.vision, theirs.vision_config),
        ):
            for name in (*sizes, "hidden_act", "layer_norm_eps"):
                assert getattr(ours, name) == getattr(expected, name), (file, name)
        assert config.projection_dim == theirs.projection_dim
        assert config.vision.patch_size == theirs.vision_config.patch_size
