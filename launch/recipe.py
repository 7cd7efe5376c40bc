"""Prints what runs an experiment on many machines: a script, or a JobSet for GKE.

    python launch/recipe.py --kind=tpu_vm --chips=v5e:4x4 \\
        --config=experiments/compodiff.py:vit_l14 --workdir=gs://BUCKET/run > run.sh

--kind: tpu_vm (gcloud), xpk, jobset (kubectl apply -f), for slices of TPUs; slurm, for GPUs:
--chips=gpu:16 are two nodes of eight. Names that are yours (project, zone, image ...) are asked for
when it runs. Hosts, chips, mesh and batches are checked before anything is printed;
`launch/compile.py` says whether it fits into the chips' memory.
"""

import json
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

from launch import common  # noqa: E402

RECIPES = {
    "tpu_vm": "tpu_vm.sh",
    "xpk": "xpk.sh",
    "jobset": "jobset.yaml",
    "slurm": "slurm.sh",
}
"""Kind -> file in launch/recipes."""

# kind of chip -> how gcloud, its images and GKE call it; the first counts cores, of which v4 and
# v5p have two
TPUS = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
GPUS_PER_NODE = 8

KIND = flags.DEFINE_enum("kind", None, list(RECIPES), "What starts it", required=True)
CHIPS = flags.DEFINE_string("chips", None, "v5e:4x4 (of a slice), or gpu:16", required=True)
SLICES = flags.DEFINE_integer("slices", 1, "Slices of TPUs", lower_bound=1)


def main() -> None:
    from cir_jax import experiment as experiments
    from cir_jax.errors import ConfigError
    from cir_jax.sharding import mesh as meshes

    config, slices = common.CONFIG.value, SLICES.value
    if common.WORKDIR.value is None:
        raise ConfigError(
            "--workdir is missing: a place that all hosts see, gs://BUCKET/run or a shared disk."
        )
    values, per_slice = _machines(KIND.value, CHIPS.value)
    hosts, devices = values["slice_hosts"] * slices, per_slice * slices
    if KIND.value == "slurm" and slices > 1:
        raise ConfigError(f"--slices={slices}: GPUs have no slices. Ask for more --chips.")
    shape = meshes.mesh_shape(config.mesh, devices, slices)
    # one process for each host of TPUs, one for each GPU
    processes = devices if KIND.value == "slurm" else hosts
    if (devices // processes) % shape[2]:
        raise ConfigError(
            f"--config.mesh.tensor={shape[2]}: the {devices // processes} device(s) of a process "
            "are not divisible by it, and processes read different rows."
        )
    for name in experiments.stage_names(config):
        rows, field = config.stage[name].batch_size, f"stage.{name}.batch_size"
        meshes.check_rows(rows, shape[0] * shape[1], processes, field)
    nodes = ['"$NAME"'] if slices == 1 else [f'"$NAME-{i}"' for i in range(slices)]
    given = [f for f in sys.argv[1:] if f.startswith(("--config", "-config"))]
    command = shlex.join(["python", "launch/main.py", *given, f"--workdir={common.WORKDIR.value}"])
    values |= {
        "config": f"experiments/{config.name}.py:{config.preset}",
        "slices": slices,
        "chips": CHIPS.value,
        "devices": devices,
        "hosts": hosts,
        "mesh": " x ".join(f"{a} {n}" for a, n in zip(meshes.AXES, shape, strict=True)),
        "made": shlex.join(common.command()),
        "command": command,
        "in_home": shlex.quote(f"cd cir_jax && {command}"),
        "in_image": shlex.quote(f"cd /cir_jax && {command}"),
        "quoted_command": json.dumps(command),  # which YAML reads, too
        "job": re.sub(r"[^a-z0-9]+", "-", f"{config.name}-{config.preset}".lower()),
        "names": '--node-id="$NAME"'
        if slices == 1
        else f'--node-count={slices} --node-prefix="$NAME"',
        "nodes": " ".join(nodes),
    }
    text = (Path(__file__).parent / "recipes" / RECIPES[KIND.value]).read_text()
    print(re.sub(r"@(\w+)@", lambda match: str(values[match[1]]), text), end="")


def _machines(kind: str, chips: str) -> tuple[dict[str, object], int]:
    """What a recipe says of a slice's machines, and the devices in it."""
    from cir_jax.errors import ConfigError
    from cir_jax.sharding import topologies

    if kind != "slurm":
        devices, hosts = topologies.count(chips)
        generation, _, topology = chips.partition(":")
        name, cores, runtime, gke = TPUS[generation]
        return {
            "accelerator": f"{name}-{devices * cores}",
            "runtime": runtime,
            "gke_accelerator": gke,
            "topology": topology,
            "per_host": topologies.PER_HOST,
            "slice_hosts": hosts,
        }, devices
    match = re.fullmatch(r"gpu:([1-9]\d*)", chips)
    if not match:
        raise ConfigError(f"--chips={chips}: for slurm expected gpu:16 or so, all GPUs together.")
    devices = int(match[1])
    per_node = min(devices, GPUS_PER_NODE)
    if devices % per_node:
        raise ConfigError(f"--chips={chips}: nodes have {per_node} GPUs. Take a multiple of them.")
    return {"per_host": per_node, "slice_hosts": devices // per_node}, devices


if __name__ == "__main__":
    common.run(main)
