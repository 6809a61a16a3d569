"""The leaf types of a model and the one contraction that knows them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

INT8_MAX = 127  # symmetric: -128 is unused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Symmetric int8 weight: w ≈ values * scale.

    values: int8 in [-127, 127], the float weight's shape. First field: Linen checks its shape.
    scale: float32 > 0, same rank, size 1 on contracted axes.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Weight = jax.Array | QArray


def quantize(w: jax.Array, contracted: int) -> QArray:
    """Rounds to the nearest of 255 levels, one scale for each output channel.

    w: float weight whose last `contracted` axes are summed over when it is applied.
    |w - dequantize(quantize(w))| <= scale / 2, and zeros stay zeros.
    """
    w = w.astype(jnp.float32)
    axes = tuple(range(w.ndim - contracted, w.ndim))
    absmax = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
    scale = jnp.where(absmax > 0, absmax / INT8_MAX, 1.0)
    return QArray(jnp.round(w / scale).astype(jnp.int8), scale)


def dequantize(w: Weight) -> jax.Array:
    """The float32 weight that a QArray stands for; a float weight as it is."""
    return w.values.astype(jnp.float32) * w.scale if isinstance(w, QArray) else w


def take(w: Weight, rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Looks up rows of an embedding [V, D]: [..., D] in `dtype`."""
    if isinstance(w, QArray):
        # Rows first: a dequantised table would be a float copy of the whole weight.
        return (w.values[rows].astype(jnp.float32) * w.scale[rows]).astype(dtype)
    return w[rows].astype(dtype)


def einsum(eqn: str, x: jax.Array, w: Weight | Tap, dtype: DTypeLike | None = None) -> jax.Array:
    """Contracts activations with a weight of any kind.

    eqn: "bK,nK->bn", where b, n and K are groups of axes: the weight's contracted axes K come last in both operands
        and its other axes n last in the result, so that no transpose is needed.
    dtype: of the result; x's by default. Sums are accumulated in float32.

    A QArray's scale multiplies the result, never the weight: the int8 values are what is read from memory.
    """
    if isinstance(w, Tap):
        y = einsum(eqn, x, w.weight, jnp.dtype(jnp.float32))
        w.record(x, y)
        return y.astype(dtype or x.dtype)
    contracted = num_contracted(eqn)
    if x.shape[x.ndim - contracted :] != w.shape[len(w.shape) - contracted :]:
        raise ValueError(f"einsum {eqn!r}: {x.shape} does not contract with {w.shape}.")
    y = lax.platform_dependent(
        x, w, cpu=functools.partial(_contract_cpu, contracted), default=functools.partial(_contract, contracted)
    )
    return y.astype(dtype or x.dtype)


def num_contracted(eqn: str) -> int:
    """How many of the weight's axes, the last ones, `eqn` sums over. Refuses every other form of equation."""
    operands, _, out = eqn.partition("->")
    x, _, w = operands.partition(",")
    kept = len(w)
    while kept and not out.endswith(w[:kept]):
        kept -= 1
    contracted = w[kept:]
    if not contracted or not x.endswith(contracted) or out != x.removesuffix(contracted) + w[:kept]:
        raise ValueError(f'einsum {eqn!r} is not of the form "bK,nK->bn".')
    return len(contracted)


def _contract(contracted: int, x: jax.Array, w: Weight) -> jax.Array:
    """[b..., K...] and [n..., K...] to float32 [b..., n...]. A TPU's matmul takes the int8 values as they are."""
    values = w.values.astype(x.dtype) if isinstance(w, QArray) else w
    axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(values.ndim - contracted, values.ndim))
    y = lax.dot_general(x, values, (axes, ((), ())), preferred_element_type=jnp.float32)
    if not isinstance(w, QArray):
        return y
    batch = x.ndim - contracted
    return y * w.scale.reshape((1,) * batch + w.shape[: len(w.shape) - contracted])


# XLA on CPU has fast kernels for float32 and, from two rows on, for bfloat16 and for int8 x int8. Everything else falls
# into a naive loop: one row of bfloat16, or int8 converted to float32, runs at less than a tenth of the speed.
# The forms below stay on the fast kernels.
_SPLIT_MAX_ROWS = 127  # from here on, float32 blocks are the faster form
_BLOCKS = 4


def _contract_cpu(contracted: int, x: jax.Array, w: Weight) -> jax.Array:
    kept = w.shape[: len(w.shape) - contracted]
    batch = x.shape[: x.ndim - contracted]
    x_MK = x.reshape(math.prod(batch), -1)
    if isinstance(w, QArray):
        w_NK = w.values.reshape(math.prod(kept), -1)
        contract = _split_dot if x_MK.shape[0] <= _SPLIT_MAX_ROWS else _blocked_dot
        y_MN = contract(x_MK.astype(jnp.float32), w_NK) * w.scale.reshape(1, -1)
    elif x.dtype != jnp.float32 and x_MK.shape[0] == 1:
        y_MN = _dot(jnp.concatenate([x_MK, x_MK]), w.reshape(math.prod(kept), -1))[:1]
    else:
        y_MN = _dot(x_MK, w.reshape(math.prod(kept), -1))
    return y_MN.reshape(*batch, *kept)


def _dot(x_MK: jax.Array, w_NK: jax.Array, out: type = jnp.float32) -> jax.Array:
    return lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _split_dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """float32 x times int8 w by two int8 rows for each row of x: x ≈ step * (high + low / 254).

    `low` is what rounding to `high` lost, so x keeps 16 bits (relative error 2e-5 of its largest element), and the
    weight is still read once: the kernel wants at least two rows anyway.
    """
    absmax_M1 = jnp.max(jnp.abs(x_MK), axis=1, keepdims=True)
    step_M1 = jnp.where(absmax_M1 > 0, absmax_M1 / INT8_MAX, 1.0)
    scaled_MK = x_MK / step_M1
    high_MK = jnp.round(scaled_MK)
    low_MK = jnp.round((scaled_MK - high_MK) * (2 * INT8_MAX))
    rows = jnp.concatenate([high_MK, low_MK]).astype(jnp.int8)
    high_MN, low_MN = jnp.split(_dot(rows, w_NK, jnp.int32).astype(jnp.float32), 2)
    return (high_MN + low_MN / (2 * INT8_MAX)) * step_M1


def _blocked_dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """float32 x times int8 w, a block of w's rows at a time, so that no float copy of the whole weight exists."""
    size = -(-w_NK.shape[0] // _BLOCKS)
    blocks = [w_NK[start : start + size] for start in range(0, w_NK.shape[0], size)]
    return jnp.concatenate([_dot(x_MK, block.astype(jnp.float32)) for block in blocks], axis=1)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A weight that shows whoever made it what it is applied to; see `calibrate`."""

    weight: jax.Array
    record: Callable[[jax.Array, jax.Array], None]  # called with x and the float32 result, while tracing


jax.tree_util.register_dataclass(Tap, data_fields=["weight"], meta_fields=["record"])
