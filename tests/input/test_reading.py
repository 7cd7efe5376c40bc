"""How many read, and how far ahead."""

import pytest

from cir_jax.errors import ConfigError
from cir_jax.input import reading
from cir_jax.input.reading import Reading


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "prefetch"),
    [(1, 0, 1, 8), (2, 0, 2, 8), (8, 0, 8, 16), (15, 0, 8, 16), (16, 2, 4, 8), (240, 30, 4, 120)],
)
def test_as_the_host_has_cores(monkeypatch, cores, workers, threads, prefetch):
    monkeypatch.setattr(reading, "cores", lambda: cores)
    assert Reading.of_host() == Reading(workers, threads, prefetch)
    # what is asked for is what is done
    assert Reading.of_host(0, 3, 5) == Reading(0, 3, 5)
    assert Reading.of_host(7, 1, 0).prefetch == max(8, 7)


@pytest.mark.parametrize(("field", "given"), [("workers", -2), ("threads", -1), ("prefetch", -8)])
def test_less_than_none_is_refused(field, given):
    with pytest.raises(ConfigError, match=rf"config\.{field}={given}; it must be (-1|0) \("):
        Reading.of_host(**{field: given})
