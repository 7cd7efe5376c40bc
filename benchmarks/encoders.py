"""Speed and memory of the CLIP towers against PyTorch's transformers, in one run on one machine.

    python benchmarks/encoders.py                    # CPU or CUDA GPU, whatever both sides see
    python benchmarks/encoders.py --quick            # rougher, and without the large batches
    python benchmarks/encoders.py --models=ViT-B/32 --batches=1,32 --output=mine.json

Random weights of the published shapes: a transformers.CLIPModel is built from its config, its
state_dict converted by cir_jax.weights, and the outputs compared before anything is timed. Each
side lives in its own process (encoders_worker.py) and they take turns, so that what else the
machine does hits both. PyTorch is eager, in inference mode, with its default attention; JAX is
compiled, and the time that takes stands apart. Writes benchmarks/encoders.json.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("jax", "torch")
KINDS = ("image", "text", "text77")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative error, ||ours - theirs|| / ||theirs||, above which nothing is timed."""

FULL_LENGTH = 77
BUCKET = 8
BUSY = 0.25  # load per core before the start that is worth a word
CAPTION_TOKENS = (9, 14, 11, 12, 10, 16, 13, 11, 12, 15, 10, 12, 18, 11, 13, 12)
"""Tokens of usual captions, both ends included ("a man riding a wave on a surfboard": 10)."""

MODELS: dict[str, dict[str, Any]] = {
    "ViT-B/32": {
        "projection_dim": 512,
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        "vision_config": {"patch_size": 32},
    },
    "ViT-L/14": {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    },
    "tiny": {
        "projection_dim": 16,
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "vocab_size": 100,
            "bos_token_id": 98,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "image_size": 32,
            "patch_size": 16,
        },
    },
}
"""What the published configs say that differs from the defaults; `tiny` is for the test."""


