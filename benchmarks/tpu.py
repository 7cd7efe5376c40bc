"""What the papers' training steps take of TPUs, by their compiler, without one.

    pip install "cir_jax[tpu-aot]" && python benchmarks/tpu.py [NAME ...]

Runs `launch/compile.py` for each of `ENTRIES`, keeps what it found in `benchmarks/tpu/NAME.json`,
and writes the table of `benchmarks/README.md` from these files; --table writes the table alone.
tests/benchmarks/test_tpu.py compiles one of them again, where libtpu is installed.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cir_jax.errors import unknown  # noqa: E402

FOLDER = ROOT / "benchmarks" / "tpu"
README = ROOT / "benchmarks" / "README.md"
MARKERS = "<!-- table: benchmarks/tpu -->", "<!-- end -->"

# of files that the papers' authors made, the embedded world's have their place
_PHRASES = [
    f"--config.stage.{s}.composer.phrases=data/shapes/phrases.json" for s in ("oti", "distil")
]
_FOUR = ["--topology=v5e:4x4", "--config.mesh.fsdp=4"]

ENTRIES: dict[str, list[str]] = {
    "pic2word_vit_l14": ["--config=experiments/pic2word.py:vit_l14", *_FOUR],
    "searle_vit_l14": ["--config=experiments/searle.py:vit_l14", *_FOUR, *_PHRASES],
    "lincir_vit_l14": [
        "--config=experiments/lincir.py:vit_l14",
        *_FOUR,
        "--config.stage.smp.data.keywords=data/shapes/parts_of_speech.json",
    ],
    "compodiff_vit_l14": ["--config=experiments/compodiff.py:vit_l14", *_FOUR],
    "compodiff_vit_l14_scan": [
        *("--config=experiments/compodiff.py:vit_l14", *_FOUR, "--config.scan=True")
    ],
    "combiner_vit_l14": ["--config=experiments/combiner.py:vit_l14", *_FOUR],
    "rtd_pic2word_vit_l14": ["--config=experiments/rtd.py:pic2word_vit_l14", *_FOUR],
    "tat_vit_l14": ["--config=experiments/tat.py:vit_l14", *_FOUR],
    "clip4cir_vit_l14": ["--config=experiments/clip4cir.py:vit_l14", *_FOUR],
    "artemis_clip_rn50": ["--config=experiments/artemis.py:clip_rn50", *_FOUR],
    "magiclens_vit_l14": [
        *("--config=experiments/magiclens.py:vit_l14", *_FOUR),
        # both towers are trained, on 256 images a chip: layers are computed twice
        *("--config.remat=True", "--config.scan=True"),
    ],
    "isa_paper": [
        *("--config=experiments/isa.py:paper", *_FOUR),
        "--config.composer.pretrained=False",  # the light encoder's weights need not be here
        "--config.scan=True",  # BLIP's towers
    ],
    "palavra_vit_b32": [
        *("--config=experiments/palavra.py:vit_b32", *_FOUR),
        "--config.stage.invert.composer.objects=data/shapes/objects.json",
    ],
}
"""Name -> flags of launch/compile.py."""


def measure(name: str) -> int:
    """Compiles an entry and keeps the report. The exit status of launch/compile.py, which says by
    itself what is wrong: a step that does not fit, or no libtpu."""
    command = [sys.executable, "launch/compile.py", *ENTRIES[name]]
    return subprocess.run([*command, f"--json=benchmarks/tpu/{name}.json"], cwd=ROOT).returncode


def read() -> dict[str, dict[str, Any]]:
    """Name -> kept report, of the entries that have one."""
    files = {name: FOLDER / f"{name}.json" for name in ENTRIES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each stage."""
    head = [
        *("preset and stage", "chips", "rows", "GiB per chip, + not read", "TFLOP of products"),
        *("compiled, all chips", "gathered, MiB", "summed, MiB", "all over 4 B x weights"),
        "CPU seconds to compile",
    ]
    rows = [head, ["---"] * len(head)]
    for report in reports.values():
        for stage in report["stages"]:
            moved = {kind: each["bytes"] for kind, each in stage["collectives"].items()}
            summed = sum(moved.get(kind, 0) for kind in ("all-reduce", "reduce-scatter"))
            weights = 4 * (stage["trained"] + stage["frozen"] * (stage["mesh"]["fsdp"] > 1))
            chips = math.prod(stage["mesh"].values())
            axes = " x ".join(f"{k} {v}" for k, v in stage["mesh"].items() if v > 1)
            scan, remat = (f"--config.{f}=True" in report["command"] for f in ("scan", "remat"))
            loops = scan or not stage["trained"]  # of layers, or of what is inverted
            name = re.search(r"experiments/([^ ]+)", report["command"])[1]
            slices = f"{report['slices']} x " * (report["slices"] > 1)
            rows.append(
                [
                    f"{name} {stage['stage']}{', in a loop' * scan}{', remat' * remat}",
                    f"{slices}{report['topology']} ({axes})",
                    f"{stage['batch_size']:,}",
                    " + ".join(f"{stage[k] / 2**30:.2f}" for k in ("peak", "unread")),
                    f"{stage['flops'] / 1e12:,.1f}",
                    # the compiler counts a loop once
                    "" if loops else f"{stage['compiled_flops'] * chips / 1e12:,.1f}",
                    f"{moved.get('all-gather', 0) / 2**20:,.0f}",
                    f"{summed / 2**20:,.0f}",
                    f"{sum(moved.values()) / weights:.2f}",
                    f"{stage['cpu_seconds']:.0f}",
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table() -> None:
    before, rest = README.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1], 1)[1]
    README.write_text(f"{before}{MARKERS[0]}\n{table(read())}\n{MARKERS[1]}{after}")


def main(arguments: list[str]) -> None:
    if arguments != ["--table"]:
        for name in arguments:
            if name not in ENTRIES:
                sys.exit(f"error: {unknown('entry', name, ENTRIES)}")
        for name in arguments or ENTRIES:
            if status := measure(name):
                sys.exit(status)
    write_table()


if __name__ == "__main__":
    main(sys.argv[1:])
