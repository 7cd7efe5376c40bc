"""Several processes compile before any of them runs."""

import functools

import jax
import numpy as np

from cir_jax.sharding import together
from cir_jax.sharding.together import Together


def test_processes_meet_between_compiling_and_running(monkeypatch):
    done = []

    @Together
    @functools.partial(jax.jit, static_argnums=0)
    def scaled(factor, x):
        done.append("traced")
        return factor * x

    assert scaled(2, np.ones(3)).sum() == 6 and done == ["traced"]  # one process: as it is
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(together, "meet", lambda what: done.append(f"meets for {what}"))
    monkeypatch.setattr(scaled, "jitted", Spy(scaled.jitted, done))
    done.clear()
    for factor, size in ((3, 4), (3, 4), (4, 4), (3, 5), (3, 4)):
        assert scaled(factor, np.ones(size)).sum() == factor * size
    once = ["lowered", "traced", "compiled", "meets for scaled", "runs"]
    assert done == [*once, "runs", *once, *once, "runs"]


class Spy:
    """A jitted function that says what is done with it."""

    def __init__(self, jitted, done):
        self.jitted, self.done, self.__name__ = jitted, done, jitted.__name__

    def __call__(self, *args):
        self.done.append("runs")
        return self.jitted(*args)

    def lower(self, *args):
        self.done.append("lowered")
        lowered, done = self.jitted.lower(*args), self.done

        class Lowered:
            def compile(self):
                done.append("compiled")
                return lowered.compile()

        return Lowered()
