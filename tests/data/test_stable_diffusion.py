"""Prompt-to-Prompt on a tiny random Stable Diffusion: what is shared, and what is not."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.weights import pipelines as loading
from data.synthtriplets import drawing, filtering, stable_diffusion
from data.synthtriplets.stable_diffusion import StableDiffusion, sharing
from data.synthtriplets.triplets import CaptionTriplets
from tests import pipelines

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipelines.stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture(scope="module")
def painter(model):
    return StableDiffusion(str(model), STEPS)


def pixels(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG" and image.size == (pipelines.SIDE, pipelines.SIDE)
    return np.asarray(image)


def test_both_have_the_same_noise(painter):
    pair, note = painter.pair("a red star", "a red star", "3/0/0")
    assert pair[0] == pair[1]  # so what differs is the caption's doing
    again, same = painter.pair("a red star", "a red star", "3/0/0")
    assert (again, same) == (pair, note)
    other, another = painter.pair("a red star", "a red star", "3/0/1")
    assert other[0] != pair[0] and another != note
    assert 0.1 <= note["shared"] <= 0.9 and 7.5 <= note["guidance"] <= 15


def test_the_target_takes_over_maps_and_the_reference_nothing(painter, monkeypatch):
    made = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(stable_diffusion, "SHARED", (share, share))
        made[share] = painter.pair("a red star", "a blue ring", "0/0/0")[0]
    assert made[0.0][0] == made[1.0][0] and made[0.0][1] != made[1.0][1]
    alone, _ = painter.pair("a red star", "a green heart", "0/0/0")
    assert alone[0] == made[0.0][0] and alone[1] != made[1.0][1]


def test_a_shared_map_is_that_of_the_reference(painter):
    """softmax(Q K / sqrt d) of the reference, times the values of each."""
    import torch

    unet = painter.pipeline.unet
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith("attn1"))
    states = torch.randn(4, 9, layer.to_q.in_features, generator=torch.Generator().manual_seed(0))

    def expected(maps_of):
        def heads(linear, rows):
            return linear(states[rows]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)

        query, key = (heads(linear, maps_of) for linear in (layer.to_q, layer.to_k))
        maps = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
        return layer.to_out[0]((maps @ heads(layer.to_v, [0, 1, 2, 3])).transpose(1, 2).flatten(2))

    with torch.no_grad():
        plain = layer(states)
        torch.testing.assert_close(plain, expected([0, 1, 2, 3]))
        with sharing(unet, 2) as count:
            # rows: reference and target without caption, reference and target with it
            torch.testing.assert_close(layer(states), expected([0, 0, 2, 2]))
            count(None, 0, None, {})
            torch.testing.assert_close(layer(states), expected([0, 0, 2, 2]))
            assert count(None, 1, None, {"latents": 1}) == {"latents": 1}
            torch.testing.assert_close(layer(states), plain)
        torch.testing.assert_close(layer(states), plain)
    assert not any(module._forward_hooks for module in unet.modules())


def test_from_captions_to_pairs(painter, tmp_path):
    row = {"reference_caption": "a red star", "target_caption": "a ring", "text": "make it a ring"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    triplets = CaptionTriplets(tmp_path / "t.jsonl", {})
    assert drawing.draw(triplets, tmp_path / "pairs", painter, samples=2) == {"pairs": 2}
    found = filtering.read_pairs(tmp_path / "pairs" / "pairs-000000.tar")
    painted, note = painter.pair("a red star", "a ring", "0/0/1")
    assert [found[1].reference, found[1].target] == painted
    assert {k: found[1].record[k] for k in ("shared", "guidance")} == note
    assert pixels(found[0].reference).std() > 0
    settings = json.loads((tmp_path / "pairs" / "settings.json").read_text())
    assert settings["steps"] == STEPS and settings["parameters"] == painter.identity["parameters"]


def test_the_settings_of_instruct_pix2pix(painter):
    assert type(painter.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert painter.pipeline.scheduler.config.timestep_spacing == "linspace"
    assert painter.pipeline.scheduler.config.beta_schedule == "scaled_linear"  # of the weights
    assert stable_diffusion.STEPS == 100
    assert (stable_diffusion.SHARED, stable_diffusion.GUIDANCE) == ((0.1, 0.9), (7.5, 15.0))


def test_what_the_safety_checker_flags_is_refused(painter, tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Made:
        images: list
        nsfw_content_detected: list

    def flagged(*args, **options):
        return Made([Image.new("RGB", (8, 8))] * 2, [False, True])

    flagged.unet = painter.pipeline.unet
    monkeypatch.setattr(painter, "pipeline", flagged)
    assert painter.pair("a", "b", "0") == "unsafe"
    row = {"reference_caption": "a", "target_caption": "b", "text": "c"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    counts = drawing.draw(CaptionTriplets(tmp_path / "t.jsonl", {}), tmp_path / "pairs", painter)
    assert counts == {"pairs": 0, "unsafe": 1}
    assert filtering.read_pairs(tmp_path / "pairs" / "pairs-000000.tar") == []


def test_other_weights_are_another_model(model, painter, tmp_path):
    other = pipelines.stable_diffusion(tmp_path / "sd", seed=1)
    again = loading.load(("StableDiffusionPipeline",), str(model), "--model")
    assert again.parameters == painter.identity["parameters"]
    assert StableDiffusion(str(other)).identity["parameters"] != again.parameters


def test_what_is_missing_is_said(model, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="--model=.*nothing: no StableDiffusionPipeline there"):
        drawing.painter(str(tmp_path / "nothing"))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "diffusers", None)
        with pytest.raises(ConfigError, match=r"pip install 'cir_jax\[synth\]'"):
            drawing.painter(str(model))
