"""Speed and memory of the CLIP towers against PyTorch and onnxruntime, in one run on one machine.

    python benchmarks/encoders.py                    # CPU or CUDA GPU, whatever all sides see
    python benchmarks/encoders.py --quick            # rougher, and without the large batches
    python benchmarks/encoders.py --models=ViT-B/32 --batches=1,32 --output=mine.json
    python benchmarks/encoders.py --resume --limit=1100   # what was skipped or is still to come

Random weights of the published shapes: a transformers.CLIPModel is built from its config, its
state_dict converted by cir_jax.weights, and the features compared before anything is timed. Each
side lives in its own process (encoders_worker.py) and they take turns, so that what else the
machine does hits all. Compilation stands apart. A side that is not installed, fails or dies is
missing with the reason, and the rest goes on. benchmarks/encoders.json is written after each cell.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoders_table import REFERENCE, SIDES, table  # noqa: E402

KINDS = ("image", "text", "text77")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative error, ||ours - theirs|| / ||theirs||, above which nothing is timed."""

PATIENCE = 900.0
"""Seconds to wait for one answer; a side that takes longer is ended."""

FULL_LENGTH = 77
BUCKET = 8
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "onnx", "onnxruntime", "numpy")
BAR = "{desc}{percentage:.0f}%|{bar}| {elapsed} so far, {remaining} to go"
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
        self.side, self.arguments = side, [side, str(threads), str(directory)]
        self.start()

    def start(self) -> None:
        # the GPU is shared by all processes: JAX must not take all of its memory at once
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        script = Path(__file__).with_name("encoders_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, do: str, **request: Any) -> Any:
        """Raises SideMissing with the reason."""
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            status = self.process.wait()
            raise SideMissing(f"its process ended with status {status} at {do}")
        answer = json.loads(line)
        if "missing" in answer:
            raise SideMissing(answer["missing"])
        return answer["value"]

    def revive(self) -> None:
        if self.process.poll() is not None:
            self.start()

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class SideMissing(Exception):
    """Why a side has no number."""


def ask(
    workers: Mapping[str, Worker], missing: dict[str, str], do: str, **request: Any
) -> dict[str, Any]:
    """The answers of the sides that are not `missing`; whoever has none becomes so."""
    answers = {}
    for side, worker in workers.items():
        if side not in missing:
            try:
                answers[side] = worker(do, **request)
            except SideMissing as reason:
                missing[side] = str(reason)
    return answers


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
    workers: Mapping[str, Worker],
    missing: Mapping[str, str],
    request: Mapping[str, Any],
    directory: Path,
    seconds: float,
    limit: float,
) -> dict[str, Any]:
    """One cell: agreement, compile time, memory, then all sides in turns for about `seconds`.

    Where one more pass of all sides would take over a quarter of `limit`, the first is what counts.
    """
    lost = dict(missing)
    sides = ask(workers, lost, "prepare", **request)
    features = {side: np.load(directory / f"{side}.npy") for side in sides}
    against = REFERENCE if REFERENCE in features else next(iter(features), REFERENCE)
    for side in list(sides):
        error = float(
            np.linalg.norm(features[side] - features[against]) / np.linalg.norm(features[against])
        )
        sides[side]["error"] = error
        if not error < TOLERANCE[request["dtype"]]:
            lost[side] = f"its features differ by {error:.1e}"
            del sides[side]
    once = {side: max(sides[side].pop("pass_s"), 1e-6) for side in sides}
    # a sample is at least 50 ms of passes
    passes = {side: max(1, round(0.05 / once[side])) for side in sides}
    turn = sum(once[side] * passes[side] for side in sides)
    rounds = min(max(int(seconds / max(turn, 1e-6)), 1), 25) if turn < limit / 4 else 0
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        # who goes first changes, too
        for side in list(samples)[:: 1 if number % 2 else -1]:
            taken = ask({side: workers[side]}, lost, "time", passes=passes[side])
            samples[side] += taken.values()
    for side in sides:
        times = samples[side] or [once[side]]
        middle = statistics.median(times)
        sides[side] |= {"seconds": middle, "fastest_s": min(times)}
        sides[side]["per_second"] = request["batch"] / middle
    cell: dict[str, Any] = {**sides, "rounds": rounds}
    others = [side for side in sides if side != "jax"]
    if "jax" in sides:
        for name, field in (("ratio", "seconds"), ("ratio_fastest", "fastest_s")):
            cell[name] = {side: sides[side][field] / sides["jax"][field] for side in others}
    # a side may have been lost after its first pass, which stands
    return cell | {"missing": {side: why for side, why in lost.items() if side not in sides}}


