"""The largest of what each process says, number after number, without the devices.

It goes through the key-value store of JAX's coordination service, beside the collectives of the
steps: a collective of its own would wait for those that are queued before it.
"""

import itertools
import json

import jax
from jax._src import distributed  # no public name tells the others anything

LIMIT = 3600
"""Seconds to wait for the slowest: it may be preparing what the others have."""
PATIENCE = 1.0
"""Seconds between looks at signals."""

_names = itertools.count()


class Largest:
    """All processes make them, say and hear in one order. Each number is said before it is heard,
    the sooner the less there is to wait."""

    def __init__(self) -> None:
        self._client = distributed.global_state.client
        self._name = f"cir_jax/largest/{next(_names)}"
        self._said = self._heard = self._forgotten = self._ahead = 0

    def say(self, value: int) -> None:
        key = f"{self._name}/{self._said}/{jax.process_index()}"
        self._client.key_value_set(key, json.dumps(value))
        self._said += 1
        self._ahead = max(self._ahead, self._said - self._heard)

    def hear(self) -> int:
        """Of the next number that was said. Raises JAX's error when a process has not said it in
        `LIMIT` seconds."""
        place = f"{self._name}/{self._heard}"
        found = dict(self._client.key_value_dir_get(f"{place}/"))
        for process in range(jax.process_count()):
            key = f"{place}/{process}"
            if key not in found:
                found[key] = self._wait(key)
        self._heard += 1
        self._forget()
        return max(json.loads(value) for value in found.values())

    def _wait(self, key: str) -> str:
        for _ in range(int(LIMIT / PATIENCE)):
            try:
                return self._client.blocking_key_value_get(key, int(1000 * PATIENCE))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return self._client.blocking_key_value_get(key, 1)

    def _forget(self) -> None:
        """What all have heard: whoever said the number that was heard now had heard those that came
        `_ahead` before it, and earlier ones."""
        while jax.process_index() == 0 and self._forgotten < self._heard - self._ahead:
            self._client.key_value_delete(f"{self._name}/{self._forgotten}/")
            self._forgotten += 1
