"""What a run of an optimised program takes: memory traffic, FLOPs, collectives and cycles.

XLA's own `cost_analysis` counts a loop's body once and on-chip copies as memory traffic, so the compiled module's text
is read instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jaxllm.hlo import CALLS, COLLECTIVES, Computation, Instruction, Module, Shape, parameters

# These move nothing, or are the end of what their start was counted for.
_FREE = frozenset(("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"))
_FREE |= frozenset(("partition-id", "replica-id", "opt-barrier", "add-dependency"))
_FREE |= frozenset(f"{op}-done" for op in ("copy", "slice", "async", *COLLECTIVES))
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # operand 0 is changed in place; where the update stands


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run on one device.

    memory_bytes: read and written in HBM. copied_bytes: those of them that only move or transpose.
    flops: of matmuls. int8_flops: those of them with two int8 operands. cycles: the compiler's estimates added up.
    collectives: how many of each kind. collective_bytes: of their results. wire_bytes: that a device sends for them,
        by ring algorithms. kernel_bytes, kernel_flops: what kernels say that they move and compute; of their cycles the
        compiler has no estimate.
    """

    memory_bytes: float = 0.0
    copied_bytes: float = 0.0
    flops: float = 0.0
    int8_flops: float = 0.0
    cycles: float = 0.0
    collective_bytes: float = 0.0
    wire_bytes: float = 0.0
    kernel_bytes: float = 0.0
    kernel_flops: float = 0.0
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        mine, others = self.collectives, other.collectives
        kinds = {kind: mine.get(kind, 0) + others.get(kind, 0) for kind in (*mine, *others)}
        return Cost(collectives=kinds, **{name: getattr(self, name) + getattr(other, name) for name in _SUMS})

    def __mul__(self, times: float) -> Cost:
        kinds = {kind: round(count * times) for kind, count in self.collectives.items()}
        return Cost(collectives=kinds, **{name: getattr(self, name) * times for name in _SUMS})


_SUMS = tuple(field.name for field in dataclasses.fields(Cost) if field.name != "collectives")


def cost(module: Module, trips: int = 1, counts: Callable[[Instruction], bool] = lambda i: True) -> tuple[Cost, Cost]:
    """The least and the most that one run takes; they differ where a conditional chooses.

    trips: of a loop whose count cannot be told. counts: which instructions of the entry do.
    """

    @functools.cache
    def run(name: str) -> tuple[Cost, Cost]:
        low = high = Cost()
        body = module.computations[name]
        for i in body.values():
            least, most = one(i, body)
            low, high = low + least, high + most
        return low, high

    def one(i: Instruction, body: Computation) -> tuple[Cost, Cost]:
        if i.op == "while":
            low, high = run(*i.called("body"))
            times = _trips(module, i, body) or trips
            return low * times, high * times
        if i.op == "conditional":
            branches = [run(name) for name in i.called(*CALLS)]
            return min((low for low, _ in branches), key=_weight), max((high for _, high in branches), key=_weight)
        if i.op in ("call", "async-start"):
            (name,) = i.called("to_apply", "calls")
            return run(name)
        least = _cost_of(module, i, body)
        return least, least

    entry = module.computations[module.entry]
    pairs = [one(i, entry) for i in entry.values() if counts(i)]
    return sum((low for low, _ in pairs), Cost()), sum((high for _, high in pairs), Cost())


