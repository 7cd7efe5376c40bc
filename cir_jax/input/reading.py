"""How many processes and threads of a host read, and how far ahead.

It moves speed and memory, never a batch.
"""

import dataclasses

from cir_jax.errors import ConfigError
from cir_jax.sharding.cores import cores

SATURATED = 8
"""Cores that one process keeps busy with images at the most: PIL decodes beside Python's lock,
records and texts are parsed within it."""
OF_WORKER = 4
"""Threads of a worker: of each eight cores four read, and the others are left to the devices."""
AHEAD = 8
"""Batches that are read ahead at least."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """workers: processes that read, 0 = threads of this one. threads: of each of them. prefetch:
    batches that are being read or wait in memory, of all workers together."""

    workers: int = 0
    threads: int = 2
    prefetch: int = AHEAD

    @classmethod
    def of_host(cls, workers: int = -1, threads: int = 0, prefetch: int = 0) -> "Reading":
        """As `config.workers`, `.threads` and `.prefetch` say; -1 workers, 0 threads and 0 batches
        are what suits the host's cores. Raises ConfigError for others below."""
        for field, given, least in (
            ("workers", workers, -1),
            ("threads", threads, 0),
            ("prefetch", prefetch, 0),
        ):
            if given < least:
                raise ConfigError(
                    f"config.{field}={given}; it must be {least} (as the host's cores are) or more."
                )
        have = cores()
        if workers == -1:
            workers = have // SATURATED if have >= 2 * SATURATED else 0
        threads = threads or min(have, OF_WORKER if workers else SATURATED)
        busy = workers * threads if workers else 2 * threads
        return cls(workers, threads, prefetch or max(AHEAD, busy))
