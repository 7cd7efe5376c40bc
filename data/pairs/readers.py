"""Where image-text pairs come from: tables of file names, LLaVA's JSON, WebDataset's tar shards,
Parquet files with the images in them."""

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from data import corpus, formats, hub, tars
from data.corpus import Corpus, Entry, Unusable

FIELDS = {
    "image": ("filepath", "image", "file_name"),
    "caption": ("title", "caption", "text", "captions", "conversations"),
}
TAR_FIELDS = {"image": ("jpg", "jpeg", "png", "webp"), "caption": ("txt", "json.caption")}
PARQUET_FIELDS = {
    "image": ("image", *TAR_FIELDS["image"]),
    "caption": (*FIELDS["caption"], "txt"),
}
TABLES, LISTS = (".tsv", ".csv"), (".json", ".jsonl")
SUFFIXES = (*TABLES, *LISTS, ".tar", ".parquet")


def find(source: formats.Source, columns: Mapping[str, str]) -> Corpus:
    """The reader that fits the source: a file, or a folder with tar shards, with Parquet files or
    with one list; of the hub tar shards or Parquet files."""
    there = formats.source_files(source, SUFFIXES)
    types = {file.suffix.lower() for file in there}
    if ".tar" in types:
        return Shards(source, columns)
    if ".parquet" in types:
        return Parquet(source, columns)
    if isinstance(source, hub.Dataset):
        raise DataError(
            f"--source={source}: {there[0].name} lists names of images, which are read from a disk "
            f"only: `hf download {source.name} --repo-type dataset --local-dir DIR`, unpack them "
            "there, and give the list in DIR."
        )
    if len(there) > 1:
        names = ", ".join(path.name for path in there)
        raise DataError(f"--source={source}: name one of the files in it: {names}.")
    return Listed(there[0], columns)


class Listed:
    """A list of file names and captions.

    Images are named relative to its folder, to the folder `images` in it, or to the folder above.

    .tsv, .csv: CC3M as Pic2Word and OpenCLIP keep it, quoted as pandas does. Rows of the same file,
    one after another, are one image with several captions.
    .json, .jsonl: {image, caption}, or LLaVA's {id, image, conversations}. A caption may be a list
    of captions; of a conversation it is the first turn of "gpt". An `id` may not come again.
    """

    unit, images = "bytes", ("image",)

    def __init__(self, source: Path, columns: Mapping[str, str]):
        self.source, self.files = source, (source,)
        self.total = source.stat().st_size
        self.names = corpus.names(FIELDS, columns, "image-text pairs")
        if source.suffix.lower() in TABLES:
            there = formats.header(source)
            if "url" in map(str.lower, there) and not set(there) & set(self.names["image"]):
                raise DataError(
                    f"{source}: lists URLs of images, not files. Download them first, for example "
                    "with img2dataset, and prepare the tar shards that it writes."
                )

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        return itertools.islice(self._entries(), start, None)

    def _entries(self) -> Iterator[Entry]:
        for _, group in itertools.groupby(self._items(), key=_image):
            items = list(group)
            where, done, first = items[0].where, items[-1].done, items[0].value
            if isinstance(first, Unusable):
                yield Entry(where, done, problem=str(first))
            else:
                captions = [text for item in items for text in item.value["caption"]]
                yield self._entry(where, done, first["image"], captions)

    def _items(self) -> Iterator[formats.Item]:
        """The rows, each with a list of captions."""
        seen: set[int] = set()  # hashes take less memory than ids
        for item in formats.rows(self.files, self.names, {"id": ("id",)}):
            value: Any
            try:
                row = formats.row(item)
                if (name := row.get("id")) is not None:
                    if (key := hash(str(name))) in seen:
                        raise Unusable(f"the id {name!r} was there before")
                    seen.add(key)
                value = row | {"caption": _captions(row["caption"])}
            except Unusable as error:
                value = error
            yield item._replace(value=value)

    def _entry(self, where: str, done: int, image: Any, captions: Sequence[Any]) -> Entry:
        try:
            if not (name := corpus.text(image, "image")):
                raise Unusable("names no image")
            texts = [corpus.text(caption, "caption") for caption in captions]
        except Unusable as error:
            return Entry(where, done, problem=str(error))
        texts = [caption for caption in texts if caption.strip()]
        folder = self.source.parent
        paths = [place / name for place in (folder, folder / "images", folder.parent)]
        path = next((path for path in paths if os.path.exists(path)), paths[0])
        problem, stamp = corpus.stat_image(path)
        load = functools.partial(_from_file, path, texts)
        return Entry(where, done, load, problem, not texts, stamp)


def _image(item: formats.Item) -> str:
    """What rows that belong together have in common."""
    image = item.value["image"] if isinstance(item.value, dict) else None
    return image if isinstance(image, str) else item.where


def _from_file(path: Path, captions: list[str]) -> dict[str, Any]:
    return {"image": corpus.read_image(path), "captions": captions}


def _captions(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if value and all(isinstance(turn, dict) for turn in value):
        answers = [turn.get("value") for turn in value if turn.get("from") == "gpt"]
        if not answers:
            raise Unusable('the conversation has no turn of "gpt"')
        return answers[:1]
    return value


class Parquet:
    """Rows with an image, as bytes or as Hugging Face's {"bytes", "path"}, and its captions, as
    `Listed` takes them."""

    unit, images = "bytes", ("image",)

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, (".parquet",)))
        self.total = formats.total_bytes(self.files)
        self.names = corpus.names(PARQUET_FIELDS, columns, "image-text pairs")
        corpus.pick(formats.parquet_columns(self.files[0]), self.names, str(self.files[0]))

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        names = {f: n for f, n in self.names.items() if contents or f != "image"}
        for item in formats.rows(self.files, names, start=start):
            try:
                row = formats.row(item)
                texts = [corpus.text(text, "caption") for text in _captions(row["caption"])]
            except Unusable as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                texts = [text for text in texts if text.strip()]
                load = functools.partial(_from_row, row, texts)
                yield Entry(item.where, item.done, load, empty=not texts)


def _from_row(row: Mapping[str, Any], captions: list[str]) -> dict[str, Any]:
    return {"image": corpus.image_bytes(row["image"], "image"), "captions": captions}


class Shards:
    """Tar shards as img2dataset writes them: 000000123.jpg, .txt, .json, one after another."""

    unit, images = "bytes", ("image",)

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self.source, self.files = source, tuple(formats.source_files(source, (".tar",)))
        self.total = formats.total_bytes(self.files)
        self.names = corpus.names(TAR_FIELDS, columns, "image-text pairs")

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents
        return itertools.islice(self._entries(), start, None)

    def _entries(self) -> Iterator[Entry]:
        for item in tars.samples(self.files):
            try:
                sample = tars.Sample(item.value)
                found = corpus.pick(sample.columns, self.names, "the sample")
                image, caption = sample.member(found["image"]), sample.text(found["caption"])
            except DataError as error:
                yield Entry(item.where, item.done, problem=str(error))
            else:
                load = functools.partial(_from_tar, image, caption)
                empty = not caption.strip()
                yield Entry(item.where, item.done, load, "", empty, (image.size,))


def _from_tar(image: tars.Member, caption: str) -> dict[str, Any]:
    return {"image": image.read(), "captions": [caption]}
