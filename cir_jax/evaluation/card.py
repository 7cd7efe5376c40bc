"""The card of a composer: README.md with the metadata that the Hugging Face hub reads.

Its numbers are those of a `results.json` that belong to the weights and settings of the composer,
with protocol and setting; where there is none it has no numbers. The classes are huggingface_hub's.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cir_jax.composers import composer_class
from cir_jax.errors import DataError
from cir_jax.weights import hub

TASK = "composed-image-retrieval"
PIPELINE = "image-feature-extraction"
"""The nearest of the hub's own tasks, which has none for composed retrieval."""

_SHAPES = (
    "`shapes` is a world of rendered scenes that comes with cir_jax. Its numbers are no stand-in "
    "for published ones."
)


def own_results(file: Path, setting: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The results in `file` that have all of `setting` in theirs, and how many of the same method
    have not; none where there is no such file.

    Incomplete data do not count, nor does what was asked of every query. Raises DataError when the
    file is no `results.json`.
    """
    try:
        results = json.loads(file.read_bytes())["results"]
        mine = [x for x in results if x["setting"]["method"]["name"] == setting["method"]["name"]]
        found = [
            x
            for x in mine
            if not x["partial"]
            and "asked" not in x["setting"]
            and all(x["setting"][name] == value for name, value in setting.items())
            and x["metrics"]
        ]
    except FileNotFoundError:
        return [], 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not as launch/eval.py writes it ({type(error).__name__}: {error}). Delete it "
            "for a card without numbers, or evaluate again."
        ) from error
    return found, len(mine) - len(found)


def text(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The card of a composer. about: its config.json. results: as `own_results` gives them."""
    from huggingface_hub import EvalResult, ModelCardData

    method, made = about["method"], about["made"]
    backbone = about["experiment"]["backbone"]
    evaluated = [
        EvalResult(
            task_type=TASK,
            task_name="Composed image retrieval",
            dataset_type=result["benchmark"],
            dataset_name=result["data"] or result["benchmark"],
            dataset_config=result["protocol"],
            dataset_split=result["split"],
            dataset_args={"setting": result["setting_id"], **result["counts"]},
            metric_type=name,
            metric_name=name,
            metric_value=result["metrics"][name]["value"],
            metric_args={key: result["metrics"][name][key] for key in ("se", "n")},
        )
        for result in results
        for name in result["headline"]
    ]
    data = ModelCardData(
        library_name=hub.LIBRARY,
        pipeline_tag=PIPELINE,
        tags=[TASK, "jax", method],
        base_model=backbone.split("+") if backbone else None,
        datasets=sorted({name.partition("/")[0] for name in made.get("tables", {})}) or None,
        model_name=hub.ANY_NAME if evaluated else None,
        eval_results=evaluated or None,
    )
    body = [_opening(about), _usage(about)]
    if results:
        body.append(_table(results))
    body.append(_provenance(about))
    return f"---\n{data.to_yaml().rstrip()}\n---\n\n" + "\n\n".join(body) + "\n"


def _opening(about: Mapping[str, Any]) -> str:
    module = importlib.import_module(composer_class(about["method"]).__module__)
    said = (module.__doc__ or "").strip().splitlines()[0]
    return (
        f"# {hub.ANY_NAME}\n\n{said}\n\n"
        "A composer of cir_jax: a reference image and a text that says what should differ rank a "
        "gallery of images."
    )


def _usage(about: Mapping[str, Any]) -> str:
    included = about["backbone"]["included"]
    backbone = (
        "The backbone comes with it."
        if included
        else f"The backbone, `{about['experiment']['backbone']}`, is fetched from the hub."
    )
    return f"""## Use

{backbone}

```python
import cir_jax

search = cir_jax.load("{hub.ANY_NAME}")
search.index("photos")
for path, score in search.search("reference.jpg", "is red instead of blue", k=5):
    print(path, score)
```

    cir search photos --method {hub.ANY_NAME} --image reference.jpg --text "is red instead of blue"
    python launch/eval.py --config={hub.ANY_NAME}"""


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    parts = ["## Results"]
    for result in results:
        counts = ", ".join(f"{number:,} {what}" for what, number in result["counts"].items())
        values = [result["metrics"][name] for name in result["headline"]]
        cells = [
            f"{x['value']:.2f}" + (f" ± {x['se']:.2f}" if x["se"] is not None else "")
            for x in values
        ]
        rows = (result["headline"], ["---"] * len(cells), cells)
        parts += [
            f"**{result['benchmark']}**, {result['split']} ({counts}; {result['data']}), protocol "
            f"`{result['protocol']}`, setting `{result['setting_id']}`:",
            "\n".join(f"| {' | '.join(row)} |" for row in rows),
        ]
    note = "Percent ± one standard error over the queries, measured by `launch/eval.py` of cir_jax."
    if any(result["benchmark"].startswith("shapes") for result in results):
        note += f" {_SHAPES}"
    return "\n\n".join([*parts, note])


def _provenance(about: Mapping[str, Any]) -> str:
    made = about["made"]
    facts = {
        "method": about["method"],
        "preset": made.get("preset"),
        "backbone": about["backbone"]["weights_id"],
        "parameters": about["trained"] or "none: it is training-free",
        "stage": made.get("stage"),
        "step": f"{made['step']} of {made['steps']}" if "step" in made else None,
        "began with": made.get("init_from"),
        "trained on": "; ".join(
            f"{name} ({table['records']:,} records, {table['id']})"
            for name, table in made.get("tables", {}).items()
        ),
        "cir_jax": " ".join(filter(None, (made["cir_jax"], made.get("commit")))),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    note = "The whole config is `experiment` in `config.json`."
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *rows, "", note])
