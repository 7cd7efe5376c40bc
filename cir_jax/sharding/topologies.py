"""Devices that need not be here: what a program can be compiled for on a machine without them.

`v5e:4x4` are 16 chips of a TPU v5e, by libtpu's compiler (extra `tpu-aot`); `cpu:8` are 8 virtual
devices of this machine, for tests of the same path.
"""

import contextlib
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator

import jax

from cir_jax.errors import ConfigError, unknown

CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of a chip, GiB, as Google's pages say; the compiler keeps some for itself."""

PACKAGE = 'pip install "cir_jax[tpu-aot]"'

# asked for once, when the library is loaded: no machine is to be looked for
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # nothing is computed on a TPU, so that several may compile at a time
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def memory_gib(topology: str) -> float | None:
    """Of each device; None for virtual ones, which share this machine's."""
    return CHIPS.get(_split(topology)[0])


PER_HOST = 4
"""Chips of a host of a slice that has several."""


def count(topology: str) -> tuple[int, int]:
    """Chips and hosts of a slice of a TPU's topology. Raises ConfigError for one that is none."""
    chips = math.prod(map(int, _split(topology)[1].split("x")))
    if chips % PER_HOST:
        raise ConfigError(
            f"{topology} has {chips} chips: hosts of a slice have {PER_HOST} of them each."
        )
    return chips, chips // PER_HOST


def compiler(topology: str) -> str:
    """Package and version that compiles for it, of which numbers are."""
    package = "jaxlib" if _split(topology)[0] == "cpu" else "libtpu"
    return f"{package} {importlib.metadata.version(package)}"


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices of a topology, to make a mesh of.

    Raises ConfigError for a topology that is none, and where libtpu is missing.
    """
    kind, layout = _split(topology)
    if kind == "cpu":
        return _virtual(int(layout), slices, topology)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--topology={topology}: compiling for a TPU needs libtpu, which is not installed. "
            f"{PACKAGE}; it needs no TPU."
        ) from error
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":  # its two cores are one device, as on a machine
        options["chip_config_name"] = "megacore"
    try:
        with _environment(_NO_MACHINE):
            made = topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology={topology}: libtpu knows no such one ({str(error).splitlines()[0]}). "
            "Write the chips along each side, such as v5e:4x4, v5p:4x4x4."
        ) from error
    return list(made)


def _split(topology: str) -> tuple[str, str]:
    kind, _, layout = topology.partition(":")
    if kind not in (*CHIPS, "cpu"):
        raise ConfigError(unknown("kind of --topology:", kind, [*CHIPS, "cpu"]))
    if not re.fullmatch(r"[1-9]\d*" if kind == "cpu" else r"\d+(x\d+)+", layout):
        raise ConfigError(
            f"--topology={topology}: expected {'cpu:8' if kind == 'cpu' else f'{kind}:4x4'} or so."
        )
    return kind, layout


def _virtual(count: int, slices: int, topology: str) -> list[jax.Device]:
    if slices > 1:
        raise ConfigError(f"--slices={slices}: virtual devices are in one slice. Use a TPU's.")
    here = jax.devices("cpu")
    if len(here) < count:
        raise ConfigError(
            f"--topology={topology}: this process has {len(here)} virtual devices. Set "
            f"JAX_NUM_CPU_DEVICES={count}."
        )
    return here[:count]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
