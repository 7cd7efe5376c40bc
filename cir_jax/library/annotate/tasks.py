"""What an annotator does next, and what becomes of it; for a page, as JSON has it.

A task is one of three views: "pair" (a reference and what looks like it), "words" (of a pair),
"answers" (all that may fit a worded query), or "done". Whoever breaks off comes back to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from cir_jax.library.annotate import candidates, quality
from cir_jax.library.annotate import export as exporting
from cir_jax.library.annotate.candidates import Album
from cir_jax.library.annotate.records import ASPECTS, Query, Records
from cir_jax.library.library import Library
from cir_jax.library.photos import printable

LONGEST = 80
"""Letters of an annotator's name."""


class Tasks:
    """Of all annotators of one folder. methods: name -> its library; the first one's backbone says
    what looks alike. annotator: a name that the page begins with."""

    def __init__(self, methods: Mapping[str, Library], records: Records, annotator: str = ""):
        self.methods, self.records, self.annotator = methods, records, annotator
        self.album = Album(next(iter(methods.values())))

    @property
    def out(self) -> Path:
        return self.records.path.parent

    def about(self) -> dict[str, Any]:
        return {
            "folder": printable(self.album.library.folder.name),
            "photos": len(self.album),
            "methods": list(self.methods),
            "aspects": list(ASPECTS),
            "annotator": self.annotator,
        }

    def next(self, annotator: str, review: bool = False) -> dict[str, Any]:
        """What this annotator has begun, else something new.

        review: queries of others, to look through their candidates, too.
        Raises DataError for no name.
        """
        annotator = named(annotator)
        for query in self.records.queries():
            mine = query.annotator == annotator
            if annotator in self.records.finished(query.id):
                continue
            if mine and not query.worded:
                return self._words(query)
            if query.worded and (mine or (review and self.records.finished(query.id))):
                return self._answers(query, annotator)
        if review:
            return self._done("All queries of others are looked through.")
        reference = candidates.next_reference(self.album, annotator, self.records.seen(annotator))
        if reference is None:
            return self._done("All photos have been references.")
        return self._pair(reference)

    def skip(self, annotator: str, reference: int) -> None:
        self.records.skip(named(annotator), self.album.of_number(reference))

    def pair(self, annotator: str, reference: int, target: int) -> int:
        contents = (self.album.of_number(number) for number in (reference, target))
        return self.records.pair(named(annotator), *contents)

    def remarks(self, query: int, concept: str, caption: str) -> list[str]:
        """See `quality.remarks`; of words that are not kept yet."""
        words = " ".join(caption.split())
        if not words:
            return []
        asked = self.records.query(query)._replace(concept=concept, caption=words)
        return quality.remarks(concept, words, candidates.text_rank(self.album, asked))

    def word(self, query: int, concept: str, caption: str) -> None:
        self.records.query(query)  # or there is none
        self.records.word(query, concept, caption)

    def judge(self, query: int, annotator: str, photo: int, fits: bool) -> None:
        content = self.album.of_number(photo)
        if content == self.records.query(query).target and not fits:
            raise DataError("the target is a right answer: the words were written for it.")
        self.records.judge(query, named(annotator), content, fits)

    def finish(self, query: int, annotator: str, aspects: Sequence[str]) -> None:
        asked = self.records.query(query)
        self.records.judge(query, named(annotator), asked.target, True)
        self.records.finish(query, named(annotator), aspects)

    def drop(self, query: int) -> None:
        self.records.drop(query)

    def export(self) -> dict[str, Any]:
        done = exporting.export(self.records, self.album, self.out)
        return self._counted(done) | {"where": self.out.name}

    def progress(self) -> dict[str, int]:
        """Of all annotators: queries that are finished, and those that are not."""
        done = len(exporting.finished(self.records))
        return {"queries": done, "begun": len(self.records.queries()) - done}

    def measured(self) -> dict[str, Any]:
        """Of all annotators: queries, their right answers, what was missed, how they agree."""
        queries = exporting.finished(self.records)
        answers = sum(len(exporting.answers(self.records, query)) for query in queries)
        agreed = exporting.agreement([self.records.judgements(query.id) for query in queries])
        missed = exporting.missed(self.records, queries)
        return self._counted(
            exporting.Exported(len(queries), answers, len(self.album), missed, agreed)
        )

    def _counted(self, done: exporting.Exported) -> dict[str, Any]:
        return {
            "queries": done.queries,
            "answers": done.answers,
            "found": None if done.estimate is None else round(done.estimate.found, 4),
            "kappa": None if done.kappa is None else round(done.kappa, 4),
        }

    def _pair(self, reference: bytes) -> dict[str, Any]:
        alike = candidates.targets(self.album, reference)
        return {
            "view": "pair",
            "reference": self._photo(reference),
            "candidates": [self._photo(content) for content in alike],
        }

    def _words(self, query: Query) -> dict[str, Any]:
        return {"view": "words", "prefix": quality.PREFIX} | self._query(query)

    def _answers(self, query: Query, annotator: str) -> dict[str, Any]:
        pool = self.records.pool(query.id)
        if not pool:
            pool = candidates.pool(self.album, self.methods, query)
            self.records.keep_pool(query.id, pool)
        said = self.records.judgements(query.id).get(annotator, {})
        there = [one.photo for one in pool if one.photo in self.album]
        return {
            "view": "answers",
            "candidates": [
                self._photo(content) | {"fits": content == query.target or said.get(content, False)}
                for content in there
            ],
        } | self._query(query)

    def _query(self, query: Query) -> dict[str, Any]:
        return {
            "query": query.id,
            "annotator": query.annotator,
            "reference": self._photo(query.reference),
            "target": self._photo(query.target),
            "concept": query.concept,
            "caption": query.caption,
        }

    def _photo(self, content: bytes) -> dict[str, Any]:
        path = self.album.path(content).relative_to(self.album.library.folder)
        return {"id": f"p{self.album.number(content)}", "name": printable(path)}

    def _done(self, sentence: str) -> dict[str, Any]:
        return {"view": "done", "sentence": sentence}


def named(annotator: str) -> str:
    """Raises DataError for no name, and for one that is too long."""
    name = " ".join(annotator.split())
    if not 0 < len(name) <= LONGEST:
        raise DataError(f"annotator: a name of 1 to {LONGEST} letters; here are {len(name)}.")
    return name
