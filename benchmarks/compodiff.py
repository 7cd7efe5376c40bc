"""CompoDiff: its sampler beside the released algorithm in plain PyTorch, its steps, its training.

    python benchmarks/compodiff.py --workdir=runs/table                # all four, 40 minutes
    python benchmarks/compodiff.py --parts=sampler --batches=1,16

* sampler: sizes of the release (140 million parameters, 768 features, 77 hidden states of width
  1280), random weights, four samples of each query, guidance by image and text. Time of a batch of
  queries from hidden states and features to embeddings, without the text towers; both sides get the
  same noise, and their embeddings must agree. PyTorch computes as the release does: all samples and
  the three branches of guidance are rows of one batch, and every evaluation projects the conditions
  again. Wall time, and CPU time of all threads.
* profile: what of ours is the conditions (once per query) and what a step.
* alone: one query with kernels as they are trained and as `for_one_query` turns them, the same
  embeddings; and where that comes from, products of few rows with both forms of a layer's largest
  kernel.
* steps: mAP@10 of shapes/circo over the sampling steps, and the time of a query (the paper's Table
  4), of the run of seed 0 that benchmarks/compare.py leaves in the workdir; trained there if there
  is none.
* training: a step at the release's sizes on one device, and on two with the batch or also the
  parameters split (fsdp): samples per second, and what share of the measured rate of matrix
  products that is. On a CPU two devices share the cores.

fp32 on CPU. Writes benchmarks/compodiff.json, a part at a time.
"""

import argparse
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import logging  # noqa: E402

from benchmarks import oti  # noqa: E402
from benchmarks.compodiff_released import Released  # noqa: E402
from cir_jax.composers.base import Params  # noqa: E402
from cir_jax.composers.compodiff import CompoDiff  # noqa: E402
from cir_jax.input.images import ImageTransform  # noqa: E402
from cir_jax.input.text import word_tokenizer  # noqa: E402
from cir_jax.models.backbone import Backbone  # noqa: E402
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig  # noqa: E402
from cir_jax.sharding import mesh as meshes  # noqa: E402
from cir_jax.sharding import placement  # noqa: E402
from cir_jax.training import optimizers  # noqa: E402
from cir_jax.training.step import Step, init_state  # noqa: E402
from cir_jax.weights import compodiff as released  # noqa: E402
from experiments import base  # noqa: E402

PARTS = ("sampler", "alone", "steps", "training")
SIZES = {
    "release": {"depth": 12, "heads": 16, "dim_head": 64, "cross_heads": 8},
    "tiny": {"depth": 2, "heads": 2, "dim_head": 8, "cross_heads": 2},
}
WIDTHS = {"release": (768, 1280), "tiny": (16, 24)}
"""Of image embeddings and of hidden states."""

CONTEXT, SAMPLES = 77, 4
GUIDANCE = (1.5, 7.5)
ROWS = (4, 12, 24, 48, 96)
"""Of a product; one query of four samples under three branches of guidance has 24."""
TABLE_4 = (1, 2, 3, 4, 5, 10, 50, 100)
TOLERANCE = 1e-3
"""Of the embeddings, which are of unit norm; guidance by 7.5 enlarges what rounding differs."""


class Sampler(CompoDiff):
    """With hidden states in the place of token ids: no text tower runs."""

    def hidden_states(self, frozen: Params, token_ids: jax.Array) -> jax.Array:
        return frozen["states"][: len(token_ids)]


def sampler(size: str, steps: int) -> Sampler:
    """On a backbone of which only the widths matter."""
    dim, width = WIDTHS[size]
    tokenizer = word_tokenizer(["red"], CONTEXT)
    config = ClipConfig(
        text=TextConfig(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        ),
        vision=VisionConfig(num_hidden_layers=1),
        projection_dim=dim,
    )
    backbone = Backbone(Clip(config), tokenizer, ImageTransform(224, 224), "random")
    return Sampler(
        backbone, **SIZES[size], steps=steps, samples_per_query=SAMPLES, guidance=GUIDANCE
    )


