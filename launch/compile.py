"""Compiles every stage of an experiment for devices that need not be here, and says what it takes.

    python launch/compile.py --config=experiments/compodiff.py:vit_l14 --topology=v5e:4x4

prints, for each stage, seconds to compile, memory and operations per chip, what chips exchange and
the largest arrays; weights and data need not be there. A TPU's topology needs libtpu
(`pip install "cir_jax[tpu-aot]"`), but no TPU; `cpu:8` are 8 virtual devices. The mesh is the
config's (--config.mesh.fsdp=8), with --slices several slices lie along `data`.
Exit status: 0 = every stage fits into a chip's memory, 2 = one does not, or error.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

from launch import common, ending  # noqa: E402

TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Chips of a slice: v5e:4x4, v5p:4x4x4, cpu:8")
SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File for the whole report")


def main() -> None:
    import jax

    # the compiler is asked, not a TPU that may be here; and asked anew, as its time is reported
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    kind, _, count = TOPOLOGY.value.partition(":")
    if kind == "cpu" and count.isdigit():
        jax.config.update("jax_num_cpu_devices", int(count))
    from cir_jax import experiment as experiments
    from cir_jax.errors import ConfigError
    from cir_jax.sharding import topologies
    from cir_jax.storage import buckets
    from cir_jax.storage.atomic import check_writable, write_atomically
    from cir_jax.training import ahead, stages
    from data import build

    config = ahead.stand_in(common.CONFIG.value)
    names = experiments.stage_names(config)
    if not names:
        raise ConfigError(f"{config.name} trains nothing: it has no step to compile.")
    file = buckets.local(JSON.value, "--json") if JSON.value else None
    if file:  # before minutes of compiling
        check_writable(file.parent)
    devices = topologies.devices(TOPOLOGY.value, SLICES.value)
    memory = topologies.memory_gib(TOPOLOGY.value)
    build.prepare_needed(stages.required_tables(config), data_dir=experiments.data_dir(config))
    experiment = experiments.setup(config, devices=devices)
    reports, problems = [], []
    for name in names:
        ending.phase(f"compiling stage {name}", "nothing was written")
        try:
            reports.append(ahead.compile_stage(experiment, name, memory))
        except ahead.TooBig as error:
            problems.append(str(error))
        else:
            print(ahead.describe(reports[-1], memory), flush=True)
    if file:
        about = {
            "command": " ".join(f for f in common.command() if not f.startswith("--json")),
            "topology": TOPOLOGY.value,
            "slices": SLICES.value,
            "devices": len(devices),
            "compiler": topologies.compiler(TOPOLOGY.value),
            "stages": [dataclasses.asdict(report) for report in reports],
            "too_big": problems,
        }
        text = json.dumps(about, indent=1) + "\n"
        write_atomically(file, lambda made: made.write(text.encode()))
    if problems:
        raise ahead.TooBig(" ".join(problems))


if __name__ == "__main__":
    common.run(main)