class Worker:
    """One side in its own process: requests and answers are lines of JSON."""

    def __init__(self, side: str, threads: int, directory: Path):
        self.side = side
        # the GPU is shared by both processes: JAX must not take all of its memory at once
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        script = Path(__file__).with_name("encoders_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), side, str(threads), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, do: str, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.side} process died at {do} {request}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def flops(config: Mapping[str, Any], kind: str, length: int) -> float:
    """Floating-point operations of the matrix products for one image or text."""
    tower = config["vision_config" if kind == "image" else "text_config"]
    width, tokens, first = tower["hidden_size"], length, 0
    if kind == "image":
        patches = (tower["image_size"] // tower["patch_size"]) ** 2
        tokens, first = patches + 1, 2 * patches * 3 * tower["patch_size"] ** 2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * tower["intermediate_size"])
    attention = 4 * tokens**2 * width
    last = 2 * width * config["projection_dim"]
    return first + tower["num_hidden_layers"] * (layer + attention) + last


def text_length(kind: str, batch: int) -> int:
    """Of the longest caption of the batch, rounded up to the bucket; or CLIP's full length."""
    longest = max(CAPTION_TOKENS[:batch])
    return FULL_LENGTH if kind == "text77" else -(-longest // BUCKET) * BUCKET


def inputs(config: Mapping[str, Any], kind: str, batch: int) -> np.ndarray:
    """float32[batch, height, width, 3], or int32[batch, length] as the tokenizer would give it."""
    rng = np.random.default_rng(batch)
    if kind == "image":
        size = config["vision_config"]["image_size"]
        return rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    counts, length = np.resize(CAPTION_TOKENS, batch), text_length(kind, batch)
    text = config["text_config"]
    eos = text["eos_token_id"]
    words = rng.integers(1, text["bos_token_id"], (batch, length))
    ids = np.where(np.arange(length) < counts[:, None] - 1, words, eos)
    ids[:, 0] = text["bos_token_id"]
    return ids.astype(np.int32)


def measure(
    workers: Mapping[str, Worker], request: Mapping[str, Any], directory: Path, seconds: float
) -> dict[str, Any]:
    """One cell: agreement, compile time, memory, then both sides in turns for about `seconds`."""
    sides: dict[str, dict[str, Any]] = {}
    for side, worker in workers.items():
        # one pass, after JAX has compiled it: for the features, the memory, and to warm up
        sides[side] = worker("prepare", **request)
    ours, theirs = (np.load(directory / f"{side}.npy") for side in SIDES)
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not error < TOLERANCE[request["dtype"]]:
        raise SystemExit(f"{dict(request)}: the outputs differ by {error:.1e}; nothing was timed.")
    once = {side: max(sides[side].pop("pass_s"), 1e-6) for side in workers}
    # a sample is at least 50 ms of passes
    passes = {side: max(1, round(0.05 / once[side])) for side in workers}
    rounds = int(seconds / sum(once[side] * passes[side] for side in workers))
    rounds = min(max(rounds, 1), 25)
    samples: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(rounds):
        # who goes first changes, too
        for side in SIDES if number % 2 else SIDES[::-1]:
            samples[side].append(workers[side]("time", passes=passes[side]))
    for side in workers:
        middle = statistics.median(samples[side])
        sides[side] |= {"seconds": middle, "fastest_s": min(samples[side])}
        sides[side]["per_second"] = request["batch"] / middle
    ours, theirs = (sides[side] for side in SIDES)
    ratios = {
        "ratio": theirs["seconds"] / ours["seconds"],
        "ratio_fastest": theirs["fastest_s"] / ours["fastest_s"],
    }
    return {**sides, **ratios, "error": error, "rounds": rounds}


def run(
    names: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    *,
    threads: int,
    seconds: float,
    limit: float,
) -> dict[str, Any]:
    """All cells, each for about `seconds`.

    Those that would take more than `limit` seconds are there with the reason. threads: of each
    side; 0 = as many as there are cores.
    """
    threads = threads or len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    if load > BUSY * threads:
        print(f"Other programs keep {load:.1f} cores busy: expect noise, which the file will tell.")
    directory = Path(tempfile.mkdtemp(prefix="encoders"))
    workers = {side: Worker(side, threads, directory) for side in SIDES}
    cells: list[dict[str, Any]] = []
    try:
        about = {side: worker("about", dtypes=dtypes) for side, worker in workers.items()}
        platforms = {side: about[side]["platform"] for side in SIDES}
        if len(set(platforms.values())) > 1:
            raise SystemExit(f"the sides see different devices: {platforms}. Install both for one.")
        matrix = {
            dtype: {side: workers[side]("matrix", dtype=dtype) for side in SIDES}
            for dtype in dtypes
        }
        total = len(names) * len(dtypes) * len(KINDS) * len(batches)
        with tqdm.tqdm(total=total, unit="cell") as bar:
            for model, dtype, kind in (
                (model, dtype, kind) for model in names for dtype in dtypes for kind in KINDS
            ):
                if kind == KINDS[0]:
                    bar.set_description(f"{model} {dtype} loading")
                    # the PyTorch side makes the weights that both load
                    config = workers["torch"]("make", model=model, config=MODELS[model])
                    for side in SIDES:
                        workers[side]("load", model=model, dtype=dtype)
                slowest = 0.0  # seconds per row of both sides, of the batch before
                for batch in batches:
                    bar.set_description(f"{model} {dtype} {kind} x{batch}")
                    cell = {"model": model, "dtype": dtype, "kind": kind, "batch": batch}
                    length = 0 if kind == "image" else text_length(kind, batch)
                    if length:
                        cell["length"] = length
                    if (expected := 2 * slowest * batch) > limit:
                        cell["skipped"] = (
                            f"expected {expected:.0f} s for two passes of both sides, over the "
                            f"limit of {limit:.0f} s"
                        )
                    else:
                        np.save(directory / "input.npy", inputs(config, kind, batch))
                        cell |= measure(workers, cell, directory, seconds)
                        slowest = sum(cell[side]["seconds"] for side in SIDES) / batch
                        for side in SIDES:
                            rate = flops(config, kind, length) * cell[side]["per_second"]
                            cell[side]["share"] = rate / matrix[dtype][side]
                    cells.append(cell)
                    bar.update()
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(directory)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/encoders.py " + " ".join(sys.argv[1:]),
        "machine": {
            "device": about["jax"]["device"],
            "platform": platforms["jax"],
            "cpu": cpu_name(),
            "threads": threads,
            "load_before": load,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "settings": {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), **about["torch"]["settings"]},
        "matrix_rate": matrix,
        "cells": cells,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(measured: Mapping[str, Any]) -> Iterator[str]:
    """Markdown, one row per cell; what was skipped says so."""
    head = (
        *("model", "dtype", "input", "batch", "JAX /s", "PyTorch /s", "ratio"),
        *("share of matrix rate, JAX / PyTorch", "MB, JAX / PyTorch", "compile s"),
    )
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for cell in measured["cells"]:
        what = "image" if cell["kind"] == "image" else f"text, {cell['length']}"
        row = [cell["model"], cell["dtype"], what, str(cell["batch"])]
        if "skipped" in cell:
            row += [f"skipped: {cell['skipped']}", *[""] * (len(head) - 5)]
        else:
            ours, theirs = cell["jax"], cell["torch"]
            row += [f"{side['per_second']:,.1f}" for side in (ours, theirs)]
            row += [f"**{cell['ratio']:.2f}**", f"{ours['share']:.0%} / {theirs['share']:.0%}"]
            row += [f"{_mb(ours)} / {_mb(theirs)}", f"{ours['compile_s']:.1f}"]
        yield "| " + " | ".join(row) + " |"


def _short(value: Any) -> Any:
    """Floats at four digits: there are no more in a measurement."""
    if isinstance(value, Mapping):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _mb(side: Mapping[str, Any]) -> str:
    return "not measured" if side["extra_mb"] is None else f"{side['extra_mb']:,.0f}"


def main() -> None:
    def names(known: Mapping[str, Any]) -> Any:
        def parse(given: str) -> list[str]:
            if unknown := set(given.split(",")) - set(known):
                message = f"unknown {', '.join(unknown)}; there are {', '.join(known)}"
                raise argparse.ArgumentTypeError(message)
            return given.split(",")

        return parse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=names(MODELS), default=list(MODELS)[:2])
    parser.add_argument("--dtypes", type=names(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0 = all cores")
    parser.add_argument("--limit", type=float, help="skip cells expected to take more seconds")
    parser.add_argument("--quick", action="store_true", help="rough, and without the large batches")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "encoders.json")
    args = parser.parse_args()
    measured = run(
        args.models,
        args.dtypes,
        sorted(int(batch) for batch in args.batches.split(",")),
        threads=args.threads,
        seconds=0.5 if args.quick else 8.0,
        limit=args.limit or (10.0 if args.quick else 110.0),
    )
    args.output.write_text(json.dumps(_short(measured), indent=1) + "\n")
    for line in table(measured):
        print(line)


if __name__ == "__main__":
    main()
