"""The files that benchmarks/readers.py reads: whole ones, and ones with a broken record."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

SUFFIX = {"parquet_texts": "parquet", "parquet_images": "parquet"}
SHOWN = ("jsonl", "json", "csv", "tar", "parquet_texts")
"""Formats that have files with a broken record."""
IMAGE = 20_000
WORDS = "a the red blue dog cat on in with large small street beach table café «two» three".split()
RECORDS, BROKEN = 20, 12
"""Of a file with a broken record, and its number."""
Texts = list[str | None]
"""The right text of each record, None where it has none."""


def named(folder: Path, kind: str, stem: str = "all") -> Path:
    suffix = SUFFIX.get(kind, "tsv" if kind == "csv" else kind)
    return folder / kind / f"{stem}.{suffix}"


def captions(count: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for i in range(count):
        yield f"number {i} " + " ".join(rng.choice(WORDS, 9))


def write(kind: str, path: Path, count: int) -> None:
    """A file of the kind."""
    image = np.random.default_rng(1).bytes(IMAGE)
    texts = captions(count)
    if kind.startswith("parquet"):
        _write_parquet(path, list(texts), image if kind == "parquet_images" else None)
    elif kind == "tar":
        files = [
            (f"{i:06d}.{suffix}", data)
            for i, text in enumerate(texts)
            for suffix, data in (
                ("jpg", image[i % 9 :]),
                ("txt", text.encode()),
                ("json", json.dumps({"caption": text, "key": f"{i:06d}"}).encode()),
            )
        ]
        with path.open("wb") as file:
            write_tar(file, files)
    elif kind == "jsonl":
        lines = ({"id": i, "image": f"{i}.jpg", "caption": t} for i, t in enumerate(texts))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "json":
        turns = (
            [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": text}]
            for text in texts
        )
        items = [{"id": i, "image": f"{i}.jpg", "conversations": t} for i, t in enumerate(turns)]
        path.write_text(json.dumps(items, indent=2))
    else:
        quoted = (
            f'"{text}, as ""they"" say"' if i % 4 == 0 else text for i, text in enumerate(texts)
        )
        rows = (f"{i}.jpg\t{text}\n" for i, text in enumerate(quoted))
        path.write_text("filepath\ttitle\n" + "".join(rows))


def _write_parquet(path: Path, texts: list[Any], image: bytes | None, group: int = 0) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"caption": texts}
    if image is not None:
        columns["image"] = [{"bytes": image[i % 9 :], "path": f"{i}"} for i in range(len(texts))]
    group = group or (10_000 if image is None else 100)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def write_tar(to: IO[bytes], files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=to, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def defects(folder: Path) -> dict[str, dict[str, tuple[Path, Texts]]]:
    """Format -> what is wrong -> a file of 20 records with it, and what is right in it."""
    texts = [f"number {i}" for i in range(RECORDS)]
    without: Texts = [None if i == BROKEN else text for i, text in enumerate(texts)]
    before: Texts = [*texts[:BROKEN], None]
    found: dict[str, dict[str, tuple[Path, Texts]]] = {kind: {} for kind in SHOWN}

    def add(kind: str, what: str, content: bytes, right: Texts) -> None:
        path = named(folder, kind, what.replace(" ", "_"))
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        found[kind][what] = path, right

    lines = [json.dumps({"image": f"{i}.jpg", "caption": t}).encode() for i, t in enumerate(texts)]
    for what, bad in {
        "malformed": b'{"image": "12.jpg", "caption": "num',
        "not UTF-8": b'{"image": "12.jpg", "caption": "\xff"}',
        "a number for the text": b'{"image": "12.jpg", "caption": 7}',
        "no text": b'{"image": "12.jpg"}',
        "half a character": rb'{"image": "12.jpg", "caption": "number \ud83d"}',
    }.items():
        add("jsonl", what, _joined(lines, bad), without)
    items = [{"id": i, "conversations": [{}, {"value": text}]} for i, text in enumerate(texts)]
    whole = json.dumps(items).encode()
    add("json", "cut off", whole[: whole.index(b"number 12") + 4], before)
    add("json", "a number for the text", whole.replace(b'"number 12"', b"7"), without)
    add("json", "half a character", whole.replace(b"number 12", rb"number \ud83d"), without)
    add("json", "a byte-order mark", b"\xef\xbb\xbf" + whole, [*texts])
    add("json", "a large number", whole.replace(b'"id": 12', b'"id": ' + b"1" * 24), [*texts])
    rows, head = [f"{i}.jpg\t{text}".encode() for i, text in enumerate(texts)], b"filepath\ttitle\n"
    for what, bad in {
        "a column too many": b"12.jpg\tnumber\t12",
        "a column too few": b"12.jpg",
        "not UTF-8": b"12.jpg\tnumber \xff",
    }.items():
        add("csv", what, head + _joined(rows, bad), without)
    add("csv", "a quote is not closed", head + _joined(rows, b'12.jpg\t"number 12'), before)
    words: Texts = ["NA" if i == BROKEN else text for i, text in enumerate(texts)]
    add("csv", "the text is NA", head + _joined(rows, b"12.jpg\tNA"), words)
    digits = [f"{i:03d}" for i in range(RECORDS)]
    content = b"".join(f"{i}.jpg\t{text}\n".encode() for i, text in enumerate(digits))
    add("csv", "texts are digits", head + content, [*digits])
    _add_tars(add, texts, without, before)
    for what, group in {"no text": None, "cut off": None, "damaged": b"\xff" * 24}.items():
        path = named(folder, "parquet_texts", "scratch")
        path.parent.mkdir(exist_ok=True, parents=True)
        _write_parquet(path, without if what == "no text" else texts, None, group=5)
        content = path.read_bytes()
        if group:  # the head of the page of numbers 10 to 14
            start = content.index(b"number 10") - 30
            content = content[:start] + group + content[start + len(group) :]
        right = {"no text": without, "cut off": [], "damaged": [*texts[:10], None]}[what]
        add("parquet_texts", what, content[:-40] if what == "cut off" else content, right)
    return found


def _joined(lines: list[bytes], bad: bytes) -> bytes:
    return b"".join((bad if i == BROKEN else line) + b"\n" for i, line in enumerate(lines))


def _add_tars(add: Callable[..., None], texts: list[str], without: Texts, before: Texts) -> None:
    samples = [
        {"jpg": b"x" * 900, "txt": text.encode(), "json": b"{}"} for i, text in enumerate(texts)
    ]
    for what, bad, right in (
        ("no text", {"txt": None}, without),
        ("text not UTF-8", {"txt": b"number \xff"}, without),
        ("JSON malformed", {"json": b'{"a": '}, without),
        ("a key twice", {}, [*texts, None]),
        ("cut off", {}, before),
    ):
        files = [
            (f"{i:02d}.{suffix}", data)
            for i, sample in enumerate(samples)
            for suffix, data in (sample | (bad if i == BROKEN else {})).items()
            if data is not None
        ]
        if what == "a key twice":
            files += files[3 * BROKEN : 3 * BROKEN + 3]
        file = io.BytesIO()
        write_tar(file, files)
        content = file.getvalue()
        if what == "cut off":  # in the image of that one
            content = content[: content.index(f"{BROKEN:02d}.jpg".encode()) + 512 + 300]
        add("tar", what, content, right)
