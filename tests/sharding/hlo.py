"""What a compiled program moves between devices, read off its optimised HLO."""

import dataclasses
import math
import re

import jax
import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
_SHAPE = re.compile(r"\b(?:pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
# the ways in which XLA writes groups of devices
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]+\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{('\w+'(?:, ?'\w+')*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """shapes: of its results (an all-reduce may join several). groups: of devices, by number."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    line: str


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """To be read, not run: what devices exchange is the same, and it takes a third of the time."""
    options = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # later ones have no other way to compile
        options["xla_cpu_use_fusion_emitters"] = False
    return lowered.compile(compiler_options=options)


def collectives(text: str) -> list[Collective]:
    """All of them, in the order of the text."""
    found = []
    for line in text.splitlines():
        if call := _CALL.search(line):
            result, kind, _ = call.groups()
            found.append(Collective(kind, shapes(result), groups(line), line.strip()))
    return found


def shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Every array shape that a text names, without axes of size 1."""
    listed = (map(int, filter(None, dims.split(","))) for dims in _SHAPE.findall(text))
    return tuple(tuple(size for size in dims if size > 1) for dims in listed)


def groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Devices that exchange something. Raises ValueError where a line says it in another way."""
    if match := _LISTED.search(line):
        return tuple(_numbers(inner) for inner in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := _IOTA.search(line):
        shape, over, order = map(_numbers, match.groups())
        return _tuples(_devices(over, order).reshape(shape))
    if match := _MESH.search(line):
        axes, mesh = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
        mesh = tuple(map(int, mesh))
        # JAX 0.10 calls them axis_0, axis_1, ..., later ones as the mesh does
        among = tuple(axes.index(axis) for axis in re.findall(r"'(\w+)'", match[4]))
        devices = _devices(_numbers(match[2]) or mesh, _numbers(match[3])).reshape(mesh)
        devices = np.moveaxis(devices, among, range(-len(among), 0))
        return _tuples(devices.reshape(-1, math.prod(mesh[axis] for axis in among)))
    raise ValueError(f"groups of devices are written in a way not known here: {line}")


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _devices(over: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(over)).reshape(over).transpose(order or range(len(over)))


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in groups)
