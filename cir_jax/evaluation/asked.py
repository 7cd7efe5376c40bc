"""What is asked of every query of a benchmark beside what the benchmark says."""

import dataclasses
from typing import Any

from cir_jax.composers.base import Composer
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import ConfigError, unknown

USES = ("both", "text", "image")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """conditions: see there. use: the queries' reference images and texts, or one of the two.

    Raises ConfigError for another `use` than these.
    """

    conditions: Conditions = dataclasses.field(default_factory=Conditions)
    use: str = "both"

    def __post_init__(self) -> None:
        if self.use not in USES:
            raise ConfigError(unknown("use", self.use, USES))

    @property
    def said(self) -> dict[str, Any]:
        """For results, as JSON has it."""
        given = {name: str(value) for name, value in self.conditions.given.items()}
        return given | self._used

    @property
    def identity(self) -> dict[str, Any]:
        """What moves the numbers, as JSON has it: of a mask its content. {} = nothing is asked."""
        return self.conditions.identity | self._used

    @property
    def _used(self) -> dict[str, str]:
        return {} if self.use == "both" else {"use": self.use}

    def of(self, composer: Composer, seed: int) -> tuple[Composer, int]:
        """The composer and the seed that answer so.

        Raises ConfigError for conditions that the method does not take.
        """
        conditions = self.conditions
        conditions.check(composer)
        if self.use != "both" and not composer.alone:
            raise ConfigError(
                f"use={self.use!r}: {type(composer).__name__} has no answer of its own to one of "
                "the two. The baselines image_only and text_only are printed beside every method."
            )
        if self.use == "text" and (conditions.mask is not None or conditions.noised_reference):
            raise ConfigError("use='text': a mask and a noised reference are about the image.")
        varied = conditions.vary(composer, text_alone=self.use == "text")
        return varied, seed if conditions.seed is None else conditions.seed
