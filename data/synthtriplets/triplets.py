"""Caption triplets, of either route, as what image pairs are made of."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from data import corpus, formats
from data.corpus import Unusable
from data.source import stamp
from data.text_triplets import text_triplets_dataset_builder as text_triplets

KEYWORDS = ("source_keyword", "target_keyword")
"""Fields that triplets of keywords have: what was exchanged. "" for a deletion, and of the LLM."""


@dataclasses.dataclass(frozen=True)
class CaptionTriplet:
    """number: from 0, of all triplets of the source."""

    number: int
    reference_caption: str
    target_caption: str
    text: str
    source_keyword: str = ""
    target_keyword: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """As the JSON beside a pair has it; `number` is called triplet."""
        record = dataclasses.asdict(self)
        return {"triplet": record.pop("number"), **record}


class CaptionTriplets:
    """A file or folder of caption triplets, as launch/triplets.py and `--step=write` make them.

    identity: changes with the files. Raises DataError where there are none.
    """

    def __init__(self, source: Path, columns: Mapping[str, str]):
        self.source = source
        self.files = formats.source_files(source, text_triplets.SUFFIXES)
        self.names = corpus.names(text_triplets.FIELDS, columns, "caption triplets")
        self.identity = stamp(*self.files)

    def blocks(
        self, size: int, index: int, count: int
    ) -> Iterator[tuple[int, list[CaptionTriplet]]]:
        """(number, triplets) of the blocks index, index + count, ... of `size` triplets each.

        Raises DataError for a line that cannot be read, or has an empty field.
        """
        optional = {name: (name,) for name in KEYWORDS}
        rows = enumerate(formats.rows(self.files, self.names, optional))
        for block in itertools.count():
            items = list(itertools.islice(rows, size))
            if items and block % count == index:
                yield block, [self._triplet(number, item) for number, item in items]
            if len(items) < size:
                return

    def _triplet(self, number: int, item: formats.Item) -> CaptionTriplet:
        try:
            row = formats.row(item)
            fields = {name: corpus.text(row.get(name), name) for name in (*self.names, *KEYWORDS)}
            for name in self.names:
                if not fields[name].strip():
                    raise Unusable(f"{name} is empty")
        except Unusable as error:
            raise DataError(
                f"{item.where}: {error}. Mend the line or take it out; --source is {self.source}."
            ) from error
        return CaptionTriplet(number, **fields)
