"""The benchmarks' dummy data, copies of them to break, and reading back what is built."""

import json
import shutil
from pathlib import Path
from typing import Any

from cir_jax.input.tables import Table

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "cirr_mbeir": "mbeir/dummy/cirr",
    "fashioniq_mbeir": "mbeir/dummy/fashioniq",
    "annotated": "circo/dummy",
}


def dummy(dataset: str) -> Path:
    return ROOT / "data" / PLACES.get(dataset, f"{dataset}/dummy")


def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dummy(dataset), tmp_path / "source"))


def edit(file: Path, change: Any) -> None:
    """Changes the content of a JSON file in place; other values than None replace it."""
    content = json.loads(file.read_text())
    new = change(content)
    file.write_text(json.dumps(content if new is None else new))


def rows(data_dir: Path, dataset: str, table: str, split: str) -> list[dict]:
    found = Table(data_dir, dataset, table, split)
    return [found[i] for i in range(len(found))]
