"""Image + text as BGE-VL has it: a directory with extras, queries from a text and a picture."""

import json

import jax
import numpy as np
import pytest

from cir_jax import composers, loading, weights
from tests.weights import worlds
from tests.weights.test_positions import FAST, close, make, picture


@pytest.fixture(scope="module")
def bge_vl(tmp_path_factory):
    """A CLIP as BAAI/BGE-VL-base lies on the hub: its config names code that comes with it."""
    path = tmp_path_factory.mktemp("bge") / "BGE-VL-base"
    weights.save(path, *make(), np.float16)
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoModel": "modeling_MMRet_CLIP.CLIPModel"}
    more = {"_name_or_path": "BAAI/BGE-VL-base", "auto_map": auto, "initializer_factor": 1.0}
    (path / "config.json").write_text(
        json.dumps(config | more | {"transformers_version": "4.44.2"})
    )
    (path / "modeling_MMRet_CLIP.py").write_text("raise SystemExit('code of others was run')\n")
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


@pytest.mark.peer
def test_a_bge_vl_directory_composes_as_its_own_code(bge_vl):
    """Which is transformers' CLIP, and the normalised sum of its two features."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(bge_vl, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bge_vl)
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil
    pixels = processor.from_pretrained(bge_vl)(picture(), return_tensors="pt")["pixel_values"]
    text = ["Find a picture that also is of a cat, but is red."]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)["input_ids"]
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        words = theirs.text_projection(theirs.text_model(ids).pooler_output)
        expected = torch.nn.functional.normalize(image + words, dim=-1).numpy()
    backbone, params = weights.load(bge_vl)
    composer = composers.build("image_text", backbone, unit=False)
    query = {
        "reference_images": backbone.image_transform(picture())[None],
        "token_ids": backbone.tokenizer(text),
    }
    frozen, rng = composer.freeze(params), jax.random.key(0)
    other = composers.build("image_text", backbone)
    got, unit = (
        jax.jit(one.compose, compiler_options=FAST)({}, frozen, query, rng)
        for one in (composer, other)
    )
    close(got, expected)
    assert np.abs(unit - got).max() > 1e-3


def test_presets_say_what_differs():
    for size in ("base", "large"):
        config = loading.read_experiment(f"experiments/image_text.py:bge_vl_{size}")
        assert config.composer.unit is False and config.backbone == f"BAAI/BGE-VL-{size}"
        assert "circo:bge_vl" in config.evaluation.benchmarks
    assert loading.read_experiment("experiments/image_text.py:vit_l14").composer.unit is True


def test_the_sum_is_of_unit_features_or_of_those_that_are():
    backbone, _ = worlds.make()
    image, text = np.float32([[3, 0]]), np.float32([[0, 4]])
    for unit, expected in ((True, [0.5**0.5, 0.5**0.5]), (False, [0.6, 0.8])):
        composer = composers.build("image_text", backbone, unit=unit)
        np.testing.assert_allclose(composer.fuse(image, text), [expected], rtol=1e-6)
