"""The contract on imports holds, and notices each import that ran upwards before there was one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cir_jax.storage.places import SHIPPED

pytest.importorskip("importlinter")
UPWARDS = {
    "loading.py": "cir_jax.library.library",
    "composers/phrases.py": "cir_jax.retrieval.features",
    "input/keywords.py": "cir_jax.weights.files",
    "input/objects.py": "cir_jax.weights.kinds",
    "input/phrases.py": "cir_jax.retrieval.features",
    "sharding/rows.py": "cir_jax.training.step",
    "storage/places.py": "cir_jax.sharding.mesh",
    "retrieval/features.py": "cir_jax.training.step",
    "retrieval/search.py": "cir_jax.training.loop",
    "experiment.py": "cir_jax.training.inputs",
    "training/inputs.py": "cir_jax.evaluation.benchmarks",
    "weights/official.py": "cir_jax.composers.base",
    "weights/files.py": "cir_jax.retrieval.ranking",
    "models/clip.py": "experiments.base",
}


def lint(directory: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


def test_each_room_imports_only_from_the_floors_below(tmp_path):
    shutil.copy(SHIPPED / "pyproject.toml", tmp_path)
    for name in ("cir_jax", "experiments"):
        shutil.copytree(SHIPPED / name, tmp_path / name, ignore=lambda *_: ["__pycache__"])
    kept = lint(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    for name, module in UPWARDS.items():
        file = tmp_path / "cir_jax" / name
        file.write_text(file.read_text() + f"\n\ndef later():\n    import {module}  # noqa\n")
    broken = lint(tmp_path)
    assert broken.returncode == 1
    for name, module in UPWARDS.items():
        importer = "cir_jax." + name.removesuffix(".py").replace("/", ".")
        # of packages outside, the report names the root alone
        module = module if module.startswith("cir_jax.") else module.partition(".")[0]
        assert f"{importer} -> {module} (l." in broken.stdout, name
    (tmp_path / "cir_jax" / "attic.py").write_text("")
    assert "attic" in lint(tmp_path).stdout  # a room without a floor
