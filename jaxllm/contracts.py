"""What a compiled program must keep to, and the traps of XLA that it must not have fallen into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from jaxllm import hlo, hlo_cost
from jaxllm.arrays import Packed, QArray
from jaxllm.params import Params, flatten

_FLOATS = ("f32", "bf16", "f16")
_SMALL = 1 << 20  # bytes; what is smaller costs nothing


@dataclasses.dataclass(frozen=True)
class Contract:
    """Of a decode step or a prefill chunk.

    temp_share: temporaries, as a share of the arguments. collectives: for each layer.
    """

    temp_share: float = 0.02
    collectives: float = 2


@dataclasses.dataclass(frozen=True)
class Breach:
    """rule: which; found: what breaks it; fix: what usually does away with it."""

    rule: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}. {self.fix}"


def check(compiled: Any, params: Params, state: Any, layers: int, contract: Contract) -> list[Breach]:
    """What a compiled program breaks; empty when it keeps to all.

    params: its weights, of arrays or shapes with shardings, as it was compiled for. state: likewise, what it is to
        update in place. layers: of the model.
    """
    module = hlo.parse(compiled.as_text())
    weights = [_Leaf(path, leaf) for path, leaf in flatten(params).items()]
    memory = compiled.memory_analysis()
    found = [*_weights(module, weights), *_copies(module, weights, state), *_vector_matmul(module, weights)]
    kept = sum(_nbytes(leaf) for leaf in jax.tree.leaves(state))
    if memory.alias_size_in_bytes < kept:
        found.append(
            Breach(
                "the cache is updated in place",
                f"{memory.alias_size_in_bytes / 1e6:.1f} MB of {kept / 1e6:.1f} MB are aliased",
                "Donate the state, and give results the shardings and layouts of the arguments.",
            )
        )
    temp, arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    if temp > contract.temp_share * arguments:
        found.append(
            Breach(
                f"temporaries are at most {contract.temp_share:.0%} of the arguments",
                f"{temp / 1e6:.1f} MB of {arguments / 1e6:.1f} MB",
                "Look for a copy of a weight or of the cache; of prefill, take smaller chunks.",
            )
        )
    count = sum("layer_" in i.source and bool(hlo_cost.collective(module, i)) for _, i in module.executed())
    if count > contract.collectives * layers:
        found.append(
            Breach(
                f"a layer has at most {contract.collectives} collectives",
                f"{count} in {layers} layers",
                "Constrain the residual stream's sharding, and that of the keys and values that are written.",
            )
        )
    return found


class _Leaf:
    """A weight as one device holds it."""

    def __init__(self, path: str, leaf: Any):
        self.path, self.quantised = path, isinstance(leaf, QArray | Packed)
        values = leaf.values if isinstance(leaf, QArray | Packed) else leaf
        self.dims = _dims(values)
        self.extent = tuple(sorted(size for size in self.dims if size > 1))
        self.nbytes = math.prod(self.dims) * values.dtype.itemsize


def _dims(leaf: Any) -> tuple[int, ...]:
    """On one device."""
    sharding = getattr(leaf, "sharding", None)
    return tuple(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def _nbytes(leaf: Any) -> int:
    return math.prod(_dims(leaf)) * leaf.dtype.itemsize


def _weights(module: hlo.Module, weights: list[_Leaf]) -> Iterator[Breach]:
    """Quantised weights are read as they are stored: no float value of their extent is in memory."""
    extents: dict[tuple[int, ...], str] = {w.extent: w.path for w in weights if w.quantised and len(w.extent) > 1}
    for _, i in module.executed():
        if i.op in ("parameter", "get-tuple-element", "tuple", "bitcast"):
            continue
        for shape in i.shapes:
            extent = tuple(sorted(size for size in shape.dims if size > 1))
            if shape.space == 0 and shape.dtype in _FLOATS and extent in extents and shape.nbytes >= _SMALL:
                yield Breach(
                    "quantised weights have no float copy",
                    f"{i.name} is {shape.dtype}{list(shape.dims)}, the extent of {extents[extent]}",
                    "Multiply scales after the matmul, on partial sums for groups.",
                )


def _copies(module: hlo.Module, weights: list[_Leaf], state: Any) -> Iterator[Breach]:
    """Nothing as large as a weight or a layer's cache is only moved, or laid out anew."""
    sizes = {math.prod(w.dims) for w in weights if w.nbytes >= _SMALL}
    sizes |= {math.prod(_dims(leaf)) for leaf in jax.tree.leaves(state) if _nbytes(leaf) >= _SMALL}
    for name, i in module.executed():
        shape = i.shapes[0] if i.shapes else None
        if shape is None or shape.space or shape.size not in sizes or shape.nbytes < _SMALL:
            continue
        if hlo_cost.moves_only(module, i):
            yield Breach(
                "weights and cache are not copied",
                f"{i.name} in {name} writes {shape.dtype}{list(shape.dims)} ({i.source or 'made by the compiler'})",
                "Keep reshapes of a matmul's result apart from its weight; lay the cache out as it is read.",
            )


def _vector_matmul(module: hlo.Module, weights: list[_Leaf]) -> Iterator[Breach]:
    """Matmuls run on the matmul units."""
    low, _ = hlo_cost.cost(module)
    least = sum(math.prod(w.dims) for w in weights if len(w.extent) > 1 and not w.path.startswith("embed"))
    if low.flops < least:
        yield Breach(
            "matmuls run on the matmul units",
            f"{low.flops / 1e9:.2f} GFLOP of at least {2 * least / 1e9:.2f} are matmuls",
            "With one row XLA multiplies and adds on the vector unit: pad the batch to 8 rows.",
        )
