"""Evaluation protocols as data: what makes two numbers comparable, printed beside each of them.

Defaults are those of SEARLE's code (arXiv 2303.15247), which most zero-shot papers share. Peers
differ in silence: ARTEMIS removes the reference on FashionIQ, CoVR also on CIRCO.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cir_jax.errors import DataError
from cir_jax.evaluation import metrics
from cir_jax.evaluation.metrics import Estimate

STRIPPED = ".?, "
"""Characters SEARLE strips from both ends of each FashionIQ caption."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to turn queries, gallery and ground truth into numbers.

    gallery: "all" images of the split; those of the query's "category"; the query's "candidates".
    captions: "single" = one text, as it is; "orders_averaged" = "{c1} and {c2}" and reversed,
        c1 and c2 stripped, both composed; the unit features are averaged and normalised again.
    recall, subset_recall, precision: the K of R@K and Rs@K (single target; Rs: among the query's
        candidates without the reference) and of mAP@K (all ground truths).
    aspect_precision: K of the mAP per semantic aspect, 0 = none.
    by_category: numbers per category too; the headline is their unweighted mean.
    average: metrics whose mean is reported as "Avg".
    """

    name: str
    gallery: Literal["all", "category", "candidates"] = "all"
    remove_reference: bool = False
    captions: Literal["single", "orders_averaged"] = "single"
    recall: tuple[int, ...] = ()
    subset_recall: tuple[int, ...] = ()
    precision: tuple[int, ...] = ()
    aspect_precision: int = 0
    by_category: bool = False
    average: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Says all that moves the numbers, so that a changed copy cannot keep the old id."""
        reference = "removed" if self.remove_reference else "kept"
        return (
            f"{self.name}(gallery={self.gallery}, reference={reference}, captions={self.captions})"
        )

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics of the paper's table, in its order."""
        return (
            *(f"mAP@{k}" for k in self.precision),
            *(f"R@{k}" for k in self.recall),
            *(f"Rs@{k}" for k in self.subset_recall),
            *(("Avg",) if self.average else ()),
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
        texts = [text.strip(STRIPPED) for text in texts]
        if not 1 <= len(texts) <= 2:
            raise DataError(
                f"{what}: {len(texts)} texts, protocol {self.id} expects one or two. "
                "Prepare the dataset again."
            )
        if len(texts) == 1:
            return texts
        first, second = texts
        return [f"{first} and {second}", f"{second} and {first}"]


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

CAPTIONS = Protocol("captions", recall=(1, 5, 10))
"""Caption <-> image retrieval, which judges a pretrained backbone; see `evaluation.captions`."""

PROTOCOLS = {protocol.name: protocol for protocol in (CIRCO, CIRR, FASHIONIQ, GENECIS)}


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


def concatenate(outcomes: Sequence[Outcome]) -> Outcome:
    """The queries of several splits (the seeds of an embedded benchmark) as if they were one."""
    width = max(outcome.target_ranks.shape[1] for outcome in outcomes)

    def pad(ranks: np.ndarray) -> np.ndarray:
        missing = ((0, 0), (0, width - ranks.shape[1]))
        return np.pad(ranks, missing, constant_values=metrics.PAD)

    return Outcome(
        np.concatenate([pad(outcome.target_ranks) for outcome in outcomes]),
        np.concatenate([outcome.subset_ranks for outcome in outcomes]),
        tuple(category for outcome in outcomes for category in outcome.categories),
        tuple(aspects for outcome in outcomes for aspects in outcome.aspects),
    )


def values(protocol: Protocol, outcome: Outcome) -> dict[str, np.ndarray]:
    """Headline metrics of each query: name -> float64[queries], percent."""
    single = outcome.target_ranks[:, 0]
    out = {
        f"mAP@{k}": metrics.average_precision(outcome.target_ranks, k) for k in protocol.precision
    }
    out |= {f"R@{k}": metrics.recall(single, k) for k in protocol.recall}
    out |= {f"Rs@{k}": metrics.recall(outcome.subset_ranks, k) for k in protocol.subset_recall}
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
    k = protocol.aspect_precision
    precision = metrics.average_precision(outcome.target_ranks, k) if k else np.zeros(0)
    for aspect in sorted({aspect for row in outcome.aspects for aspect in row}) if k else ():
        carries = np.asarray([aspect in row for row in outcome.aspects])
        details[f"mAP@{k}/{aspect}"] = metrics.estimate(precision[carries])
    return out | details
