"""TFDS builder of CIRCUS (Attimonelli et al., arXiv 2605.14787): lists of queries, no images."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from data.benchmark import TEXT, absent
from data.corpus import Unusable
from data.formats import json_lines, row
from data.source import Options, Report, SourceBuilder, Split, Survey, field, stamp, tables

FOLDERS = {  # split -> folders of its lists, with the dataset's name in the place of {}
    "shortcut_free": ("shortcut_free_subsets/{}/shortcut_free",),
    "validated": (
        "final_dataset/query_jsonl/{}/validated_solved",
        "final_dataset/query_jsonl/{}/validated_unsolved",
    ),
}
OFFICIAL = {
    "shortcut_free": {"cirr": 685, "fashioniq": 4069, "circo": 56},
    "validated": {"cirr": 303, "fashioniq": 586, "circo": 42},
}
FIELDS = {  # of M-BEIR's queries, and of those made of CIRCO
    "cirr": ("qid", "query_txt"),
    "fashioniq": ("qid", "query_txt"),
    "circo": ("query_id", "query_text"),
}


class Circus(SourceBuilder):
    """CIRCUS: the queries of CIRR, FashionIQ and CIRCO val that one modality does not solve."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tables("cirr", "fashioniq", "circo")
    HELP = """
CIRCUS: a copy of github.com/matteoattimonelli/CIRCUS. The folder holds
    shortcut_free_subsets/{cirr,fashioniq,circo}/shortcut_free/*.jsonl
    final_dataset/query_jsonl/{cirr,fashioniq,circo}/{validated_solved,validated_unsolved}/*.jsonl"""

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """See the base class."""
        return tuple(FOLDERS)

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        """query: its id there; reference_name: its image; text: as there."""
        del table
        return {"query": TEXT, "reference_name": TEXT, "text": TEXT}

    @classmethod
    def survey(cls, source: Path, options: Options) -> Survey:
        """Reads the lists."""
        splits: dict[str, dict[str, Split]] = {table: {} for table in FIELDS}
        reports, skipped = {}, {}
        for split, folders in FOLDERS.items():
            if not options.wanted(split):
                continue
            counts, problems = {}, []
            for table in FIELDS:
                places = [source / folder.format(table) for folder in folders]
                files = [_lists(place) for place in places]
                if not any(files):
                    continue
                problems += [
                    f"{place}: no list in it"
                    for place, found in zip(places, files, strict=True)
                    if not found
                ]
                records = _records(table, [file for found in files for file in found])
                counts[table] = len(records)
                splits[table][split] = Split(
                    lambda start, records=records: records[start:], stamp(records), len(records)
                )
            if not counts:
                skipped[split] = str(absent([source / FOLDERS[split][0].format(t) for t in FIELDS]))
                continue
            reports[split] = Report(counts, OFFICIAL[split], problems=problems)
        return Survey({t: found for t, found in splits.items() if found}, reports, skipped)


def _lists(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.jsonl") if not f.name.endswith(".trace.jsonl"))


def _records(table: str, files: list[Path]) -> list[dict[str, Any]]:
    name, text = FIELDS[table]
    found: dict[str, dict[str, Any]] = {}
    for item in (item for file in files for item in json_lines(file)):
        try:
            entry = row(item)
        except Unusable as error:
            raise DataError(f"{item.where}: {error}. Get the file again.") from error
        key = field(entry, name, str, item.where)
        if key in found:
            raise DataError(f"{item.where}: query {key} is there twice. Get the files again.")
        found[key] = {
            "id": len(found),
            "query": key,
            "reference_name": Path(field(entry, "query_img_path", str, item.where)).stem,
            "text": field(entry, text, str, item.where),
        }
    return list(found.values())
