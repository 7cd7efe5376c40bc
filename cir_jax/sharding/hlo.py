"""What a compiled program moves between devices, read off its optimised HLO."""

import dataclasses
import math
import re

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
_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{|true_computation=|false_computation=)(%?[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
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


def collectives(text: str) -> list[Collective]:
    """All of them, in the order of the text."""
    found = []
    for line in text.splitlines():
        if call := _CALL.search(line):
            result, kind, *_ = call.groups()
            found.append(Collective(kind, shapes(result), groups(line), line.strip()))
    return found


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many a run of the program makes, and the bytes of the arrays
    that each device gathers, reduces or sends, whole, in all of them."""

    count: int = 0
    bytes: int = 0


def traffic(text: str) -> dict[str, Traffic]:
    """Kind -> what one run of a compiled program exchanges; what is in a loop counts as often as it
    runs, of branches the dearest. Raises ValueError for a loop with collectives of which the text
    does not say how often it runs.

    What XLA:TPU spreads over several fusions (start, beside a product, done) counts once, and an
    all-reduce of which each device keeps its part alone is a reduce-scatter.
    """
    programs = computations(text)
    known: dict[str, dict[str, Traffic]] = {}
    seen = set()

    def of(name: str) -> dict[str, Traffic]:
        if name in known:
            return known[name]
        total = known[name] = {}
        for line in programs.get(name, ()):
            if call := _CALL.search(line):
                channel = _CHANNEL.search(line)
                key = (call[2], channel[1]) if channel else (name, line)
                if key not in seen:
                    _add(total, _of_call(call, name))
                    seen.add(key)
            for called in map(of, _CALLED.findall(line)):
                loop = called and " while(" in line
                _add(total, called, _trips(line, programs) if loop else 1)
            listed = ",".join(_BRANCHES.findall(line))
            if branches := [of(branch) for branch in re.findall(r"[\w.\-]+", listed)]:
                _add(total, max(branches, key=lambda each: sum(x.bytes for x in each.values())))
        return total

    return of("")


def _of_call(call: re.Match[str], name: str) -> dict[str, Traffic]:
    """Of a line with a collective, in computation `name`."""
    result, kind, start, _ = call.groups()
    sizes = arrays(result)
    if start and kind != "all-reduce":
        sizes = [max(sizes)]  # what goes in stands beside what comes out
    size = sum(sizes)
    if kind == "reduce-scatter":
        size *= len(groups(call.string)[0])
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return {kind: Traffic(1, size)}


def _add(total: dict[str, Traffic], more: dict[str, Traffic], times: int = 1) -> None:
    for kind, each in more.items():
        was = total.get(kind, Traffic())
        total[kind] = Traffic(was.count + times * each.count, was.bytes + times * each.bytes)


def largest(text: str, count: int) -> list[tuple[int, str, str]]:
    """The largest arrays that a compiled program writes: (bytes, type and shape, what of), each
    type and shape once. Tuples and what is inside of a fusion are none."""
    inside = {
        called
        for lines in computations(text).values()
        for line in lines
        if " fusion(" in line
        for called in _CALLED.findall(line)
    }
    found: dict[str, tuple[int, str]] = {}
    for name, lines in computations(text).items():
        for line in lines if name not in inside else ():
            _, _, made = line.partition(" = ")
            if (match := _ARRAY.match(made)) and not re.search(r"\b(bitcast|parameter)\(", made):
                of = re.search(r'op_name="([^"]*)"', line)
                found.setdefault(match[0], (arrays(match[0])[0], of[1] if of else ""))
    listed = [(size, shape, of) for shape, (size, of) in found.items()]
    return sorted(listed, key=lambda each: -each[0])[:count]


def computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of a program's text; the entry is called ""."""
    found: dict[str, list[str]] = {}
    inside: list[str] | None = None
    for line in text.splitlines():
        if line == "}":
            inside = None
        elif inside is not None:
            inside.append(line)
        elif match := _COMPUTATION.match(line):
            inside = found.setdefault("" if match[1] else match[2], [])
    return found


def _trips(line: str, programs: dict[str, list[str]]) -> int:
    """How often a loop runs: as its line says, or as its counter is compared in its condition."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = programs[_CONDITION.search(line)[1]]
    for each in list(condition):
        for called in _CALLED.findall(each):
            condition = condition + programs[called]
    limits = {int(n) for each in condition for n in _CONSTANT.findall(each)}
    if len(limits) != 1:
        raise ValueError(f"a loop of which nothing says how often it runs: {line.strip()[:300]}")
    return limits.pop()


def arrays(text: str) -> list[int]:
    """Bytes of every array that a text names, in order."""
    return [
        math.prod(map(int, filter(None, dims.split(",")))) * _width(kind) // 8
        for kind, dims in _ARRAY.findall(text)
    ]


def _width(kind: str) -> int:
    """Bits of a type as XLA writes it: f32, bf16, s8, pred, f8e4m3fn ..."""
    return 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])


def shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Every array shape that a text names, without axes of size 1."""
    listed = (map(int, filter(None, dims.split(","))) for _, dims in _ARRAY.findall(text))
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
