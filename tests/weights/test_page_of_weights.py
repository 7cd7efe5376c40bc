"""The snippets of docs/weights.md run as they are printed, on small models under the same names."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cir_jax import weights
from cir_jax.models import light
from cir_jax.storage.places import SHIPPED
from cir_jax.weights import files, timm
from tests.weights import worlds
from tests.weights.test_encoders import write_t5

PAGE = (SHIPPED / "docs" / "weights.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A working directory whose folders are called as the hub ids are."""
    for name in ("openai", "Salesforce", "google", "timm"):
        (tmp_path / name).mkdir()
    weights.save(tmp_path / "openai/clip-vit-large-patch14", *worlds.make())
    weights.save(tmp_path / "Salesforce/blip-itm-base-coco", *worlds.make_blip(tmp_path))
    write_t5(tmp_path / "google/flan-t5-xl")
    directory = tmp_path / "timm/mobilenetv2_100.ra_in1k"
    directory.mkdir()
    model = light.create("mobilenetv2_100")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), timm.shapes(model))
    save_file(timm.to_tensors(zeros, model), directory / "model.safetensors")
    config = {"architecture": "mobilenetv2_100", "pretrained_cfg": {}}
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_snippets_run(named):
    assert len(SNIPPETS) == 3  # of the third see tests/composers/test_shared.py
    loading, saving = {}, {}
    exec(SNIPPETS[0], loading)
    assert loading["texts"].shape == (2, loading["backbone"].dim)
    assert loading["text_encoder"].dim == 32 and loading["image_encoder"].dim == 1280
    exec(SNIPPETS[1], saving)
    merged, params = weights.load(named / "merged")
    assert merged.weights_id.startswith("merged@")
    # a fresh adapter changes nothing
    assert merged.weights_id.split("@")[1] == saving["backbone"].weights_id.split("@")[1]


def test_every_kind_of_weights_is_named():
    for name in (
        *files._WEIGHT_FILES["config.json"][:3],
        "open_clip_model.safetensors",
        "IMAGES+TE",
    ):
        assert name in PAGE, name
