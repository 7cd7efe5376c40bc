"""Each row once, on however many hosts and devices."""

import numpy as np
import pytest

from cir_jax.sharding import rows as over_rows

HOSTS = range(1, 34)


def spans(size, hosts):
    """Positions of a global batch that each host's devices hold: equal parts, as a mesh cuts it."""
    return np.arange(size).reshape(hosts, -1)


@pytest.mark.parametrize("hosts", HOSTS)
def test_every_row_is_loaded_once_over_all_hosts(hosts, monkeypatch):
    """Grain's IndexSampler loses rows here with drop_remainder=False."""
    devices = 1 + hosts % 4
    monkeypatch.setattr(over_rows.jax, "process_count", lambda: hosts)
    monkeypatch.setattr(over_rows, "row_shards", lambda mesh: hosts * devices)
    for n in (1, 2, hosts, 97, 220, 1003):
        for first in (0, min(16, n - 1)):  # an extraction that was resumed
            size = over_rows.round_up(None, 64, n - first)
            assert size % (hosts * devices) == 0
            counted = np.zeros(n, int)
            loaded = np.zeros(n, int)
            for start in range(first, n, size):
                for rows in spans(size, hosts):
                    wanted, where = over_rows._wanted(start, rows, n)
                    real = start + rows < n
                    np.testing.assert_array_equal(wanted[where][real], (start + rows)[real])
                    assert set(wanted) <= {*(start + rows[real]), n - 1}  # padding: the last row
                    np.add.at(loaded, wanted, 1)
                    np.add.at(counted, (start + rows)[real], 1)
            np.testing.assert_array_equal(counted[first:], 1)
            assert (loaded[first : n - 1] == 1).all() and loaded[n - 1] >= 1
            assert not counted[:first].any()


def test_a_batch_is_a_power_of_two_that_is_enough(monkeypatch):
    monkeypatch.setattr(over_rows.jax, "process_count", lambda: 3)
    monkeypatch.setattr(over_rows, "row_shards", lambda mesh: 4)
    cases = ((256, 5, 12), (5, 100, 12), (24, 100, 24), (256, 13, 24), (256, 240, 264), (8, 0, 12))
    for batch_size, n, expected in cases:
        assert over_rows.round_up(None, batch_size, n) == expected
