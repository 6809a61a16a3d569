"""Which weights the TPU's kernels contract, and how when a mesh splits them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxllm import activations
from jaxllm.activations import Activations
from jaxllm.arrays import Contract, Kernel, QArray
from jaxllm.kernels.tpu import int4_matmul
from jaxllm.params import Params, flatten

_log = logging.getLogger("jaxllm.kernels")


def choose(params: Params, batch: Sequence[str] = ()) -> dict[str, Kernel]:
    """As `jaxllm.kernels.choose`."""
    chosen: dict[str, Kernel] = {}
    reasons: dict[str, str] = {}
    for path, w in flatten(params).items():
        if not isinstance(w, QArray) or w.values.dtype != "int4":
            continue
        split = _Split.of(w, batch) if isinstance(w.values.sharding, NamedSharding) else None
        reason = int4_matmul.unfit(w) if split is None else split.unfit(w)
        if reason:
            reasons[path] = reason
        else:
            chosen[path] = functools.partial(_each, int4_matmul.contract if split is None else split.contract)
    if chosen or reasons:
        example = "".join(f" ({path}: {reason})" for path, reason in [*reasons.items()][:1])
        _log.info("int4 weights: the TPU kernel contracts %d, XLA %d%s", len(chosen), len(reasons), example)
    return chosen


def _each(
    contract: Contract,
    contracted: int,
    x: Activations,
    weights: Sequence[Any],
    add: jax.Array | None,
    out: DTypeLike,
) -> list[jax.Array]:
    value = activations.value(x)
    results = [contract(contracted, value, w, out).astype(out) for w in weights]
    return results if add is None else [add + y for y in results]


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a mesh splits a weight and what it is applied to.

    kept, contracted: of each of the weight's axes, the mesh axes that split it. batch: those of x's first axis.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    kept: tuple[tuple[str, ...], ...]
    contracted: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, w: QArray, batch: Sequence[str]) -> _Split:
        def axes(part: jax.Array) -> tuple[tuple[str, ...], ...]:
            sharding: Any = part.sharding
            spec = (*sharding.spec, *(None,) * (part.ndim - len(sharding.spec)))
            names = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
            return tuple(tuple(n for n in entry if n not in batch and sharding.mesh.shape[n] > 1) for entry in names)

        sharding: Any = w.values.sharding
        values, kept = axes(w.values), w.values.ndim - w.contracted
        return cls(sharding.mesh, tuple(batch), values[:kept], values[kept:], axes(w.scale)[-1])

    def unfit(self, w: QArray) -> str:
        """Why the kernel cannot take a device's part of `w`; "" where it can."""
        if self.groups != self.contracted[0] or any(self.contracted[1:]):
            return "groups are not split as the contracted axes are"

        def local(part: jax.Array | None, spec: P) -> Any:
            if part is None:
                return None
            return jax.ShapeDtypeStruct(NamedSharding(self.mesh, spec).shard_shape(part.shape), part.dtype)

        spec = self._spec(w)
        return int4_matmul.unfit(
            dataclasses.replace(w, values=local(w.values, spec.values), scale=local(w.scale, spec.scale))
        )

    def _spec(self, w: QArray) -> Any:
        """A PartitionSpec for each part of `w`."""
        scale = P(*self.kept, self.groups)
        return dataclasses.replace(
            w,
            values=P(*self.kept, *self.contracted),
            scale=scale,
            zero_point=None if w.zero_point is None else scale,
        )

    def contract(self, contracted: int, x: jax.Array, w: QArray, out: DTypeLike) -> jax.Array:
        """As `int4_matmul.contract`, each device its part. What devices add up among themselves is in `out`."""
        between = x.ndim - contracted - 1

        def each(x: jax.Array, w: QArray) -> jax.Array:
            y = int4_matmul.contract(contracted, x, w, out)
            return lax.psum(y.astype(out), self.contracted[0]).astype(y.dtype) if self.contracted[0] else y

        return jax.shard_map(
            each,
            mesh=self.mesh,
            in_specs=(P(self.batch, *(None,) * between, *self.contracted), self._spec(w)),
            out_specs=P(self.batch, *(None,) * between, *self.kept),
            check_vma=False,
        )(x, w)
