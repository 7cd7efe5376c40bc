"""The id beside a number changes with all that moves it, and with nothing else."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cir_jax import composers
from cir_jax.composers.conditions import Conditions
from cir_jax.evaluation import protocols, setting
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.protocols import variant
from tests.evaluation import worlds


def ident(composer, benchmark, seed=0):
    return setting.short_id(setting.of(composer, benchmark, seed))


def test_the_id_changes_with_what_moves_numbers(tiny):
    backbone, _ = tiny
    benchmark = worlds.benchmark()
    slerp = composers.build("slerp", backbone)
    base = ident(slerp, benchmark)
    assert base == setting.short_id(setting.of(slerp, benchmark, 0, Asked()))  # nothing is asked
    assert len(base) == 8 and base == ident(composers.build("slerp", backbone), benchmark)
    assert base == ident(composers.build("slerp", backbone, alpha=0.8), benchmark)  # the default
    same = dataclasses.replace(benchmark, queries=benchmark.queries[::-1])  # another example
    assert ident(slerp, same) == base
    others = {
        "alpha": ident(composers.build("slerp", backbone, alpha=0.7), benchmark),
        "method": ident(composers.build("text_only", backbone), benchmark),
        "split": ident(slerp, dataclasses.replace(benchmark, split="test")),
        "data": ident(slerp, dataclasses.replace(benchmark, data="circo@2.0.0")),
        "seed": ident(slerp, benchmark, seed=1),
        "protocol": ident(
            slerp,
            dataclasses.replace(
                benchmark, protocol=dataclasses.replace(protocols.CIRCO, remove_reference=True)
            ),
        ),
    }
    transform = dataclasses.replace(backbone.image_transform, pad="target")
    for name, change in {
        "weights": {"weights_id": "tiny@1"},
        "preprocessing": {"image_transform": transform},
    }.items():
        changed = composers.build("slerp", dataclasses.replace(backbone, **change))
        others[name] = ident(changed, benchmark)
    half = dataclasses.replace(backbone, model=backbone.model.clone(dtype=jnp.bfloat16))
    others["dtype"] = ident(composers.build("slerp", half), benchmark)
    trained = setting.of(slerp, benchmark, 0) | {"trained": "slerp@1"}
    others["trained"] = setting.short_id(trained)
    for name, asked in {
        "negative_text": Asked(Conditions(negative_text="a star")),
        "guidance": Asked(Conditions(guidance=(1.0, 2.0))),
        "use": Asked(use="text"),
        "mask": Asked(Conditions(mask=np.eye(4))),
        "another mask": Asked(Conditions(mask=1 - np.eye(4))),
    }.items():
        others[name] = setting.short_id(setting.of(slerp, benchmark, 0, asked))
    assert len({base, *others.values()}) == 1 + len(others), others


def test_a_mask_is_known_by_its_region(tmp_path):
    region = np.zeros((4, 6), bool)
    region[1:3, 2:5] = True
    picture = Image.fromarray(region.astype(np.uint8) * 255)
    picture.save(tmp_path / "mask.png")
    forms = [region, region.astype(np.uint8), picture, tmp_path / "mask.png"]
    said = [Asked(Conditions(mask=form)).identity["mask"] for form in forms]
    picture.save(tmp_path / "elsewhere.png")
    said.append(Asked(Conditions(mask=str(tmp_path / "elsewhere.png"))).identity["mask"])
    assert len(set(said)) == 1
    picture.rotate(180).save(tmp_path / "mask.png")  # another region under the name of before
    assert Asked(Conditions(mask=tmp_path / "mask.png")).identity["mask"] not in said


@pytest.mark.parametrize(
    ("protocol", "name", "prompts", "first"),
    [
        (protocols.CIRCO, "pic2word", ["a photo of * , {text}"], ["a photo of * , make it red"]),
        (
            protocols.FASHIONIQ,
            "searle_oti",
            ["a photo of $ that {c1} and {c2}", "a photo of $ that {c2} and {c1}"],
            [
                "a photo of $ that make it red and has no star",
                "a photo of $ that has no star and make it red",
            ],
        ),
        (variant(protocols.FASHIONIQ, ["reversed"]), "slerp", ["{c2} and {c1}"],
         ["has no star and make it red."]),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_and_an_example_are_said(protocol, name, prompts, first, tiny):
    backbone, _ = tiny
    benchmark = worlds.benchmark(protocol)
    said = setting.of(composers.build(name, backbone), benchmark, 0)
    assert said["prompts"] == prompts
    assert said["example"]["query"] == 100 and said["example"]["texts"] == first
    for text, ids in zip(first, said["example"]["token_ids"], strict=True):
        assert ids == backbone.tokenizer([text])[0].tolist()
    assert said["method"]["name"] == name and "gallery position" in said["ties"]
    json.dumps(said, allow_nan=False)
