"""All that moves a number and is chosen: beside each number stands its short id.

Two numbers with one id differ by device, driver and package versions only, which results.json has
beside them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cir_jax.composers.base import Composer
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.queries import Benchmark, CaptionBenchmark

TIES = "equal scores: lowest gallery position first"
ILLUSTRATION = ("example",)
"""Fields that show the others at work; they are no part of the id."""


def of(
    composer: Composer,
    benchmark: Benchmark | CaptionBenchmark,
    seed: int,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """The setting of an evaluation, as JSON holds it.

    prompts: what is tokenised, with {text} for the caption, or {c1} and {c2} of two, and {concept};
        several are composed each and averaged, or are queries of their own (`protocol` says which).
    example: the texts of the first query so, and their token ids.
    method: the constructor's arguments, defaults included; beside: hashes of what it reads beside
        the backbone. trained: name and hash of trained parameters, "" = none; whoever has them adds
        it. seed: of methods that draw noise. asked: of every query beside what the benchmark says;
        left out where that is nothing.
    """
    backbone, protocol = composer.backbone, benchmark.protocol
    shown: dict[str, Any] = {"prompts": [composer.prompt("{text}")]}
    if isinstance(benchmark, Benchmark):
        query = benchmark.queries[0]
        split = protocol.captions in ("orders_separate", "orders_marked")
        two = protocol.captions != "single" and (split or len(query.texts) == 2)
        blanks = protocol.join(["{c1}", "{c2}"] if two else ["{text}"], "the template")
        shown["prompts"] = [protocol.prompt(composer.prompt, x, "{concept}") for x in blanks]
        texts = [
            protocol.prompt(composer.prompt, x, query.concept)
            for x in protocol.join(query.texts, benchmark.what(0))
        ]
        tokens = [backbone.tokenizer([text])[0].tolist() for text in texts]
        shown["example"] = {"query": query.id, "texts": texts, "token_ids": tokens}
    identity = asked.identity if asked else {}
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "data": benchmark.data,
        "protocol": protocol.id,
        **shown,
        **of_composer(composer),
        "trained": "",
        "seed": seed,
        "ties": TIES,
        **({"asked": identity} if identity else {}),
    }


def of_composer(composer: Composer) -> dict[str, Any]:
    """The part of a setting that belongs to the composer, whatever it is evaluated on."""
    backbone = composer.backbone
    return {
        "preprocessing": repr(backbone.image_transform),
        "dtype": backbone.dtype.name,
        "weights_id": backbone.weights_id,
        "method": dict(composer.settings) or {"name": type(composer).__name__},
        "beside": dict(composer.contents()),
    }


def short_id(setting: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of its hash."""
    chosen = {name: value for name, value in setting.items() if name not in ILLUSTRATION}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
