"""What is given as --source: a folder or file, or a dataset of the hub."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cir_jax.errors import DataError
from data import formats, hub
from data.corpus import CorpusBuilder
from data.source import Options, SourceBuilder


def source(
    given: str | os.PathLike,
    dataset: str,
    builder: type[SourceBuilder],
    options: Options,
    of_hub: Callable[[], Sequence[str]],
) -> formats.Source:
    """What the builder of the dataset is to look at.

    of_hub: the datasets that can be made of one of the hub.
    Raises DataError when it is not there, or the options are not for it.
    """
    if options.limit is not None and not issubclass(builder, CorpusBuilder):
        raise DataError(f"--limit: {dataset} is read as a whole; corpora can be cut short.")
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit={options.limit}: expected 1 or more entries.")
    if hub.is_named(given):
        if not builder.HUB:
            raise DataError(
                f"--source={given}: {dataset} is made of files of a disk; of datasets of the hub "
                f"are made {', '.join(of_hub())}."
            )
        return hub.opened(str(given), options.split)
    if options.split:
        raise DataError(
            f"--split={options.split}: --source={given} has no splits; those of hf:ORG/NAME have."
        )
    root = Path(given).expanduser().absolute()
    if not root.exists():
        raise DataError(f"--source={given}: there is no such folder.\n{builder.HELP.strip()}")
    return root