def _trips(module: Module, i: Instruction, body: Computation) -> int | None:
    """Of a loop: as the compiler says, or as its counter runs from one constant to another; None where neither is."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest):
        return int(known[1])
    condition, inner = (module.computations[i.called(name)[0]] for name in ("condition", "body"))
    test, carry, after = list(condition.values())[-1], body[i.operands[0]], list(inner.values())[-1]
    counter = condition.get(test.operands[0]) if test.op == "compare" and "direction=LT" in test.rest else None
    index = re.search(r"index=(\d+)", counter.rest) if counter and counter.op == "get-tuple-element" else None
    if not index or carry.op != "tuple" or after.op != "tuple":
        return None
    at = int(index[1])
    advance = inner[after.operands[at]]
    step = _constant(inner, advance.operands[-1]) if advance.op == "add" else None
    first, end = _constant(body, carry.operands[at]), _constant(condition, test.operands[1])
    return -(-(end - first) // step) if step and first is not None and end is not None else None


def _constant(body: Computation, name: str) -> int | None:
    i = body.get(name)
    while i is not None and i.op in ("copy", "bitcast"):
        i = body.get(i.operands[0])
    return int(i.operands[0]) if i is not None and i.op == "constant" and i.operands[0].isdigit() else None


def _weight(cost: Cost) -> float:
    return cost.cycles + cost.memory_bytes


def _cost_of(module: Module, i: Instruction, body: Computation) -> Cost:
    """Of an instruction that calls nothing but a fusion."""
    if i.op in _FREE:
        return Cost()
    if found := collective(module, i):
        kind, attributes = found
        first = len(i.operands) if i.op.endswith("-start") else 0  # a start's tuple begins with its operands
        received = sum(shape.nbytes for shape in i.shapes[first:] if shape.bits)
        sent = received * _share_sent(kind, _group_size(attributes))
        return Cost(cycles=i.cycles, collective_bytes=received, wire_bytes=sent, collectives={kind: 1})
    if i.op in ("copy-start", "slice-start"):
        to = i.shapes[0] if i.op == "copy-start" else i.shapes[-2]
        source = body[i.operands[0]].shapes[0]
        moved = to.memory_bytes() + source.memory_bytes(to.size)
        return Cost(moved, moved if not to.space else 0, cycles=i.cycles)  # onto the chip it is a read that had to be
    moved = 0
    for position, name in enumerate(i.operands):
        operand = body.get(name)
        if operand and len(operand.shapes) == 1:
            touched = _touched_by(module, i, position)
            moved += operand.shapes[0].memory_bytes(touched)
    moved += sum(shape.memory_bytes(size) for shape, size in written(module, i, body))
    flops, int8_flops = _flops(module, i, body)
    if said := re.search(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"', i.rest):
        flops, kernel_bytes = float(said[1]), float(said[2])
        return Cost(moved, flops=flops, kernel_bytes=kernel_bytes, kernel_flops=flops)
    return Cost(moved, moved if moves_only(module, i) else 0, flops, int8_flops, i.cycles)


def collective(module: Module, i: Instruction) -> tuple[str, str] | None:
    """The kind and the attributes of the collective that an instruction is; None for others.

    The TPU compiler makes one of an all-reduce of which each device takes a part; it scatters what it reduces.
    """
    if (kind := i.op.removesuffix("-start")) in COLLECTIVES:
        return kind, i.rest
    inside = next((part for part in _inside(module, i).values() if part.op in COLLECTIVES), None)
    return None if inside is None else ("reduce-scatter" if inside.op == "all-reduce" else inside.op, inside.rest)


def _group_size(attributes: str) -> int:
    """Devices that take part in one collective; 1 where all that is said is nothing."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    return 2 if "source_target_pairs" in attributes else 1


def _share_sent(kind: str, n: int) -> float:
    """Bytes sent for a byte of result."""
    others = (n - 1) / n
    return {"all-reduce": 2 * others, "reduce-scatter": n - 1.0, "collective-permute": 1.0}.get(kind, others)


def _inside(module: Module, i: Instruction) -> Computation:
    return module.computations[i.called("calls")[0]] if i.op == "fusion" else {}


def _touched(module: Module, body: Computation, position: int) -> int | None:
    """How many elements of a fusion's operand are read; None for all."""
    parameter = parameters(body).get(position)
    return None if parameter is None else _read_through(module, body, parameter.name)


def _read_through(module: Module, body: Computation, name: str) -> int | None:
    total = 0
    for user in body.values():
        for position, operand in enumerate(user.operands):
            if operand != name or user.op in ("parameter", "tuple"):
                continue
            part = _touched_by(module, user, position)
            if part is not None and _passes_on(module, user, position):
                rest = _read_through(module, body, user.name)
                part = None if rest is None else part + rest
            if part is None:
                return None
            total += part
    return total


