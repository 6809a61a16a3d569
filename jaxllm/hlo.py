"""The text of an optimised program, read: computations, instructions, and how their values lie in memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "bf16": 16, "c64": 64}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ABSURD_CYCLES = 1e9  # what the compiler could not estimate comes out near 2**63


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array. layout: its axes, the fastest-varying first. tile: of those axes, the fastest last.

    space: 0 is HBM, or a CPU's memory; others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of an element; 0 for a token, which is no array."""
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(digits[1]) if digits else 0

    @property
    def nbytes(self) -> int:
        """As it lies in memory: tiled axes are filled up to whole tiles."""
        dims = list(self.dims)
        for axis, tile in zip(self.layout, reversed(self.tile), strict=False):
            dims[axis] = -(-dims[axis] // tile) * tile
        return -(-math.prod(dims) * self.bits // 8)

    def memory_bytes(self, elements: int | None = None) -> int:
        """What goes through memory when all, or so many `elements`, are read or written once."""
        if self.space:
            return 0
        return self.nbytes if elements is None or elements >= self.size else -(-elements * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shapes: of the result, several for a tuple. rest: attributes.

    operands: names; of a parameter its number, of a constant its value.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def cycles(self) -> float:
        """The compiler's estimate; 0 where it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return float(match[1]) if match and float(match[1]) < _ABSURD_CYCLES else 0.0

    @property
    def source(self) -> str:
        """What it was traced from: "jit(decode)/layer_0/mlp/…"; "" where the compiler made it up."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        names = []
        for attribute in attributes:
            if match := re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.-]+))", self.rest):
                names += re.findall(r"[\w.-]+", match[1] or match[2])
        return names


Computation = Mapping[str, Instruction]  # in order of execution; the last is the root


@dataclasses.dataclass(frozen=True)
class Module:
    """aliased: numbers of the parameters whose memory results take over."""

    computations: Mapping[str, Computation]
    entry: str
    aliased: frozenset[int]

    @property
    def parameters(self) -> dict[int, Instruction]:
        return parameters(self.computations[self.entry])

    def executed(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all that runs by itself: not the insides of fusions and reductions."""
        todo, seen = [self.entry], set()
        while todo:
            if (name := todo.pop()) in seen:
                continue
            seen.add(name)
            for i in self.computations[name].values():
                yield name, i
                if i.op in ("while", "conditional", "call", "async-start"):
                    todo += i.called(*CALLS)


CALLS = ("body", "condition", "branch_computations", "true_computation", "false_computation", "to_apply", "calls")


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`. Raises ValueError for a text without an entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            if match := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                body = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            body = None
        elif found := _instruction(line):
            body[found.name] = found
    if not entry:
        raise ValueError("This is no optimised HLO: it has no ENTRY computation.")
    header = text[: text.index(entry)]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry_computation_layout", header)
    numbers = re.findall(r"\((\d+), \{", aliases[1]) if aliases else []
    return Module(computations, entry, frozenset(map(int, numbers)))


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not match:
        return None
    at = match.end()
    end = _closing(line, at + 1) + 1 if line[at] == "(" else line.find(" ", at)
    call = re.compile(r" ([\w-]+)\(").match(line, end)
    if not call:
        return None
    close = _closing(line, call.end())
    inside = line[call.end() : close]
    operands = (inside,) if call[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(match[1], call[1], tuple(_shapes(line[at:end])), operands, line[close:])


def _closing(line: str, at: int) -> int:
    """Index of the parenthesis that closes the one before `at`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(line, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(line)


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout, more in _SHAPE.findall(text):
        tile, space = re.match(r"T\(([\d,]+)\)", more), re.search(r"S\((\d+)\)", more)
        yield Shape(
            dtype,
            _numbers(dims),
            _numbers(layout),
            _numbers(tile[1]) if tile else (),
            int(space[1]) if space else 0,
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def parameters(body: Computation) -> dict[int, Instruction]:
    """By number."""
    return {int(i.operands[0]): i for i in body.values() if i.op == "parameter"}
