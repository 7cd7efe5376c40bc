"""What reads corpora: our readers beside the libraries that read the same files.

    pip install datasets webdataset ijson orjson
    python benchmarks/readers.py        # about five minutes of one core

    parquet_texts    captions, groups of 10,000 rows
    parquet_images   a caption and an image of 20 KB as `datasets` writes them, groups of 100 rows
    tar              the same as img2dataset writes it: KEY.jpg, KEY.txt, KEY.json
    jsonl, json      {"id", "image", "caption"}, one a line; LLaVA's list of conversations
    csv              tab separated and quoted as pandas does

Every reader gives (caption, image or None) of each record, one after another; that all give the
same is checked. Each runs in a process of its own, which has read a small file of the kind before:
records per second, processor seconds of all its threads, and the memory that it takes beyond what
it had before. The readers of one format take turns; the numbers are those of the run of --repeats
that took the fewest processor seconds. Files are read from the page cache.

Beside it, what each does with a file of 20 records of which one is broken: "told" = the reader says
which one, and gives the other 19. Writes benchmarks/readers.json.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from benchmarks.machine import forget_peak, held_mib, signed  # noqa: E402
from benchmarks.reader_files import Texts, defects, named, write  # noqa: E402
from cir_jax.errors import DataError  # noqa: E402
from data import corpus, formats  # noqa: E402
from data.pairs import readers as pairs  # noqa: E402

COUNTS = {
    "parquet_texts": 400_000,
    "parquet_images": 10_000,
    "tar": 10_000,
    "jsonl": 400_000,
    "json": 200_000,
    "csv": 400_000,
}
WARM = 50
"""Records that are read before."""
Pair = tuple[Any, bytes | None]
"""A caption, with ours perhaps what is wrong with the record, and its image."""


# the readers: ours, as the builders of the corpora call them


def ours(path: Path) -> Iterator[Pair]:
    columns = {"image": ("image",)} if path.suffix == ".parquet" and _has_images(path) else {}
    names = {"caption": pairs.FIELDS["caption"], **columns}
    for item in formats.rows([path], names):
        if isinstance(item.value, corpus.Unusable):
            yield item.value, None
            continue
        try:
            text = corpus.text(_caption(item.value["caption"]), "caption")
            image = corpus.image_bytes(item.value["image"], "image") if columns else None
        except corpus.Unusable as error:
            yield error, None
        else:
            yield text, image


def _has_images(path: Path) -> bool:
    return "image" in formats.parquet_columns(path)


def ours_tar(path: Path) -> Iterator[Pair]:
    for entry in pairs.Shards(path, {}).entries(0, contents=True):
        try:
            if entry.problem:
                raise corpus.Unusable(entry.problem)
            record = entry.load()
        except corpus.Unusable as error:
            yield error, None
        else:
            yield record["captions"][0], record["image"]


def _caption(value: Any) -> Any:
    """Of a list of conversations, the answer."""
    return value[1]["value"] if isinstance(value, list) else value


# the libraries


def by_datasets(path: Path) -> Iterator[Pair]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    kind = {".jsonl": "json", ".tar": "webdataset", ".tsv": "csv"}.get(path.suffix, path.suffix[1:])
    options = {"sep": "\t"} if kind == "csv" else {}
    found = datasets.load_dataset(
        kind, data_files={"train": str(path)}, streaming=True, split="train", **options
    )
    names = found.column_names
    image = next((name for name in ("image", "jpg") if name in (names or ())), None)
    if image and kind != "json":
        found = found.cast_column(image, datasets.Image(decode=False))
    with_image = kind in ("parquet", "webdataset") and image
    for row in found:
        text = next(row[n] for n in ("caption", "title", "conversations", "txt") if n in row)
        yield _caption(text), row[image]["bytes"] if with_image else None


def by_pyarrow_parquet(path: Path) -> Iterator[Pair]:
    import pyarrow.parquet as pq

    with_image = _has_images(path)
    for batch in pq.ParquetFile(path).iter_batches(1000):
        for row in batch.to_pylist():
            yield row["caption"], row["image"]["bytes"] if with_image else None


def by_pyarrow_json(path: Path) -> Iterator[Pair]:
    import pyarrow.json

    for batch in pyarrow.json.open_json(path):
        for row in batch.to_pylist():
            yield row["caption"], None


def by_pyarrow_csv(path: Path) -> Iterator[Pair]:
    import pyarrow.csv

    options = pyarrow.csv.ParseOptions(delimiter="\t")
    for batch in pyarrow.csv.open_csv(path, parse_options=options):
        for row in batch.to_pylist():
            yield row["title"], None


def by_webdataset(path: Path) -> Iterator[Pair]:
    import webdataset

    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        yield sample["txt"].decode(), sample["jpg"]


def by_orjson(path: Path) -> Iterator[Pair]:
    import orjson

    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)["caption"], None


def by_ijson(path: Path) -> Iterator[Pair]:
    import ijson

    with path.open("rb") as file:
        for item in ijson.items(file, "item", use_float=True):
            yield _caption(item["conversations"]), None


def by_json(path: Path) -> Iterator[Pair]:
    for item in json.loads(path.read_bytes()):
        yield _caption(item["conversations"]), None


Reader = Callable[[Path], Iterator[Pair]]
READERS: dict[str, dict[str, Reader]] = {
    "parquet_texts": {"ours": ours, "datasets": by_datasets, "pyarrow": by_pyarrow_parquet},
    "parquet_images": {"ours": ours, "datasets": by_datasets, "pyarrow": by_pyarrow_parquet},
    "tar": {"ours": ours_tar, "datasets": by_datasets, "webdataset": by_webdataset},
    "jsonl": {
        "ours": ours,
        "datasets": by_datasets,
        "pyarrow": by_pyarrow_json,
        "orjson": by_orjson,
    },
    "json": {"ours": ours, "datasets": by_datasets, "ijson": by_ijson, "json": by_json},
    "csv": {"ours": ours, "datasets": by_datasets, "pyarrow": by_pyarrow_csv},
}
"""Format -> library -> reader. `json` is Python's, which holds the file whole."""