def _touched_by(module: Module, i: Instruction, position: int) -> int | None:
    """How many elements of an operand an instruction reads; None for all."""
    if inner := _inside(module, i):
        return _touched(module, inner, position)
    if i.op == "bitcast" or (position == 0 and i.op in _UPDATES):
        return 0  # what is replaced is written, and counted there
    return i.shapes[0].size if position == 0 and i.op in _SLICES else None


def _passes_on(module: Module, i: Instruction, position: int) -> bool:
    """Whether the result is that operand's memory, so that who reads it reads the operand."""
    inner = _inside(module, i)
    if not inner:
        return i.op == "bitcast" or (position == 0 and i.op in _UPDATES)
    at, parameter = list(inner.values())[-1], parameters(inner).get(position)
    while at.operands and at.op != "parameter" and _passes_on(module, at, 0):
        at = inner[at.operands[0]]
    return parameter is not None and at.name == parameter.name


def written(module: Module, i: Instruction, body: Computation) -> Iterator[tuple[Shape, int | None]]:
    """Each result with how many of its elements are written; None for all."""
    inner = _inside(module, i)
    roots = [i]
    if inner:
        root = list(inner.values())[-1]
        roots = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
        body = inner
    for shape, root in zip(i.shapes, roots, strict=False):
        while root.op == "bitcast":
            root = body[root.operands[0]]
        within = body
        while nested := _inside(module, root):
            root, within = list(nested.values())[-1], nested
        size = None
        if root.op in _UPDATES and len(root.operands) > _UPDATES[root.op]:
            update = within.get(root.operands[_UPDATES[root.op]])
            size = update.shapes[0].size if update else None
        yield shape, size


_MOVES = frozenset(("parameter", "copy", "transpose", "bitcast", "reshape", "tuple", "constant", "pad", "slice"))


def moves_only(module: Module, i: Instruction) -> bool:
    """Whether it computes nothing: it copies, or lays out anew."""
    if inner := _inside(module, i):
        parts = [part for part in inner.values() if part.op not in _MOVES]
        moving = any(part.op in ("copy", "transpose") for part in inner.values())
        return all(part.op == "fusion" and moves_only(module, part) for part in parts) and (moving or bool(parts))
    return i.op in ("copy", "transpose")


def _flops(module: Module, i: Instruction, body: Computation) -> tuple[float, float]:
    """All, and those of int8 x int8."""
    if inner := _inside(module, i):
        pairs = [_flops(module, other, inner) for other in inner.values()]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    if i.op not in ("dot", "convolution"):
        return 0.0, 0.0
    left, right = (body[name].shapes[0] for name in i.operands[:2])
    if i.op == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        terms = math.prod(left.dims[d] for d in map(int, filter(None, (dims[1] if dims else "").split(","))))
        flops = 2.0 * i.shapes[0].size * terms
    else:
        flops = _convolution_flops(i, left, right)
    return flops, flops if left.dtype == right.dtype == "s8" else 0.0


def _convolution_flops(i: Instruction, left: Shape, right: Shape) -> float:
    """A TPU's matmul is a convolution; batched ones walk the batch as a padded window, of which little is real."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if not labels:
        raise ValueError(f"A convolution without dim_labels: {i.name}")
    lhs, rhs, out = labels.groups()
    terms = float(right.dims[rhs.index("i")])
    for name, extent in zip(rhs, right.dims, strict=True):
        if name.isdigit():
            terms *= _real_terms(
                i.rest, int(name), left.dims[lhs.index(name)], extent, i.shapes[0].dims[out.index(name)]
            )
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    return 2.0 * i.shapes[0].size * terms / (int(groups[1]) if groups else 1)


def _real_terms(attributes: str, axis: int, size: int, kernel: int, out: int) -> float:
    """Of a window's `kernel` places, how many lie on the input and not on padding, on average over the results."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}

    def of(key: str, default: str) -> str:
        return given[key].split("x")[axis] if key in given else default

    stride, dilate, rhs_dilate = (int(of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(of("pad", "0_0").split("_")[0])
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * rhs_dilate - low
    real = (places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)
    return float(real.sum()) / out
