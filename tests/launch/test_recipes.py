"""Recipes: what is printed can be parsed, asks for the machines of the mesh, and runs the command.

Nothing of Google's or SLURM's is here: programs of their names note what they are asked.
"""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml

from tests.launch.binaries import run

CONFIG = "--config=experiments/compodiff.py:vit_l14"
FLAGS = (CONFIG, "--config.mesh.fsdp=4", "--config.stage.stage1.duration=300 steps")
MAIN = ["python", "launch/main.py", *FLAGS, "--workdir=gs://b/run"]
YOURS = dict.fromkeys(("NAME", "ZONE", "PROJECT", "CLUSTER", "IMAGE"), "mine")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    def of(*flags, status=0):
        scratch = tmp_path_factory.mktemp("recipe")
        got, output = run("recipe", *flags, scratch=scratch)
        assert got == status, output
        return output

    return of


def asked(script, folder, program):
    """What a script asks of `program`: a list of arguments for each call."""
    notes = folder / "notes"
    tool = folder / program
    tool.write_text(
        f"#!/bin/bash\n[[ $* == *describe* ]] && echo ACTIVE\n"
        f"python - \"$@\" <<'E'\nimport json, sys\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(notes)!r}, 'a'))\nE\n"
    )
    tool.chmod(0o755)
    variables = os.environ | YOURS | {"PATH": f"{folder}:{os.environ['PATH']}"}
    variables |= {"SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(["bash"], input=script, text=True, env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in notes.read_text().splitlines()]


def flag(arguments, name):
    (value,) = [a.partition("=")[2] for a in arguments if a.startswith(f"{name}=")]
    return value


def test_slices_of_tpu_vms(printed, tmp_path):
    script = printed("--kind=tpu_vm", "--chips=v5p:4x4x4", "--slices=2", *MAIN[2:])
    assert "128 chips, 32 hosts, mesh data 32 x fsdp 4 x tensor 1" in script
    without = script.replace("echo ACTIVE", "")
    calls = asked(without, tmp_path, "gcloud")
    over_ssh = [call for call in calls if "ssh" in call]
    assert {call[4] for call in over_ssh} == {"mine-0", "mine-1"}
    commands = [shlex.split(flag(call, "--command")) for call in over_ssh]
    assert commands.count(["cd", "cir_jax", "&&", *MAIN]) == 2
    assert not any("create" in call for call in calls)  # it is there already
    assert "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5" in script
    assert '--node-count=2 --node-prefix="$NAME"' in script


def test_xpk(printed, tmp_path):
    script = printed("--kind=xpk", "--chips=v5e:4x4", *MAIN[2:])
    (call,) = asked(script, tmp_path, "xpk")
    assert call[:2] == ["workload", "create"]
    assert flag(call, "--tpu-type") == "v5litepod-16" and flag(call, "--num-slices") == "1"
    assert shlex.split(flag(call, "--command")) == ["cd", "/cir_jax", "&&", *MAIN]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", flag(call, "--workload"))


def test_a_jobset(printed):
    made = yaml.safe_load(printed("--kind=jobset", "--chips=v6e:4x8", "--slices=2", *MAIN[2:]))
    (job,) = made["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    hosts = pods["parallelism"]
    (container,) = pods["template"]["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert pods["completions"] == hosts and job["replicas"] * hosts * chips == 64
    where = pods["template"]["spec"]["nodeSelector"]
    assert where["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert shlex.split(container["command"][2]) == MAIN


def test_slurm(printed, tmp_path):
    script = printed("--kind=slurm", "--chips=gpu:16", *MAIN[2:])
    for line in ("nodes=2", "ntasks-per-node=8", "gres=gpu:8"):
        assert f"#SBATCH --{line}\n" in script
    assert asked(script, tmp_path, "srun") == [MAIN]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kind=xpk", "--chips=v5e:4x4"), "--workdir is missing: a place that all hosts see"),
        (("--kind=xpk", "--chips=v5e:1x2", "--workdir=x"), "v5e:1x2 has 2 chips: hosts of a slice"),
        (("--kind=slurm", "--chips=8", "--workdir=x"), "for slurm expected gpu:16 or so"),
        (("--kind=slurm", "--chips=gpu:12", "--workdir=x"), "nodes have 8 GPUs"),
        (
            ("--kind=xpk", "--chips=v5e:4x4", "--workdir=x", "--config.mesh.fsdp=3"),
            "16 devices are not divisible by 3",
        ),
        (
            ("--kind=xpk", "--chips=v5e:4x4", "--workdir=x", "--config.mesh.tensor=8"),
            "--config.mesh.tensor=8: the 4 device(s) of a process are not divisible by it",
        ),
        (
            ("--kind=xpk", "--chips=v5e:4x4", "--workdir=x", "--config.stage.stage2.batch_size=40"),
            "stage.stage2.batch_size=40 is not divisible by data x fsdp = 16 (4 processes)",
        ),
    ],
)
def test_machines_that_do_not_fit(printed, flags, message):
    assert message in printed(CONFIG, *flags, status=2)
