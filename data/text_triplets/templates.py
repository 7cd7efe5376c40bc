"""The sentences that say how one caption became the other: RTD's and CompoDiff's.

{source} is a keyword of the reference caption, {target} what stands in its place in the target
caption. A template without {target} is a deletion: the keyword is gone.

Both papers print two templates twice ("replace ... with ...", "substitute ... for ..."); here each
is there, and drawn, once: 48 of RTD's 50 (arXiv 2406.09188, Table A.1), 46 of CompoDiff's 48 (arXiv
2303.11916, Table 2). RTD's "... is introduced as the new option after" lost its last word in print,
which CompoDiff's has. CompoDiff does not say that "{source} is removed" goes with a caption without
the keyword; here it does for both, as it would not be true otherwise.
"""

import functools

_SHARED = (
    "replace {source} with {target}",
    "apply {target}",
    "convert {source} to {target}",
    "update {source} to {target}",
    "substitute {target} for {source}",
    "alter {source} to match {target}",
    "upgrade {source} to {target}",
    "amend {source} to fit {target}",
    "opt for {target}",
    "{source} is removed",
    "add {target}",
    "if it is {target}",
    "{target} is the updated option",
    "{target} is the updated choice",
    "{source} is replaced with {target}",
    "change {source} to {target}",
    "swap {source} for {target}",
    "turn {source} into {target}",
    "{target} is the new selection",
    "transform {source} into {target}",
    "{source} is removed and {target} takes its place",
    "modify {source} to become {target}",
    "customize {source} to become {target}",
    "change {source} to match {target}",
    "{target} is introduced after {source} is removed",
    "{target} is added in place of {source}",
    "{target} is introduced as the new option after {source}",
    "{source} is removed and {target} is added",
    "{source} is removed and {target} is introduced",
    "{target} is added as a replacement for {source}",
    "{target} is the new option available",
    "{target} is added after {source} is removed",
    "{target} is introduced after {source} is retired",
    "tweak {source} to become {target}",
    "alter {source} to {target}",
    "redesign {source} as {target}",
    "adapt {source} to fit {target}",
    "{target} is the new choice",
    "exchange {source} with {target}",
)

RTD = (
    *_SHARED,
    "choose {target} instead of {source}",
    "has no {source}",
    "show no {source}",
    "no {source}",
    "remove {source}",
    "delete {source}",
    "not a {source}",
    "with no {source}",
    "without {source}",
)

COMPODIFF = (
    *_SHARED,
    "{target}",
    "choose {target} instead",
    "{target} is the new option",
    "use {target} from now on",
    "remodel {source} into {target}",
    "revamp {source} into {target}",
    "{target} is the updated version",
)

PAPERS = {"rtd": RTD, "compodiff": COMPODIFF}

KINDS = ("exchange", "target only", "deletion")


@functools.cache
def kind(template: str) -> str:
    """Of KINDS: whether it names both keywords, the new one alone, or the old one alone."""
    if "{target}" not in template:
        return "deletion"
    return "exchange" if "{source}" in template else "target only"