def run(
    names: Sequence[str],
    dtypes: Sequence[str],
    sides: Sequence[str],
    batches: Sequence[int],
    *,
    threads: int,
    seconds: float,
    limit: float,
    write: Callable[[dict[str, Any]], None],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All cells, each for about `seconds`; `write` gets what there is after each.

    Those that would take more than `limit` seconds are there with the reason. threads: of each
    side; 0 = as many as there are cores. before: a record whose measured cells stand, if it is of
    this machine and these versions.
    """
    threads = threads or len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    if load > BUSY * threads:
        print(f"Other programs keep {load:.1f} cores busy: expect noise, which the file will tell.")
    directory = Path(tempfile.mkdtemp(prefix="encoders"))
    workers = {side: Worker(side, threads, directory) for side in sides}
    try:
        absent = {side: "not asked for (--sides)" for side in SIDES if side not in sides}
        about = ask(workers, absent, "about", dtypes=dtypes)
        if REFERENCE not in about or "jax" not in about:
            raise SystemExit(f"needs both jax and {REFERENCE}, which makes the weights: {absent}")
        platforms = {side: about[side]["platform"] for side in about}
        if len(set(platforms.values())) > 1:
            raise SystemExit(f"the sides see different devices: {platforms}. Install all for one.")
        both = {side: workers[side] for side in ("jax", REFERENCE)}
        matrix = {dtype: ask(both, {}, "matrix", dtype=dtype, seconds=seconds) for dtype in dtypes}
        measured: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/encoders.py " + " ".join(sys.argv[1:]),
            "machine": {
                "device": about["jax"]["device"],
                "platform": platforms["jax"],
                "cpu": cpu_name(),
                "threads": threads,
                "load_before": load,
            },
            "versions": {"python": platform.python_version(), **versions()},
            "settings": {
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                **about[REFERENCE]["settings"],
            },
            "matrix_rate": matrix,
            "cells": [],
        }
        kept = resumable(before, measured) if before else {}
        plan = list(itertools.product(names, dtypes, KINDS))
        stand = {key for key, cell in kept.items() if "skipped" not in cell}
        # on CPU the other types are for warning of them only
        cpu = platforms["jax"] == "cpu"
        limits = {d: limit / 8 if cpu and d != "float32" else limit for d in dtypes}
        # the bar counts expected seconds, so that its time to go is right
        work = {}
        for model, dtype, kind in plan:
            most = limits[dtype]
            for batch in batches:
                count = flops(complete(MODELS[model]), kind, text_length(kind, batch)) * batch
                passes = len(about) * count / matrix[dtype]["jax"]
                more = max(seconds, passes) if passes < most / 4 else 0
                is_left = passes < most and (model, dtype, kind, batch) not in stand
                work[model, dtype, kind, batch] = passes + more if is_left else 0.0
        bar = tqdm.tqdm(total=sum(work.values()), bar_format=BAR)
        loaded: tuple[str, str] | None = None
        for model, dtype, kind in plan:
            needed = any((model, dtype, kind, batch) not in stand for batch in batches)
            if needed and loaded != (model, dtype):
                bar.set_description(f"{model} {dtype} loading")
                loaded, missing = (model, dtype), dict(absent)
                for worker in workers.values():
                    worker.revive()
                # the PyTorch side makes the weights that all load
                config = workers[REFERENCE]("make", model=model, config=MODELS[model])
                ask(workers, missing, "load", model=model, dtype=dtype)
            slowest = 0.0  # seconds per row of all sides, of the batch before
            for batch in batches:
                bar.set_description(f"{model} {dtype} {kind} x{batch}")
                cell = kept.pop((model, dtype, kind, batch), {})
                if (model, dtype, kind, batch) in stand:
                    slowest = row_seconds(cell)
                    measured["cells"].append(cell)
                    continue
                cell = {"model": model, "dtype": dtype, "kind": kind, "batch": batch}
                length = 0 if kind == "image" else text_length(kind, batch)
                if length:
                    cell["length"] = length
                most = limits[dtype]
                if (expected := slowest * batch) > most:
                    cell["skipped"] = (
                        f"expected {expected:.0f} s for a pass of all sides, over the limit of "
                        f"{most:.0f} s"
                    )
                else:
                    np.save(directory / "input.npy", inputs(config, kind, batch))
                    cell |= measure(workers, missing, cell, directory, seconds, most)
                    slowest = row_seconds(cell)
                    for side in [side for side in SIDES if side in cell]:
                        rate = flops(config, kind, length) * cell[side]["per_second"]
                        cell[side]["rate"] = rate
                        if side in matrix[dtype]:
                            cell[side]["share"] = rate / matrix[dtype][side]
                measured["cells"].append(cell)
                # those of other plans, and those that this run has not come to yet
                write(measured | {"cells": [*measured["cells"], *kept.values()]})
                bar.update(work[model, dtype, kind, batch])
        bar.close()
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(directory)
    measured["cells"] += kept.values()
    return measured


def row_seconds(cell: Mapping[str, Any]) -> float:
    """Of all sides."""
    return sum(cell[side]["seconds"] for side in SIDES if side in cell) / cell["batch"]


def resumable(
    before: Mapping[str, Any], now: dict[str, Any]
) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """The cells of `before` by their names; `now` keeps the head of that run."""
    for field in ("versions", "settings", "machine"):
        old, new = ({**run[field], "load_before": None} for run in (before, now))
        if old != new:
            raise SystemExit(
                f"--resume: the record is of another {field}: {old}, now {new}. "
                "Write to another file (--output) or leave --resume out."
            )
    head = {name: value for name, value in before.items() if name not in ("cells", "resumed")}
    now["resumed"] = [*before.get("resumed", []), head]
    return {
        (cell["model"], cell["dtype"], cell["kind"], cell["batch"]): dict(cell)
        for cell in before["cells"]
    }


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults in place of what `MODELS` does not say."""
    from cir_jax.models.clip import ClipConfig

    return ClipConfig.from_dict(config).to_dict()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _short(value: Any) -> Any:
    """Floats at four digits: there are no more in a measurement."""
    if isinstance(value, Mapping):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


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
    parser.add_argument("--sides", type=names(dict.fromkeys(SIDES)), default=list(SIDES))
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0 = all cores")
    parser.add_argument("--limit", type=float, help="skip cells expected to take more seconds")
    parser.add_argument("--quick", action="store_true", help="rough, and without the large batches")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "encoders.json")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells that --output has; measure the others"
    )
    parser.add_argument("--show", type=Path, help="only print the table of this file")
    args = parser.parse_args()
    if args.show:
        print(*table(json.loads(args.show.read_text())), sep="\n")
        return
    if args.resume and not args.output.exists():
        parser.error(f"--resume: there is no {args.output}. Leave --resume out for a first run.")
    before = json.loads(args.output.read_text()) if args.resume else None
    measured = run(
        args.models,
        args.dtypes,
        args.sides,
        sorted(int(batch) for batch in args.batches.split(",")),
        threads=args.threads,
        seconds=0.5 if args.quick else 6.0,
        limit=args.limit or (20.0 if args.quick else 240.0),
        write=lambda so_far: args.output.write_text(json.dumps(_short(so_far), indent=1) + "\n"),
        before=before,
    )
    for line in table(measured):
        print(line)


if __name__ == "__main__":
    main()
