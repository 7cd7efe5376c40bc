"""Eight CPU devices for every test, JAX strict about broadcasting, and compilations that are cheap.

Most of what the tests do is to compile. So one session has one cache of compiled programs, shared
by its workers and the binaries that they start (a cache of your own, which lives on, is taken if
`$JAX_COMPILATION_CACHE_DIR` names it), and programs, which run once, are not optimised and come
from XLA's cheaper code generator. The golden numbers are computed in a process that compiles as a
user's does (test_parity.py).
"""

import collections
import gc
import os
import shutil
import tempfile

import jax
import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones end a program for a flag that they do not know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
gc.set_threshold(200_000, 50, 1000)  # tracing makes many objects and little garbage
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config: pytest.Config) -> None:
    if CACHE not in os.environ:  # the first process: its workers inherit the variable
        os.environ[CACHE] = folder = tempfile.mkdtemp(prefix="cir_jax_compiled_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(CACHE))
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than cores: a worker often waits for a binary that it has started. Another one takes
    as long. A worker grows to 4 GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(2, min((os.cpu_count() or 1) + 1, memory // (5 << 30)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no worker idles while the other has one left."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tiny_blip():
    """A small random BLIP: (backbone, params)."""
    from tests import tiny as factory

    return factory.blip()


@pytest.fixture(scope="session")
def tiny():
    """A small random CLIP: (backbone, params)."""
    from tests import tiny as factory

    return factory.backbone()
