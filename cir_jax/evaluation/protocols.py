"""Evaluation protocols as data: what makes two numbers comparable, printed beside each of them.

Defaults are those of SEARLE's code (arXiv 2303.15247), which most zero-shot papers share. Peers
differ in silence: ARTEMIS removes the reference on FashionIQ, CoVR also on CIRCO.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cir_jax.errors import ConfigError, DataError, unknown
from cir_jax.evaluation import metrics
from cir_jax.evaluation.metrics import Estimate

STRIPPED = ".?, "
"""Characters SEARLE strips from both ends of each FashionIQ caption."""

SOFT_DEPTH = 50
"""Retrieved images among which ARTEMIS looks for graded answers."""

PHOTO = "a photo of"

_ORDERS = {"capitalised": slice(1), "joined": slice(1), "reversed": slice(1, 2)}
"""Way to join two captions -> which of both orders."""

_SENTENCES = {
    "similar_but": "Find a picture that also {concept}, but {text}.",
    "find_but": "find {concept} but {text}",
}
"""Texts that say the concept, but not the image."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to turn queries, gallery and ground truth into numbers.

    gallery: "all" images of the split; those of the query's "category"; those of the category that
        occur in its "triplets"; the query's "candidates".
    captions: "single" = one text, as it is. Of two captions c1 and c2:
        "orders_averaged" = "{c1} and {c2}" and reversed, both stripped and composed; the unit
        features are averaged and normalised again (SEARLE); "orders_separate" = each order is a
        query of its own (ARTEMIS); "orders_marked" = the same of "{c1} <and> {c2}", for the words
        of ARTEMIS' own encoder; "capitalised" = "{C1} and {c2}", stripped (CLIP4Cir);
        "reversed" = "{c2} and {c1}", as they are (Pic2Word); "joined" = "{c1} and {c2}", as they
        are (MagicLens); "comma" = "{c1}, and {c2}", as they are (BGE-VL).
    text: what is composed. "modification" = the composer's prompt of the caption;
        "shared_concept" = the same with the concept before the image ("a photo of {concept} $ that
        ...", as CIRCO was annotated); "similar_but" = "Find a picture that also {concept}, but
        {caption}." (BGE-VL); "find_but" = "find {concept} but {caption}" (MagicLens); "objects" =
        the image "and" the named classes ("a photo of $ and dog and ..."); "inversion" = the image
        alone ("a photo of $").
    recall, subset_recall, precision: the K of R@K and Rs@K (single target; Rs: among the query's
        candidates without the reference) and of mAP@K (all ground truths).
    hit: what R@K counts: the "single" target in the top K, or "any" of the ground truths.
    ndcg: the K of nDCG@K. area: mAP over the whole ranking, by trapezoids (i-CIR).
    queries: "all" of the split, or those of a table of CIRCUS, which names them.
    soft: R@K and Rs@K are the best grade of the answers found, among the first SOFT_DEPTH.
    aspect_precision: K of the mAP per semantic aspect, 0 = none.
    by_category: numbers per category too; the headline is their unweighted mean.
    average: metrics whose mean is reported as "Avg".
    ranks: mean and median rank of the single target too, counted from 1.
    """

    name: str
    gallery: Literal["all", "category", "triplets", "candidates"] = "all"
    remove_reference: bool = False
    captions: Literal[
        "single",
        "orders_averaged",
        "orders_separate",
        "orders_marked",
        "capitalised",
        "reversed",
        "joined",
        "comma",
    ] = "single"
    text: Literal[
        "modification", "shared_concept", "similar_but", "find_but", "objects", "inversion"
    ] = "modification"
    recall: tuple[int, ...] = ()
    subset_recall: tuple[int, ...] = ()
    precision: tuple[int, ...] = ()
    hit: Literal["single", "any"] = "single"
    ndcg: tuple[int, ...] = ()
    area: bool = False
    queries: Literal["all", "shortcut_free", "validated"] = "all"
    soft: bool = False
    aspect_precision: int = 0
    by_category: bool = False
    average: tuple[str, ...] = ()
    ranks: bool = False

    @property
    def id(self) -> str:
        """Says all that moves the numbers, so that a changed copy cannot keep the old id."""
        parts = [
            f"gallery={self.gallery}",
            f"reference={'removed' if self.remove_reference else 'kept'}",
            f"captions={self.captions}",
        ]
        parts += [f"text={self.text}"] if self.text != "modification" else []
        parts += [f"queries={self.queries}"] if self.queries != "all" else []
        parts += ["hit=any"] if self.hit == "any" else []
        parts += ["AP=area"] if self.area else []
        parts += ["targets=soft"] if self.soft else []
        parts += [f"Avg={'+'.join(self.average)}"] if self.average else []
        return f"{self.name}({', '.join(parts)})"

    @property
    def needs_concept(self) -> bool:
        """Whether each query must say what reference and targets share."""
        return self.text == "shared_concept" or self.text in _SENTENCES

    @property
    def by_group(self) -> bool:
        """Whether each query has the gallery of its category."""
        return self.gallery in ("category", "triplets")

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics of the paper's table, in its order."""
        return (
            *(("mAP",) if self.area else ()),
            *(f"mAP@{k}" for k in self.precision),
            *(f"R@{k}" for k in self.recall),
            *(f"nDCG@{k}" for k in self.ndcg),
            *(f"Rs@{k}" for k in self.subset_recall),
            *(("Avg",) if self.average else ()),
            *(("mean rank", "median rank") if self.ranks else ()),
        )

    def join(self, texts: Sequence[str], what: str) -> list[str]:
        """The modification texts to compose; their features are averaged. `what` names the query.

        Raises DataError when the number of captions does not fit the protocol.
        """
        if self.captions == "single":
            if len(texts) != 1:
                raise DataError(
                    f"{what}: {len(texts)} texts, protocol {self.id} expects one. Join them when "
                    'the dataset is prepared, or use a protocol with captions="orders_averaged".'
                )
            return list(texts)
        if not 1 <= len(texts) <= 2:
            raise DataError(
                f"{what}: {len(texts)} texts, protocol {self.id} expects one or two. "
                "Prepare the dataset again."
            )
        if self.captions not in ("reversed", "joined", "comma"):
            texts = [text.strip(STRIPPED) for text in texts]
        if self.captions == "capitalised":
            texts = [texts[0][:1].upper() + texts[0][1:], *texts[1:]]
        if len(texts) == 1:
            return list(texts)
        first, second = texts
        if self.captions == "comma":
            return [f"{first}, and {second}"]
        word = "<and>" if self.captions == "orders_marked" else "and"
        orders = [f"{first} {word} {second}", f"{second} {word} {first}"]
        return orders[_ORDERS.get(self.captions, slice(2))]

    def prompt(self, composer: Callable[[str], str], text: str, concept: str = "") -> str:
        """The text to tokenise. `composer` is a composer's `prompt`, which names the image alone
        ("a photo of $") when its text is empty, if it has a word for the image.

        Raises ConfigError when the protocol does not fit such a composer.
        """
        if self.text == "modification":
            return composer(text)
        named = composer("")
        if self.text == "inversion":
            if not named:
                raise ConfigError(
                    f"protocol {self.id} finds an image by its pseudo-word, which this composer "
                    "does not have. Evaluate it on another benchmark."
                )
            return named
        if self.text in _SENTENCES:
            if named:
                raise ConfigError(
                    f"protocol {self.id} is a sentence without the image, but the prompt of this "
                    f"composer is {named!r} and more. Use the benchmark with :shared_concept."
                )
            return composer(_SENTENCES[self.text].format(concept=concept, text=text))
        if self.text == "objects":
            return f"{named} and {text}" if named else f"{PHOTO} {text}"
        if not named:
            return composer(f"{concept} that {text}")
        if PHOTO not in (prompt := composer(text)):
            raise ConfigError(
                f"protocol {self.id} puts the concept behind {PHOTO!r}, but the prompt of this "
                f"composer is {prompt!r}. Use the benchmark without :shared_concept."
            )
        return prompt.replace(PHOTO, f"{PHOTO} {concept}", 1)


CIRCO = Protocol("circo", precision=(5, 10, 25, 50), recall=(5, 10, 25, 50), aspect_precision=10)
CIRR = Protocol(
    "cirr",
    remove_reference=True,
    recall=(1, 5, 10, 50),
    subset_recall=(1, 2, 3),
    average=("R@5", "Rs@1"),
)
FASHIONIQ = Protocol(
    "fashioniq",
    gallery="category",
    captions="orders_averaged",
    recall=(10, 50),
    by_category=True,
    average=("R@10", "R@50"),
)
GENECIS = Protocol("genecis", gallery="candidates", recall=(1, 2, 3), by_category=True)

ICIR = Protocol("icir", gallery="category", area=True)
"""Each instance has its own database, and several right answers in it (arXiv 2510.25387)."""

CAPTIONS = Protocol("captions", recall=(1, 5, 10))
"""Caption <-> image retrieval, which judges a pretrained backbone; see `evaluation.captions`."""

COCO_OBJECT = Protocol("coco_object", text="objects", recall=(1, 5, 10), ranks=True)
"""An object cut out of its image, and the names of what else is there, find the image."""

COCO_CAPTIONS = Protocol("coco_captions", recall=(1, 5, 10))
"""Both directions under COCO's, CxC's and ECCV Caption's ground truths; `evaluation.captions`."""

INVERSION = Protocol("inversion", text="inversion", recall=(1, 3, 5))
""" "a photo of $" finds the image that $ was made of (SEARLE, arXiv 2303.15247)."""

PROTOCOLS = {protocol.name: protocol for protocol in (CIRCO, CIRR, FASHIONIQ, GENECIS)}

CIRCUS = {name: {"queries": name} for name in ("shortcut_free", "validated")}
"""The queries that CIRCUS (arXiv 2605.14787) keeps, scored as the others."""

_MBEIR = {
    "gallery": "all",
    "remove_reference": False,
    "captions": "single",
    "hit": "any",
    "ndcg": (10,),
    "subset_recall": (),
    "by_category": False,
    "average": (),
}
"""UniIR's evaluation (arXiv 2311.17136) on M-BEIR's own pool, and the nDCG of mteb's task."""

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "circo": {
        **CIRCUS,
        "shared_concept": {"text": "shared_concept"},
        "bge_vl": {"text": "similar_but"},
        "magiclens": {"text": "find_but"},
    },
    "cirr": {
        "artemis": {"soft": True},
        "compodiff": {"average": ("R@1", "Rs@1")},
        "mbeir": _MBEIR | {"name": "cirr_mbeir"},
        **CIRCUS,
    },
    "fashioniq": {
        "mbeir": _MBEIR | {"name": "fashioniq_mbeir", "recall": (10, 20, 50)},
        **CIRCUS,
        "small_gallery": {"gallery": "triplets"},
        "capitalised": {"captions": "capitalised"},
        "reversed": {"captions": "reversed"},
        "artemis": {"captions": "orders_separate", "remove_reference": True},
        "artemis_words": {"captions": "orders_marked", "remove_reference": True},
        "bge_vl": {"captions": "comma"},
        "magiclens": {"captions": "joined"},
    },
}
"""Protocol -> variant -> the fields in which it differs. Named after a paper: its own protocol."""


