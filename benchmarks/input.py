"""How fast a host reads training batches, per core, beside what a step needs.

    python benchmarks/input.py            # about a minute of two cores

    world         records of the embedded world, as they are
    jpeg_WxH      image-caption pairs of W x H pixels, 224 of which CLIP's preprocessing keeps:
                  "whole" decodes JPEGs as the released codes do, "reduced" at a half or a quarter
                  (config.stage.NAME.data.reduced_jpeg)
    features      float32[768] in the place of the image: "memory", an array of the whole corpus, as
                  every host held it before, and "disk", rows that are read when they are asked for

from the records on the disk to batches of 64 with token ids. The ways of one kind take turns in one
process, on one thread; the rate is that of the best of --repeats, over processor seconds, which
other loads disturb less than those on the wall. "texts": what processes spend per batch to agree on
the length of its texts, after all have read it. The need is arithmetic: images per second that the
image tower alone would take, frozen, at 40 % of the chip's bfloat16 products. Writes
benchmarks/input.json.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageChops  # noqa: E402

from benchmarks.machine import signed  # noqa: E402
from cir_jax import weights  # noqa: E402
from cir_jax.input import images  # noqa: E402
from cir_jax.input.pipeline import Part, Pipeline, trimmed_alike  # noqa: E402
from cir_jax.input.records import CaptionPairs, Records, TrimText  # noqa: E402
from cir_jax.input.tables import Table  # noqa: E402
from cir_jax.sharding import joining  # noqa: E402
from cir_jax.storage.chunk_store import ChunkStore  # noqa: E402
from data import build  # noqa: E402

BACKBONE = "data/shapes/clip"
SIZES = ((224, 224), (640, 480), (1280, 960))
BATCH, DIM, EOS = 64, 768, 7
DRAWN = 4
"""Pictures; the others are these, shifted."""
TOWERS = {"ViT-B/32": (12, 768, 50), "ViT-L/14": (24, 1024, 257)}
"""Layers, width, tokens."""
CHIPS = {"TPU v5e": 197e12, "H100": 989e12}
"""Products and sums per second in bfloat16, by their makers."""
SHARE = 0.4


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of several scales: as a JPEG, about as large as a photograph."""
    total = np.zeros((height, width, 3), np.float32)
    for cell in (2, 4, 16, 64):
        small = rng.standard_normal((height // cell + 2, width // cell + 2, 3), np.float32)
        bands = [
            Image.fromarray(band).resize((width, height), 3) for band in small.transpose(2, 0, 1)
        ]
        total += 4 * cell**0.5 * np.stack([np.asarray(band) for band in bands], axis=-1)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def pairs(folder: Path, count: int, width: int, height: int) -> Table:
    """A prepared table of JPEGs with five captions each."""
    rng, name = np.random.default_rng(0), f"jpeg_{width}x{height}"
    source = folder / f"source_{name}"
    source.mkdir(parents=True)
    words = "a the red blue dog cat on in with large small street beach table two three".split()
    drawn = [picture(rng, width, height) for _ in range(DRAWN)]
    with (source / "captions.jsonl").open("w") as file:
        for i in range(count):
            turned = ImageChops.offset(drawn[i % DRAWN], 17 * i, 31 * i)
            turned.save(source / f"{i}.jpg", quality=87)
            texts = [" ".join(rng.choice(words, rng.integers(6, 16))) for _ in range(5)]
            file.write(json.dumps({"image": f"{i}.jpg", "caption": texts}) + "\n")
    build.prepare("pairs", data_dir=folder, source=source, name=name)
    return Table(folder, name, "captions", "train")


def pipelines(folder: Path, count: int) -> dict[str, dict[str, Pipeline]]:
    """Kind -> way -> what is timed."""
    backbone = weights.load_architecture(BACKBONE)
    trim = TrimText(backbone.tokenizer.eos_id, 8)

    def made(table: Table, suffix: str = "images", **options: Any) -> Pipeline:
        transform = options.pop("transform", images.clip(224))
        source = Records(table, ("image",), transform, **options)
        part = Part("captions", source, CaptionPairs(backbone.tokenizer, suffix))
        return Pipeline((part,), min(BATCH, count), seed=0, trim=trim)

    build.prepare("shapes_tiny", ["captions"], folder)
    world = Table(folder, "shapes_tiny", "captions", "train")
    found = {"world": {"whole": made(world, transform=backbone.image_transform)}}
    for width, height in SIZES:
        table = pairs(folder, count, width, height)
        found[f"jpeg_{width}x{height}"] = {
            way: made(table, reduced=way == "reduced") for way in ("whole", "reduced")
        }
    rows = np.random.default_rng(0).standard_normal((len(table), DIM), np.float32)
    store = ChunkStore(folder / "features", {}, len(rows))
    store.write(0, rows)
    found["features"] = {
        way: made(table, "features", features={"image": values})
        for way, values in (("memory", rows), ("disk", store.stored()))
    }
    return found


def rates(ways: dict[str, Pipeline], batches: int, repeats: int) -> dict[str, int]:
    """Way -> rows per processor second, on one thread."""
    best = dict.fromkeys(ways, 0.0)
    for repeat in range(repeats + 1):
        for way, pipeline in ways.items():
            dataset = pipeline.dataset()
            began = time.process_time()
            for i in range(batches):
                dataset[repeat * batches + i]
            seconds = time.process_time() - began
            if repeat:  # the first one opens files
                best[way] = max(best[way], batches * pipeline.batch_size / seconds)
    return {way: round(rate) for way, rate in best.items()}


def needs() -> dict[str, dict[str, int]]:
    """Tower -> chip -> images per second."""
    found = {}
    for name, (layers, width, tokens) in TOWERS.items():
        flops = 2 * layers * (12 * tokens * width**2 + 2 * tokens**2 * width)
        found[name] = {chip: round(SHARE * speed / flops) for chip, speed in CHIPS.items()}
    return found


def agree(port: int, count: int, number: int, batches: int) -> None:
    """One of the processes of `agreement`: prints the milliseconds of each batch."""
    joining.initialize(f"localhost:{port}", count, number)
    ids, took = np.full((BATCH, 77), EOS, np.int32), []
    alike = trimmed_alike(({"token_ids": ids} for _ in range(batches)), TrimText(EOS, 8))
    next(alike)  # all are there
    began = time.perf_counter()
    for _ in alike:
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
    print(json.dumps(1000 * statistics.median(took)))


def agreement(count: int, batches: int) -> float:
    """Median milliseconds of the slowest of `count` processes."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, "--agree", str(port), str(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, str(number), str(batches)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("the processes that agree have failed; see above")
    return round(max(float(text.splitlines()[-1]) for text in said), 2)


def table(report: dict[str, Any]) -> str:
    """Markdown, of the README."""
    lines = ["| records | per core and second | the way before | times |", "|---|---|---|---|"]
    for kind, ways in report["per_core"].items():
        (first, before), *rest = ways.items()
        if not rest:
            lines.append(f"| {kind} | {before:,} | | |")
        for way, rate in rest:
            lines.append(
                f"| {kind}, {way} | {rate:,} | {before:,} ({first}) | {rate / before:.1f} |"
            )
    return "\n".join(lines)


def needs_table(report: dict[str, Any]) -> str:
    """Markdown, of the README."""
    ways = report["per_core"]["jpeg_640x480"]
    lines = [
        "| frozen tower on one chip | images per second | cores, whole JPEGs | reduced |",
        "|---|---|---|---|",
    ]
    for tower, chips in report["needs"].items():
        for chip, need in chips.items():
            cores = " | ".join(f"{need / ways[way]:.0f}" for way in ("whole", "reduced"))
            lines.append(f"| {tower} on {chip} | {need:,} | {cores} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="of each size")
    parser.add_argument("--batches", type=int, default=1, help="that are timed at once")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--agree", type=int, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "input.json")
    args = parser.parse_args()
    if args.agree:
        agree(*args.agree)
        return
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        found = pipelines(Path(folder), args.images)
        per_core = {kind: rates(w, args.batches, args.repeats) for kind, w in found.items()}
    report = {
        "per_core": per_core,
        "needs": needs(),
        "texts_ms": {str(count): agreement(count, 300) for count in (2, 4)},
        "images": args.images,
        "repeats": args.repeats,
        **signed("python benchmarks/input.py", load, "pillow", "grain", "numpy"),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report), needs_table(report), report["texts_ms"], sep="\n\n")


if __name__ == "__main__":
    main()