def here(reader: str) -> bool:
    """Whether the library is installed."""
    return reader == "ours" or importlib.util.find_spec(reader) is not None


# what they do with broken records


def verdict(reader: Reader, path: Path, right: Texts) -> str:
    """What the reader does with the file."""
    got: list[Any] = []
    ended = ""
    try:
        for text, _ in reader(path):
            got.append(text)
    except DataError:
        ended = "ends, saying where"
    except Exception:  # whatever a library raises
        ended = "ends with an error"
    told = [text for text in got if isinstance(text, corpus.Unusable)]
    given = [text for text in got if not isinstance(text, corpus.Unusable)]
    wanted = [text for text in right if text is not None]
    odd = [text for text in given if text not in wanted]
    good = len(set(wanted) & set(map(str, given)))
    count = "" if good == len(wanted) else f", {good} of {len(wanted)} read"
    if ended:
        return ended + count
    if told:
        return "told" + count
    if odd == [""]:
        return "counts it as empty" + count
    if odd:
        return f"takes {odd[0]!r:.20} for it" + count
    if len(given) > len(wanted):
        return "gives it twice"
    if len(wanted) == len(right):
        return "reads all" + count
    return "drops it in silence" + count


# one measurement, in a process of its own


def one(kind: str, name: str, folder: Path, count: int) -> dict[str, Any]:
    """Reads the large file, after the small one."""
    reader = READERS[kind][name]
    assert sum(1 for _ in reader(named(folder, kind, "warm"))) == WARM
    forget_peak()
    before, read, digest = held_mib("VmRSS"), 0, hashlib.sha256()
    wall, cpu = time.perf_counter(), time.process_time()
    for text, image in reader(named(folder, kind)):
        read += 1
        digest.update(text.encode())
        if image is not None:
            digest.update(image[:64])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert read == count, (kind, name, read)
    return {
        "records_per_s": round(read / wall),
        "cpu_s_per_million": round(1e6 * cpu / read, 2),
        "mib": round(held_mib("VmHWM") - before),
        "digest": digest.hexdigest(),
    }


def measured(folder: Path, counts: dict[str, int], repeats: int) -> dict[str, dict[str, Any]]:
    """Format -> library -> its best run."""
    best: dict[str, dict[str, Any]] = {}
    for kind, count in counts.items():
        best[kind] = {}
        for _ in range(repeats):
            for name in filter(here, READERS[kind]):
                command = [sys.executable, __file__, "--one", kind, name, str(folder), str(count)]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                got = json.loads(run.stdout.splitlines()[-1])
                known = best[kind].setdefault(name, got)
                if got["cpu_s_per_million"] < known["cpu_s_per_million"]:
                    best[kind][name] = got
        digests = {found.pop("digest") for found in best[kind].values()}
        if len(digests) > 1:
            raise RuntimeError(f"the readers of {kind} do not give the same records")
    return best


def verdicts(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Format -> what is wrong -> library -> what it does."""
    return {
        kind: {
            what: {
                n: verdict(r, *file) for n, r in READERS[kind].items() if here(n) and n != "json"
            }
            for what, file in files.items()
        }
        for kind, files in defects(folder).items()
    }


def table(report: dict[str, Any]) -> str:
    """Markdown, of the README."""
    lines = [
        "| format | reader | records/s | CPU seconds per million | MiB |",
        "|---|---|---|---|---|",
    ]
    for kind, found in report["speed"].items():
        for name, run in found.items():
            lines.append(
                f"| {kind} | {name} | {run['records_per_s']:,} | {run['cpu_s_per_million']:.2f} | "
                f"{run['mib']} |"
            )
    return "\n".join(lines)


def broken_table(report: dict[str, Any]) -> str:
    """Markdown, of the README."""
    lines = ["| one record of 20 | ours | datasets | others |", "|---|---|---|---|"]
    for kind, found in report["broken"].items():
        for what, by in found.items():
            rest = [f"{n}: {said}" for n, said in by.items() if n not in ("ours", "datasets")]
            lines.append(
                f"| {kind}: {what} | {by['ours']} | {by['datasets']} | {'; '.join(rest)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the records")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "readers.json")
    args = parser.parse_args()
    if args.one:
        kind, name, folder, count = args.one
        print(json.dumps(one(kind, name, Path(folder), int(count))))
        return
    load = os.getloadavg()
    counts = {kind: int(args.share * count) for kind, count in COUNTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind, count in counts.items():
            named(folder, kind).parent.mkdir()
            write(kind, named(folder, kind), count)
            write(kind, named(folder, kind, "warm"), WARM)
        speed = measured(folder, counts, args.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        broken = verdicts(Path(scratch))
    packages = [n for n in ("datasets", "webdataset", "pyarrow", "ijson", "orjson") if here(n)]
    report = {
        "speed": speed,
        "broken": broken,
        "counts": counts,
        "repeats": args.repeats,
        **signed("python benchmarks/readers.py", load, *packages),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report), broken_table(report), sep="\n\n")


if __name__ == "__main__":
    main()