def random_params(composer: CompoDiff) -> Any:
    """As initialised, but for gains, which are about 1."""
    rng = np.random.default_rng(0)
    params = jax.device_get(jax.jit(composer.init)(jax.random.key(0)))
    return jax.tree.map(
        lambda x: (x + 0.1 * rng.standard_normal(x.shape) * (x.ndim == 1)).astype(np.float32),
        params,
    )


def inputs(composer: CompoDiff, batch: int, seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """frozen of a `Sampler`, and queries: features of unit variance, hidden states likewise."""
    rng = np.random.default_rng(seed)
    dim, width = composer.backbone.dim, composer.backbone.text_widths[0]
    states = rng.standard_normal((batch + 1, CONTEXT, width), np.float32)
    frozen = {"states": states[1:], "null_text": [states[:1]]}
    return frozen, {
        "token_ids": np.zeros((batch, CONTEXT), np.int32),
        "reference_features": rng.standard_normal((batch, dim), np.float32),
    }


# --- the parts


def timed(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds by the clock, and of all threads; what it gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, found


def measure_sampler(args: argparse.Namespace) -> dict[str, Any]:
    """AssertionError where the embeddings differ."""
    composer = sampler(args.size, 1)
    params = random_params(composer)
    tensors = released.to_tensors(params, composer.config)
    theirs = Released(tensors, SIZES[args.size], composer.schedule, GUIDANCE)
    on_device, key, rows = jax.device_put(params), jax.random.key(1), []
    alone = composer.for_one_query(on_device)
    for batch in args.batches:
        weights = alone if batch == 1 else on_device  # as a search has them, and an evaluation
        frozen, query = inputs(composer, batch)
        texts = [torch.from_numpy(x) for x in (frozen["states"], frozen["null_text"][0])]
        image = torch.from_numpy(query["reference_features"])
        for steps in args.steps:
            varied = composer.varied(steps=steps)
            compose = jax.jit(varied.compose).lower(weights, frozen, query, key).compile()
            noise = torch.from_numpy(drawn(key, steps, batch, composer.config.embed_dim))

            def ours(compose: Any = compose, given: Any = (weights, frozen, query)) -> Any:
                return np.asarray(compose(*given, key))

            def other(noise: Any = noise, texts: Any = texts, image: Any = image) -> Any:
                return theirs.sample(noise, *texts, image).numpy()

            ours()
            taken: dict[str, list[dict[str, float]]] = {"cir_jax": [], "pytorch": []}
            for _ in range(args.rounds):
                seconds, expected = timed(other)
                taken["pytorch"].append(seconds)
                seconds, found = timed(ours)
                taken["cir_jax"].append(seconds)
            error = float(np.abs(found - expected).max())
            assert error < TOLERANCE, f"batch {batch}, {steps} steps: they differ by {error:.1e}"
            row: dict[str, Any] = {"batch": batch, "steps": steps, "largest_difference": error}
            for kind in ("wall", "cpu"):
                best = {side: min(t[kind] for t in times) for side, times in taken.items()}
                row[f"{kind}_seconds"] = {side: round(value, 4) for side, value in best.items()}
                row[f"{kind}_speedup"] = round(best["pytorch"] / best["cir_jax"], 2)
            print(
                f"batch {batch}, {steps} steps: {row['wall_speedup']} x, CPU {row['cpu_speedup']} x"
            )
            rows.append(row)
    return {"rows": rows, "profile": profile(args, composer, on_device, alone)}


def drawn(key: jax.Array, steps: int, batch: int, dim: int) -> np.ndarray:
    """float32[steps + 1, batch, samples, dim]: the noise that `compose` draws."""

    def one(draw: jax.Array, row: jax.Array) -> jax.Array:
        rng = jax.random.fold_in(jax.random.fold_in(key, draw), row)
        return jax.random.normal(rng, (SAMPLES, dim))

    rows = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return np.array(jax.jit(rows)(jnp.arange(steps + 1), jnp.arange(batch)))


def profile(
    args: argparse.Namespace, composer: Sampler, on_device: Any, alone: Any
) -> list[dict[str, Any]]:
    """Per batch: wall seconds of the conditions, and of one evaluation of the network."""
    rows = []
    for batch in args.batches:
        params = alone if batch == 1 else on_device
        frozen, query = inputs(composer, batch)
        image = query["reference_features"]
        condition = jax.jit(lambda p, f, q, i: composer.branches(p, f, q, i))
        conditions = condition(params, frozen, query, image)
        denoise = jax.jit(
            lambda p, x, c: composer.denoiser.apply(
                {"params": p}, x, jnp.full((1, 1), 500), c, method="denoise"
            )
        )
        x = np.zeros((3 * batch, SAMPLES, composer.config.embed_dim), np.float32)
        row: dict[str, Any] = {"batch": batch}
        for name, run in (
            ("conditions", lambda: condition(params, frozen, query, image)),  # noqa: B023
            ("step", lambda: denoise(params, x, conditions)),  # noqa: B023
        ):
            jax.block_until_ready(run())
            best = min(timed(lambda: jax.block_until_ready(run()))[0]["wall"] for _ in range(3))  # noqa: B023
            row[f"{name}_seconds"] = round(best, 4)
        rows.append(row)
    return rows


def measure_alone(args: argparse.Namespace) -> dict[str, Any]:
    """AssertionError where the embeddings differ."""
    composer = sampler(args.size, 1)
    params = jax.device_put(random_params(composer))
    forms = {"as_trained": params, "for_one_query": composer.for_one_query(params)}
    frozen, query = inputs(composer, 1)
    key, rows = jax.random.key(1), []
    for steps in args.steps:
        runs, found = {}, {}
        for name, weights in forms.items():
            compose = jax.jit(composer.varied(steps=steps).compose)
            runs[name] = functools.partial(compose, weights, frozen, query, key)
            found[name] = np.asarray(runs[name]())
        error = float(np.abs(found["as_trained"] - found["for_one_query"]).max())
        assert error < TOLERANCE, f"{steps} steps: they differ by {error:.1e}"
        seconds = fastest(runs, args.rounds)
        print(f"one query, {steps} steps: {seconds}")
        rows.append({"steps": steps, "largest_difference": error} | compared(seconds))
    return {"queries": rows, "products": [products(composer, n, args) for n in ROWS]}


def products(composer: CompoDiff, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Of one wide layer after another, as a sampler meets them: no kernel stays in the cache."""
    dim, depth = composer.config.embed_dim, composer.config.depth
    x = jnp.ones((rows, dim))
    kernels = [jnp.full((dim, 8 * dim), float(layer)) for layer in range(depth)]
    turned = [kernel.T.copy() for kernel in kernels]
    each = jax.jit(lambda x, kernels: [x @ kernel for kernel in kernels])
    other = jax.jit(lambda x, kernels: [x @ kernel.T for kernel in kernels])
    seconds = fastest(
        {
            "as_trained": functools.partial(each, x, kernels),
            "for_one_query": functools.partial(other, x, turned),
        },
        10 * args.rounds,
    )
    return {"rows": rows, "inputs": dim, "outputs": 8 * dim, "layers": depth} | compared(seconds)


def fastest(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Wall seconds of the best of so many rounds, in which all take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(1 + rounds):
        for name, run in runs.items():
            taken, _ = timed(lambda: jax.block_until_ready(run()))  # noqa: B023
            best[name] = min(best[name], taken["wall"])
    return best


def compared(seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "wall_seconds": {name: round(value, 5) for name, value in seconds.items()},
        "wall_speedup": round(seconds["as_trained"] / seconds["for_one_query"], 2),
    }


def measure_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the paper's Table 4 on the embedded world."""
    from benchmarks.conditions import Trained
    from cir_jax.evaluation import evaluate

    trained, rows = Trained(args.preset, 0, args.workdir), []
    for steps in args.table:
        composer = trained.composer.varied(steps=steps)
        run = lambda: evaluate.evaluate(  # noqa: E731
            composer,  # noqa: B023
            trained.params,
            trained.frozen,
            trained.benchmark,
            image_features=trained.raw,
            seed=trained.seed,
            **trained.options,
        )
        run()  # compiles
        found = run()
        rows.append(
            {
                "steps": steps,
                "mAP@10": round(found.metrics["mAP@10"].value, 2),
                "ms_per_query": round(1000 / found.queries_per_second, 3),
            }
        )
        print(rows[-1])
    return rows


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """Of each mesh: samples per second, achieved rate over that of matrix products."""
    composer = sampler(args.size, 1)
    frozen, query = inputs(composer, args.batch)
    batch = {
        "token_ids": query["token_ids"],
        "target_features": query["reference_features"],
        "reference_features": query["reference_features"][::-1].copy(),
        "has_reference": np.arange(args.batch) % 2 == 0,
    }
    start = random_params(composer)
    recipe = base.OPTIMIZER | {"weight_decay": 0.06}
    optimizer = optimizers.optimizer(recipe, 100, lambda *_, **__: 0)
    found: dict[str, Any] = {"batch": args.batch}
    for name, sizes in (
        ("one device", {"data": 1}),
        ("two, data", {"data": 2}),
        ("two, fsdp", {"fsdp": 2, "data": 1}),
    ):
        count = int(np.prod(list(sizes.values())))
        mesh = meshes.make_mesh(sizes, jax.devices()[:count])
        held = placement.place(mesh, frozen)
        copied = placement.place(mesh, jax.tree.map(np.copy, start))
        state = init_state(composer, optimizer, seed=0, ema=True, params=copied)
        step = Step(
            *(mesh, state, held),
            composer=composer,
            optimizer=optimizer,
            ema_decay=0.9999,
            microbatches=1,
        )
        rows = placement.global_batch(mesh, batch)
        compiled = step.lower(state, held, rows).compile()
        flops = compiled.cost_analysis()["flops"] * count
        seconds = []
        for _ in range(1 + args.rounds):
            began = time.perf_counter()
            state, metrics = compiled(state, held, rows)
            jax.block_until_ready(metrics["loss"])
            seconds.append(time.perf_counter() - began)
        taken = statistics.median(seconds[1:])
        found[name] = {
            "seconds_per_step": round(taken, 3),
            "samples_per_second": round(args.batch / taken, 2),
            "gflop_per_step": round(flops / 1e9, 1),
            "share_of_matrix_rate": round(flops / taken / args.rate / 1e9, 3),
            "parameters_mib_per_device": parameters_mib(state.params),
        }
        print(name, found[name])
        del state, copied, held, compiled
    return found


def parameters_mib(params: Any) -> int:
    """On the first device."""
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)]
    return round(sum(held) / 2**20)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--batches", type=numbers, default=(1, 16, 64))
    parser.add_argument("--steps", type=numbers, default=(2, 5, 10))
    parser.add_argument("--table", type=numbers, default=TABLE_4, help="steps of the table")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="of training")
    parser.add_argument("--size", choices=SIZES, default="release")
    parser.add_argument("--preset", choices=("shapes", "smoke"), default="shapes")
    parser.add_argument("--workdir", type=Path, default=Path("runs/table"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "compodiff.json")
    args = parser.parse_args(given)
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"--parts: no {wrong.pop()!r}; there are {', '.join(PARTS)}")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_num_cpu_devices", 2)
    written = json.loads(args.output.read_text()) if args.output.is_file() else {}
    measures = dict(
        zip(PARTS, (measure_sampler, measure_alone, measure_steps, measure_training), strict=True)
    )
    machine = oti.machine(argparse.Namespace(platform="cpu"))["machine"]
    args.rate = machine["matrix_gflops"]["jax"]
    for part in args.parts:
        written["command"] = "python benchmarks/compodiff.py"
        written[part] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "measured": measures[part](args),
        }
        args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
