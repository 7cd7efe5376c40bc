"""Programs with collectives, of several processes: all have compiled before one of them runs.

A process that waits in a collective for one that still compiles is given up after 30 seconds by
Gloo, on CPUs, and after minutes by others.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import multihost

LIMIT = 3600
"""Seconds to wait for the slowest to compile."""

_numbers = itertools.count()


def meet(what: str, seconds: int = LIMIT) -> None:
    """Waits until all processes are here, without their devices; all must call it in one order."""
    everybody = set(range(jax.process_count()))
    # a name is for one meeting
    multihost.sync_global_processes(
        f"{what} {next(_numbers)}", timeout=seconds, processes=everybody
    )


class Together:
    """A jitted function, as it is but for that; `trace` and `lower` are its own."""

    def __init__(self, jitted: Callable[..., Any]):
        self.jitted, self._compiled = jitted, set()
        self.trace, self.lower = jitted.trace, jitted.lower

    def __call__(self, *args: Any) -> Any:
        if jax.process_count() > 1:
            leaves, structure = jax.tree.flatten(args)
            of_leaves = (
                (x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x
                for x in leaves
            )
            program = (structure, *of_leaves)
            if program not in self._compiled:
                self.jitted.lower(*args).compile()  # the call below finds it compiled
                meet(getattr(self.jitted, "__name__", "a program"))
                self._compiled.add(program)
        return self.jitted(*args)
