"""Scores of a stage's checkpoints: `scores.json` beside them says which one is the best.

A checkpoint is scored while it is being written. What a kill leaves without a score gets it when
the run goes on, so the choice is that of an unbroken run.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from cir_jax.errors import CheckpointError
from cir_jax.storage import faults
from cir_jax.storage.atomic import write_atomically
from cir_jax.training.differences import differing_fields

FILE = "scores.json"


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Says how good parameters are. measure(params): higher is better; all processes call it.

    settings: config field -> value of what a score depends on, beside the parameters, and what may
    change between the runs of a workdir.
    """

    metric: str
    measure: Callable[[Any], float]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Scores:
    """What is known of the checkpoints of a stage's directory. values: step -> score.

    Raises CheckpointError when the file there is damaged.
    """

    def __init__(self, directory: Path):
        self._path = directory / FILE
        self.metric, self.values = "", {}
        self.settings: Mapping[str, Any] | None = None
        try:
            content = json.loads(self._path.read_bytes())
            self.metric = str(content["metric"])
            self.values = {int(step): float(value) for step, value in content["scores"].items()}
            self.settings = content.get("settings")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: cannot be read now ({faults.cause(error)})."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path}: not as training wrote it ({type(error).__name__}: {error}). Put it "
                "back from a copy, or delete it: then the newest checkpoint counts as the best "
                "until others are scored."
            ) from error

    def continue_from(self, step: int, metric: str) -> None:
        """Forgets what comes after `step`: the run goes on from there. CheckpointError when the
        scores are those of another metric."""
        if self.metric not in ("", metric):
            raise CheckpointError(
                f"{self._path}: holds {self.metric}, config.checkpoint.best says {metric}. Use a "
                "new --workdir, or the metric of the run there."
            )
        self.metric = metric
        self.values = {number: value for number, value in self.values.items() if number <= step}

    def compare_with(self, settings: Mapping[str, Any]) -> None:
        """Before others are added: CheckpointError when those there are of other settings."""
        settings = json.loads(json.dumps(dict(settings)))  # as they are read back: lists
        before = settings if self.settings is None or not self.values else self.settings
        if differ := differing_fields(before, settings):
            raise CheckpointError(
                f"{self._path}: the checkpoints there were scored with other settings, so new "
                f"scores cannot be compared with theirs: {'; '.join(differ)}. Go on with the "
                "settings of before, or use a new --workdir."
            )
        self.settings = settings

    def add(self, step: int, value: float) -> None:
        """Remembers a score, on disk too (process 0). Raises DataError when there is no room."""
        self.values[step] = value
        content = {"metric": self.metric, "settings": self.settings, "scores": self.values}
        if jax.process_index() == 0:
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(self._path, lambda file: file.write(text.encode()))

    def ranked(self, steps: Iterable[int]) -> list[int]:
        """Best first, of equal ones the earliest; then those without a score, newest first."""
        steps = list(steps)
        scored = sorted((-self.values[step], step) for step in steps if step in self.values)
        rest = sorted((step for step in steps if step not in self.values), reverse=True)
        return [step for _, step in scored] + rest
