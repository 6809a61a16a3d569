"""One row of activations times int8 weights with a scale for each output channel, on an NVIDIA GPU.

Where XLA falls short: it makes every value float for a single multiplication, at 16 values a cycle of a multiprocessor,
while memory could bring as many again. Here the row is rounded to int8 twice, x ≈ step * (high + low / 254), which
keeps 16 bits of it (relative error 2e-5 of its largest element), and one instruction multiplies and sums four values.

The twin is `arrays.contract_gpu`, which also contracts more rows than one: tensor cores are as fast then.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from jaxllm import activations, arrays
from jaxllm.activations import Activations, Gated, Normed
from jaxllm.arrays import INT8_MAX, Prepared, QArray

_COLUMNS = 1024  # of a weight at a time, at most
_TILE, _WARPS = 4096, 4  # values at a time, and what takes them
_ROW = 4096  # of activations at a time, at most
_LEAST, _MOST = 64, 32  # columns at a time; how often, as the code of each is written out


def unfit(w: QArray) -> str:
    """Why the kernel does not take a weight; "" where it does. Shapes are enough."""
    N, K = math.prod(w.shape[: -w.contracted]), math.prod(w.shape[-w.contracted :])
    if w.values.dtype != jnp.int8 or w.groups > 1 or w.zero_point is not None:
        return "not int8 with one scale a channel and no zero point"
    if w.int8_inputs:
        return "its activations are rounded to int8 once, which tensor cores take"
    columns = _part(K, _COLUMNS)
    if columns < _LEAST or K // columns > _MOST or N % _rows(K):
        return f"[{N}, {K}] has no tiles of {_TILE} values"
    return ""


def _part(K: int, most: int) -> int:
    """The columns at a time: a power of 2 that divides them all."""
    return min(most, K & -K)


def _rows(K: int) -> int:
    """Of a weight that a program takes."""
    return _TILE // _part(K, _COLUMNS)


def contract(
    contracted: int, x: Activations, weights: Sequence[Prepared], add: jax.Array | None, out: DTypeLike
) -> list[jax.Array]:
    """Activations [b..., K...] times each of several weights [n..., K...], all fit: [b..., n...] of type `out`.

    add: is added to the result of a single weight.
    """
    given = activations.shape(x)
    batch = given[: len(given) - contracted]
    if math.prod(batch) != 1:
        value = activations.value(x)
        results = [arrays.contract_gpu(contracted, value, w, out).astype(out) for w in weights]
        return results if add is None else [add + y for y in results]
    flat = [arrays.as_matrix(w) for w in weights if isinstance(w, QArray)]
    y = _matvec(
        _round(jax.tree.map(jnp.ravel, x)),
        [(w.values, w.scale.reshape(-1)) for w in flat],
        None if add is None else add.reshape(-1),
        jnp.dtype(out),
    )
    return [y_N.reshape(*batch, *w.shape[: len(w.shape) - contracted]) for y_N, w in zip(y, weights, strict=True)]


Rounded = tuple[jax.Array, jax.Array, jax.Array]  # high and low [K] int8, step [1] float32


def _round(x: Activations) -> Rounded:
    (K,) = activations.shape(x)
    values = jax.ShapeDtypeStruct((K,), jnp.int8)
    return pl.pallas_call(
        functools.partial(_round_kernel, type(x), x.eps if isinstance(x, Normed) else 0.0),
        out_shape=(values, values, jax.ShapeDtypeStruct((1,), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=1 << max(0, min(5, (K // 256).bit_length() - 1)), num_stages=1),
        name="round_int8",
    )(*jax.tree.leaves(x))


def _round_kernel(kind: type, eps: float, *refs: Any) -> None:
    """All of the row stays in registers: the step is known only when all has been seen."""
    *x_refs, high_ref, low_ref, step_ref = refs
    K, dtype = high_ref.shape[0], x_refs[0].dtype
    parts = [pl.ds(start, _part(K, _ROW)) for start in range(0, K, _part(K, _ROW))]
    x = [x_refs[0][part].astype(jnp.float32) for part in parts]
    if kind is Normed:
        inverse = lax.rsqrt(sum(jnp.sum(values * values) for values in x) / K + eps)
        x = [values * inverse for values in x]
    elif kind is Gated:
        x = [values / (1 + jnp.exp(-values)) for values in x]
    if kind in (Normed, Gated):
        x = [values.astype(dtype) * x_refs[1][part] for values, part in zip(x, parts, strict=True)]
    x = [values.astype(jnp.float32) for values in x]
    highest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(values)) for values in x))
    step = jnp.where(highest == 0, 1.0, highest / INT8_MAX)  # of NaN it is NaN, and so are all results
    for values, part in zip(x, parts, strict=True):
        scaled = values * (1 / step)
        high = jnp.floor(scaled + 0.5)
        high_ref[part] = high.astype(jnp.int8)
        low_ref[part] = jnp.floor((scaled - high) * (2 * INT8_MAX) + 0.5).astype(jnp.int8)
    step_ref[0] = step


def _matvec(
    x: Rounded, weights: Sequence[tuple[jax.Array, jax.Array]], add_N: jax.Array | None, out: jnp.dtype
) -> list[jax.Array]:
    """weights: values [N, K] and scale [N] of each."""
    programs = [values.shape[0] // _rows(values.shape[1]) for values, _ in weights]
    return pl.pallas_call(
        functools.partial(_matvec_kernel, programs, add_N is not None),
        grid=(sum(programs),),
        out_shape=[jax.ShapeDtypeStruct(scale.shape, out) for _, scale in weights],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="int8_matvec",
    )(*x, *(part for w in weights for part in w), *(() if add_N is None else (add_N,)))


def _matvec_kernel(programs: Sequence[int], adds: bool, high_ref: Any, low_ref: Any, step_ref: Any, *refs: Any) -> None:
    """Some rows of one of the weights."""
    weights, add_ref, results = refs[: 2 * len(programs)], refs[2 * len(programs)], refs[-len(programs) :]
    first = 0
    for i, count in enumerate(programs):
        program = pl.program_id(0) - first
        first += count

        @pl.when((program >= 0) & (program < count))
        def _(program=program, values_ref=weights[2 * i], scale_ref=weights[2 * i + 1], y_ref=results[i]):
            K = values_ref.shape[1]
            shape = _rows(K), _part(K, _COLUMNS)
            rows = pl.ds(program * shape[0], shape[0])
            high = low = jnp.zeros(shape, jnp.int32)
            for start in range(0, K, shape[1]):
                columns = pl.ds(start, shape[1])
                w = values_ref[rows, columns]
                high = dot4(w, jnp.broadcast_to(high_ref[columns][None], shape), high)
                low = dot4(w, jnp.broadcast_to(low_ref[columns][None], shape), low)
            high_N, low_N = (jnp.sum(part, axis=1).astype(jnp.float32) for part in (high, low))
            scale_N = step_ref[0] * scale_ref[rows].astype(jnp.float32)
            y_N = ((high_N + low_N / (2 * INT8_MAX)) * scale_N).astype(y_ref.dtype)
            y_ref[rows] = add_ref[rows] + y_N if adds else y_N


_DOT4 = """{
    dp4a.s32.s32 $0, $4, $5, $6;
    mov.b32 $1, $7;
    mov.b32 $2, $8;
    mov.b32 $3, $9;
}"""


def dot4(w: jax.Array, x: jax.Array, total: jax.Array) -> jax.Array:
    """int8 and int8 added to int32, all of one shape: the sum of four products to the first of four elements.

    What others of the four hold stays, so that all elements together are what a sum of products would make them.
    """
    (y,) = plt.elementwise_inline_asm(
        _DOT4,
        args=[w, x, total],
        constraints="=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
    )
    return y
