"""What ISA's query side costs beside the large tower: parameters, multiply-adds, latency.

    python benchmarks/query.py            # a few minutes on two CPU cores

As in the paper's Tables 1 and 17: light encoder + token learner (six tokens) at 224 pixels, against
BLIP's ViT-B/16. Random weights, float32, one query at a time: median of --repeats, the encoders in
turn, so that a machine that slows down slows down all. The text tower, which all queries need, is
apart. The paper's latencies are of a GPU. Writes benchmarks/query.json.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cir_jax.composers.isa import TokenLearner  # noqa: E402
from cir_jax.models import light  # noqa: E402
from cir_jax.models.blip import BlipConfig, BlipVision  # noqa: E402

PAPER = {
    "efficientnet_b0": (0.43, 5.3, 3.07),
    "efficientnet_b2": (0.72, 8.5, 3.24),
    "efficientvit_m2": (0.21, 5.0, 3.27),
    "mobilenetv2_100": (0.35, 3.5, 3.03),
    "mobilevitv2_100": (1.42, 5.5, 3.40),
    "blip": (16.86, 87.0, 6.53),
}
"""Encoder -> multiply-adds (G), parameters (M), milliseconds of a query: Tables 1 and 17."""


def query_side(name: str, size: int) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """images -> sentence tokens, a function of its parameters, and shapes of these.

    "blip" is the tower alone, as in the paper: what symmetric retrieval has for its queries.
    """
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    if name == "blip":
        tower = BlipVision(BlipConfig.published("base", size).vision)
        return tower.apply, jax.eval_shape(tower.init, jax.random.key(0), images)
    fields = {"image_size": size} if name.startswith("efficientvit") else {}
    encoder, learner = light.create(name, **fields), TokenLearner(6, 768)
    of_encoder = jax.eval_shape(encoder.init, jax.random.key(0), images)
    maps = jax.eval_shape(encoder.apply, of_encoder, images)
    flat = jax.ShapeDtypeStruct((1, math.prod(maps.shape[1:3]), maps.shape[3]), jnp.float32)
    of_learner = jax.eval_shape(learner.init, jax.random.key(0), flat)

    def run(variables: Any, images: jax.Array) -> jax.Array:
        found = encoder.apply(variables["encoder"], images)
        return learner.apply(variables["learner"], found.reshape(flat.shape))[0]

    return run, {"encoder": of_encoder, "learner": of_learner}


def measure(names: list[str], size: int, repeats: int) -> dict[str, Any]:
    """Encoder -> parameters_m, multiply_adds_g, milliseconds."""
    rng = np.random.default_rng(0)
    rows, compiled = {}, {}
    for name in tqdm(names, desc="compiling"):
        run, shapes = query_side(name, size)
        # positive, as variances are
        variables = jax.tree.map(lambda x: np.float32(0.05 * (0.1 + rng.random(x.shape))), shapes)
        images = rng.standard_normal((1, size, size, 3)).astype(np.float32)
        program = jax.jit(run).lower(variables, images).compile()
        trained = {k: v for k, v in _flat(shapes).items() if "batch_stats" not in k}
        rows[name] = {
            "parameters_m": round(sum(math.prod(x.shape) for x in trained.values()) / 1e6, 2),
            "multiply_adds_g": round(program.cost_analysis()["flops"] / 2e9, 3),
        }
        compiled[name] = program, (jax.device_put(variables), jax.device_put(images)), []
    for _ in tqdm(range(repeats + 2), desc="queries"):
        for program, given, seconds in compiled.values():
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds.append(time.perf_counter() - start)
    for name, (_, _, seconds) in compiled.items():
        rows[name]["milliseconds"] = round(1000 * statistics.median(seconds[2:]), 2)
    return rows


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def table(rows: dict[str, Any]) -> str:
    """Markdown; the paper's numbers in brackets, % of the large tower."""
    lines = [
        "| query encoder | parameters, M | multiply-adds, G | ms | % of BLIP's ms |",
        "|---" * 5 + "|",
    ]
    whole = rows.get("blip", {}).get("milliseconds")
    for name, row in rows.items():
        adds, parameters, ms = PAPER[name]
        share = f"{100 * row['milliseconds'] / whole:.0f} ({100 * ms / 6.53:.0f})" if whole else ""
        lines.append(
            f"| {name} | {row['parameters_m']:.1f} ({parameters}) | "
            f"{row['multiply_adds_g']:.2f} ({adds}) | {row['milliseconds']:.1f} ({ms}) | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=30, help="queries that are timed, of each")
    parser.add_argument("--encoders", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "query.json")
    args = parser.parse_args()
    rows = measure(args.encoders, args.size, args.repeats)
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }
    report = {"machine": machine, "size": args.size, "repeats": args.repeats, "rows": rows}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
