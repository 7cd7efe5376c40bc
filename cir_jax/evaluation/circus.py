"""The queries that CIRCUS (arXiv 2605.14787) keeps of CIRR, FashionIQ and CIRCO.

"shortcut_free": no model of its pool finds the target by image or text alone; "validated": and
people found query and target sound. Its lists are prepared by `--dataset=circus`.

They name a query of CIRR and FashionIQ by M-BEIR's id and by M-BEIR's text of it, which UniIR's
code (arXiv 2311.17136) made of the captions: `sentence`, `joined`. In the official files a query is
found by its reference image and that text, in M-BEIR's copies by the id.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cir_jax.errors import DataError
from cir_jax.evaluation.queries import Query

DATASET = "circus"
SHOWN = 3  # queries named in a message


def sentence(texts: Sequence[str]) -> str:
    """M-BEIR's text of a caption: stripped, capitalised, with a stop at the end."""
    text = texts[0].replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


def joined(texts: Sequence[str]) -> str:
    """M-BEIR's text of FashionIQ's captions: "C1 and c2."."""
    parts = [text.strip() for text in texts if text]
    return sentence([" and ".join(p[:1].lower() + p[1:].removesuffix(".") for p in parts)])


def plain(texts: Sequence[str]) -> str:
    """CIRCO's caption is as it was."""
    return texts[0]


TEXTS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "cirr": sentence,
    "fashioniq": joined,
    "circo": plain,
}
"""Table of `circus` -> what it calls the texts of a query."""


def select(
    table: Sequence[Mapping[str, Any]],
    kind: str,
    queries: Sequence[Query],
    names: Callable[[int], str],
    qids: Sequence[str],
    *,
    partial: bool,
) -> list[int]:
    """Positions of those of the queries that the table of CIRCUS lists, in their order.

    kind: the name of the table. names: position of an image -> name. qids: M-BEIR's ids, empty for
    the official files, where two queries that M-BEIR takes for one are both chosen.
    partial: queries may be missing, with their images. Else raises DataError naming them.
    """
    listed = [_listed(table[i], bool(qids)) for i in range(len(table))]
    if qids:
        keys: list[Any] = list(qids)
    else:
        text = TEXTS[kind]
        keys = [(_plain(names(query.reference)), text(query.texts)) for query in queries]
    wanted = set(listed)
    if (absent := [key for key in listed if key not in set(keys)]) and not partial:
        raise DataError(
            f"{table!r}: {len(absent)} of its {len(listed)} queries are not in the benchmark, such "
            f"as {', '.join(map(repr, absent[:SHOWN]))}; the benchmark has {keys[0]!r}. Are they "
            "of other annotations? Prepare both again."
        )
    return [i for i, key in enumerate(keys) if key in wanted]


def _listed(record: Mapping[str, Any], by_id: bool) -> Any:
    name, reference, text = (
        record[field].decode() if isinstance(record[field], bytes) else str(record[field])
        for field in ("query", "reference_name", "text")
    )
    return name if by_id else (_plain(reference), text)


def _plain(name: str) -> str:
    """COCO's images are called 25 and 000000000025."""
    return str(int(name)) if name.isdecimal() else name
