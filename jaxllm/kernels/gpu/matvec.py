"""One row of activations times weights, on an NVIDIA GPU: norm, products and what is added, in one kernel.

Where XLA falls short: norm, products and sum are kernels that wait for each other, which in a small model takes as long
as the reading of its weights. And it makes each int8 value float for a single product, at 16 a cycle of a
multiprocessor, while memory could bring as many again. Here the row is rounded to 16 bits, x ≈ step * (256 high + low)
with high and low in int8 (relative error 2e-5 of its largest element), and one instruction sums four products.

A program has the row in registers, which it computed itself, and takes every so many-th tile of the weights.

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
from jaxllm.activations import Activations, Normed
from jaxllm.arrays import Prepared, QArray

_TILE = 8192  # bytes of a weight at a time, and how many warps take them
_WARPS = 4
_BLOCK = 2048  # columns, at most, that lie among the threads; a row's blocks are added up before the threads meet
_PROGRAMS = 1056  # eight for each multiprocessor of an H100
_WIDE = 4096  # columns beyond which a row takes so many registers that half as many programs fit
_MOST = 32768  # columns
_STEPS = 127 * 256 + 127  # of 16 bits whose high and low halves are both of -128 to 127
_ROUND = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the lowest bits


def refuses(w: Prepared) -> str:
    """Why the kernel does not take a weight; "" where it does. A shape is enough."""
    if not isinstance(w, QArray):
        half = not isinstance(w, arrays.Packed) and w.dtype in (jnp.bfloat16, jnp.float16)
        return "" if half else "not in half precision"
    if w.values.dtype != jnp.int8 or w.groups > 1 or w.zero_point is not None:
        return "not int8 with one scale a channel and no zero point"
    return "its activations are rounded to int8 once, which tensor cores take" if w.int8_inputs else ""


def contract(
    contracted: int, x: Activations, weights: Sequence[Prepared], add: jax.Array | None, out: DTypeLike
) -> list[jax.Array]:
    """Activations [b..., K...] times each of several weights [n..., K...], all fit: [b..., n...] of type `out`.

    add: is added to the result of a single weight.
    """
    if len({isinstance(w, QArray) for w in weights}) > 1:
        return [contract(contracted, x, [w], None, out)[0] for w in weights]
    given = activations.shape(x)
    batch = given[: len(given) - contracted]
    # Of more float columns XLA's sum of products is so much faster as the kernels that are saved here take.
    if math.prod(batch) != 1 or math.prod(given) > (_MOST if isinstance(weights[0], QArray) else _WIDE):
        value = activations.value(x)
        results = [arrays.contract_gpu(contracted, value, w, out).astype(out) for w in weights]
        return results if add is None else [add + y for y in results]
    if not isinstance(x, Normed):
        x = activations.value(x)  # of a gate: that each program computed it would take longer
    y = _contract(
        [part.reshape(-1) for part in jax.tree.leaves(x)],
        [_parts(contracted, w) for w in weights],
        None if add is None else add.reshape(-1),
        x.eps if isinstance(x, Normed) else 0.0,
        jnp.dtype(out),
    )
    return [y_N.reshape(*batch, *w.shape[: len(w.shape) - contracted]) for y_N, w in zip(y, weights, strict=True)]


def _parts(contracted: int, w: Prepared) -> list[jax.Array]:
    """A matrix [N, K] and, of int8, its scale [N]."""
    if isinstance(w, QArray):
        flat = arrays.as_matrix(w)
        return [flat.values, flat.scale.reshape(-1)]
    assert isinstance(w, jax.Array)
    return [w.reshape(-1, math.prod(w.shape[w.ndim - contracted :]))]


def _rows(weights: Sequence[Sequence[jax.Array]]) -> int:
    """Of a tile: a power of 2 that divides those of all weights."""
    K, itemsize = weights[0][0].shape[1], weights[0][0].dtype.itemsize
    fitting = max(1, _TILE // (pl.cdiv(K, _block(K)) * _block(K) * itemsize))
    return min(fitting, *(w[0].shape[0] & -w[0].shape[0] for w in weights))


def _block(K: int) -> int:
    return min(_BLOCK // (1 + (K > _WIDE)), pl.next_power_of_2(K))


@functools.partial(jax.jit, static_argnums=(3, 4))  # traced once for all layers
def _contract(
    x: Sequence[jax.Array],
    weights: Sequence[Sequence[jax.Array]],
    add_N: jax.Array | None,
    eps: float,
    out: jnp.dtype,
) -> list[jax.Array]:
    """x: [K], or what a norm is of and its weight."""
    K = weights[0][0].shape[1]
    tiles = [w[0].shape[0] // _rows(weights) for w in weights]
    return pl.pallas_call(
        functools.partial(_kernel, eps, _rows(weights), tiles),
        grid=(min(sum(tiles), _PROGRAMS // (1 + (K > _WIDE))),),
        out_shape=[jax.ShapeDtypeStruct(w[0].shape[:1], out) for w in weights],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="matvec",
    )(x, weights, add_N)


def _kernel(
    eps: float, rows: int, tiles: Sequence[int], x_refs: Any, weights: Any, add_ref: Any, *results: Any
) -> None:
    K, dtype = x_refs[0].shape[0], x_refs[0].dtype
    block = _block(K)
    # A block's columns, and which of them there are: None where all.
    columns = [(start + jnp.arange(block), None) for start in range(0, K - block + 1, block)]
    if K % block:
        last = K - K % block + jnp.arange(block)
        columns.append((last, last < K))

    def load(ref: Any) -> list[jax.Array]:
        return [plt.load(ref.at[at], mask=there, other=_nothing(there)) for at, there in columns]

    x = load(x_refs[0])
    if len(x_refs) == 2:
        x = [part.astype(jnp.float32) for part in x]
        inverse = lax.rsqrt(jnp.sum(_sum([part * part for part in x])) / K + eps)
        x = [(part * inverse).astype(dtype) * w for part, w in zip(x, load(x_refs[1]), strict=True)]
    rounded = len(weights[0]) == 2
    step = jnp.float32(1)
    if rounded:
        x, step = _round(x)
    x = [part[None] for part in x]  # from here on as a weight's columns lie among the threads

    def add_up(tile: jax.Array, w_refs: Any, y_ref: Any) -> None:
        here, at = pl.ds(tile * rows, rows), (tile * rows + jnp.arange(rows))[:, None]
        w = []
        for columns_here, there in columns:
            mask = None if there is None else jnp.broadcast_to(there[None], (rows, block))
            w.append(plt.load(w_refs[0].at[at, columns_here[None]], mask=mask, other=_nothing(mask)))
        if rounded:
            y_N = jnp.sum(_dot16(w, x), axis=1) * (step * w_refs[1][here].astype(jnp.float32))
        else:
            y_N = jnp.sum(_sum([_32(values) * _32(part) for values, part in zip(w, x, strict=True)]), axis=1)
        y_N = y_N.astype(y_ref.dtype)
        y_ref[here] = y_N if add_ref is None else add_ref[here] + y_N

    before = 0
    for w_refs, count, y_ref in zip(weights, tiles, results, strict=True):
        first, turns = _turns(pl.program_id(0), pl.num_programs(0), before, count)
        before += count

        def turn(i: jax.Array, _: None, w_refs: Any = w_refs, y_ref: Any = y_ref, first: Any = first) -> None:
            add_up(first + i * pl.num_programs(0), w_refs, y_ref)

        lax.fori_loop(0, turns, turn, None)


def _turns(program: Any, programs: Any, before: int, count: int) -> tuple[Any, Any]:
    """A program's first tile of a weight, and how many it takes; tiles of all weights are dealt out in turn.

    before: tiles of the weights before, of which there are `count` here.
    """
    first = lax.rem(program + before * (programs - 1), programs)
    return first, lax.div(count - first + programs - 1, programs)


def _round(x: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """16-bit integers, and what they are steps of: of NaN it is NaN, and so are all results."""
    x = [_32(part) for part in x]
    bits = [lax.bitcast_convert_type(jnp.abs(part), jnp.int32) for part in x]  # in the order of the magnitudes
    highest = lax.bitcast_convert_type(jnp.max(functools.reduce(jnp.maximum, bits)), jnp.float32)
    step = jnp.where(highest < 1e-30, 1.0, highest / _STEPS)
    return [lax.bitcast_convert_type(part * (1 / step) + _ROUND, jnp.int32).astype(jnp.int16) for part in x], step


def _dot16(w: Sequence[jax.Array], x: Sequence[jax.Array]) -> jax.Array:
    """Products of int8 and int16, which a thread's share of a row sums up to: float32, of the blocks' shape."""
    high = low = jnp.zeros(w[0].shape, jnp.int32)
    for values, part in zip(w, x, strict=True):
        upper = ((part.astype(jnp.int32) + 128) >> 8).astype(jnp.int8)
        high = dot4(values, jnp.broadcast_to(upper, values.shape), high)
        low = dot4(values, jnp.broadcast_to(part.astype(jnp.int8), values.shape), low)
    return _32(256 * high + low)  # at most 2**15 * 127 of each of 4 * 32 values


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


def _nothing(mask: jax.Array | None) -> int | None:
    return None if mask is None else 0


def _sum(parts: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