def variant(protocol: Protocol, names: Sequence[str]) -> Protocol:
    """The protocol with these of its variants. Raises ConfigError for one that it has not."""
    valid = VARIANTS.get(protocol.name, {})
    for name in names:
        if name not in valid:
            raise ConfigError(unknown(f"variant of protocol {protocol.name}:", name, valid))
        protocol = dataclasses.replace(protocol, **valid[name])
    return protocol


@dataclasses.dataclass(frozen=True, eq=False)
class Graded:
    """Ranks of graded answers. All arrays [queries, answers].

    ranks: int32, in the gallery; subset_ranks: int32, among the candidates; -1 = not ranked there.
    weights: float32, 0 where padded.
    """

    ranks: np.ndarray
    subset_ranks: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What happened to each query: all a protocol needs to give numbers.

    target_ranks: int32[queries, targets] of all ground truths, single target first, -1 pads
    subset_ranks: int32[queries] of the single target among the candidates, -1 = no subset
    """

    target_ranks: np.ndarray
    subset_ranks: np.ndarray
    categories: tuple[str, ...]
    aspects: tuple[tuple[str, ...], ...]
    graded: Graded | None = None


def concatenate(outcomes: Sequence[Outcome]) -> Outcome:
    """The queries of several splits (the seeds of an embedded benchmark) as if they were one."""

    def stack(rows: Sequence[np.ndarray], value: int = metrics.PAD) -> np.ndarray:
        width = max(part.shape[1] for part in rows)
        missing = [((0, 0), (0, width - part.shape[1])) for part in rows]
        return np.concatenate(
            [np.pad(p, m, constant_values=value) for p, m in zip(rows, missing, strict=True)]
        )

    soft = [outcome.graded for outcome in outcomes if outcome.graded is not None]
    return Outcome(
        stack([outcome.target_ranks for outcome in outcomes]),
        np.concatenate([outcome.subset_ranks for outcome in outcomes]),
        tuple(category for outcome in outcomes for category in outcome.categories),
        tuple(aspects for outcome in outcomes for aspects in outcome.aspects),
        Graded(
            stack([one.ranks for one in soft]),
            stack([one.subset_ranks for one in soft]),
            stack([one.weights for one in soft], 0),
        )
        if soft
        else None,
    )


def values(protocol: Protocol, outcome: Outcome) -> dict[str, np.ndarray]:
    """Headline metrics of each query: name -> float64[queries], percent."""
    single = outcome.target_ranks[:, 0]
    if protocol.hit == "any":
        single = metrics.best_rank(outcome.target_ranks)
    out = {"mAP": metrics.trapezoid_precision(outcome.target_ranks)} if protocol.area else {}
    out |= {
        f"mAP@{k}": metrics.average_precision(outcome.target_ranks, k) for k in protocol.precision
    }
    if protocol.soft:
        assert outcome.graded is not None
        found = outcome.graded
        seen = (found.ranks >= 0) & (found.ranks < SOFT_DEPTH)
        for name, ranks, ks in (
            ("R", found.ranks, protocol.recall),
            ("Rs", found.subset_ranks, protocol.subset_recall),
        ):
            ranks = np.where(seen, ranks, metrics.PAD)
            out |= {f"{name}@{k}": metrics.soft_score(ranks, found.weights, k) for k in ks}
    else:
        out |= {f"R@{k}": metrics.recall(single, k) for k in protocol.recall}
        out |= {f"Rs@{k}": metrics.recall(outcome.subset_ranks, k) for k in protocol.subset_recall}
    out |= {f"nDCG@{k}": metrics.ndcg(outcome.target_ranks, k) for k in protocol.ndcg}
    if protocol.average:
        out["Avg"] = np.mean([out[name] for name in protocol.average], axis=0)
    return out


def measure(protocol: Protocol, outcome: Outcome) -> dict[str, Estimate]:
    """All numbers of a protocol: the headline, then `metric/category` and `metric/aspect`."""
    per_query = values(protocol, outcome)
    out, details = {}, {}
    categories = np.asarray(outcome.categories)
    for name, value in per_query.items():
        if protocol.by_category:
            groups = {
                category: metrics.estimate(value[categories == category])
                for category in sorted(set(outcome.categories))
            }
            out[name] = metrics.mean_of_groups(list(groups.values()))
            details |= {f"{name}/{category}": group for category, group in groups.items()}
        else:
            out[name] = metrics.estimate(value)
    if protocol.ranks:
        single = outcome.target_ranks[:, 0]
        out |= {"mean rank": metrics.mean_rank(single), "median rank": metrics.median_rank(single)}
    k = protocol.aspect_precision
    precision = metrics.average_precision(outcome.target_ranks, k) if k else np.zeros(0)
    for aspect in sorted({aspect for row in outcome.aspects for aspect in row}) if k else ():
        carries = np.asarray([aspect in row for row in outcome.aspects])
        details[f"mAP@{k}/{aspect}"] = metrics.estimate(precision[carries])
    return out | details
