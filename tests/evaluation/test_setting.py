"""The id beside a number changes with all that moves it, and with nothing else."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from cir_jax import composers
from cir_jax.evaluation import protocols, setting
from cir_jax.evaluation.protocols import variant
from tests.evaluation import worlds


def ident(composer, benchmark, seed=0):
    return setting.short_id(setting.of(composer, benchmark, seed))


def test_the_id_changes_with_what_moves_numbers(tiny):
    backbone, _ = tiny
    benchmark = worlds.benchmark()
    slerp = composers.build("slerp", backbone)
    base = ident(slerp, benchmark)
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
    assert len({base, *others.values()}) == 1 + len(others), others


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
