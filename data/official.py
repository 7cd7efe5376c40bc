"""What the authors' annotation files say of CIRCO's and CIRR's splits, without images or tables."""

from pathlib import Path

from cir_jax.errors import DataError
from cir_jax.evaluation.submissions import HIDDEN
from cir_jax.evaluation.validator import Facts, OfficialQuery
from data.benchmark import AbsentError, check, check_ids
from data.circo.circo_dataset_builder import Circo
from data.cirr.cirr_dataset_builder import Cirr


def facts(source: Path) -> dict[str, list[Facts]]:
    """Benchmark -> the splits of which the folder has annotations, as `validator.validate` wants.

    CIRCO's queries are enough; without its list of images (`image_info_unlabeled2017.json`) the
    gallery is not known. Raises DataError for a folder without annotations, and for files that are
    damaged or contradict themselves.
    """
    if not source.is_dir():
        raise DataError(f"--source={source}: there is no such folder.")
    found: dict[str, list[Facts]] = {"circo": [], "cirr": []}
    why = []
    for builder in (Circo, Cirr):
        for split in (HIDDEN[builder.name], "val"):
            try:
                found[builder.name].append(_facts(builder, source, split))
            except AbsentError as error:
                why.append(f"  {builder.name} {split}: {error}")
    if not any(found.values()):
        raise DataError(f"--source={source}: no annotations of CIRCO or CIRR.\n" + "\n".join(why))
    return found


def _facts(builder: type[Circo] | type[Cirr], source: Path, split: str) -> Facts:
    where = f"the {split} annotations in {source}"
    images = None
    if builder is Circo and not Circo.image_list(source).is_file():
        questions = Circo.questions(source, split)
        check_ids(questions)
    else:
        raw = builder.read(source, split)
        check(raw)
        questions, images = raw.questions, frozenset(picture.name for picture in raw.pictures)
    queries = {
        str(one.id): OfficialQuery(
            one.reference, frozenset(one.candidates), one.targets, one.aspects
        )
        for one in questions
    }
    return Facts(split, queries, images, where)
