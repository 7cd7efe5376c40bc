"""How many cores there are for this process."""

from cir_jax.sharding import cores


def test_the_cores_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert cores.cores() == 3
    monkeypatch.delattr(cores.os, "sched_getaffinity")
    monkeypatch.setattr(cores.os, "cpu_count", lambda: None)
    assert cores.cores() == 1
