"""Activations times int4 weights with a scale for each group, on TPU: weights are read once and made float on the chip.

Where XLA falls short: to sum group by group it views [N, K] as [N, G, g], which lies in other tiles, and lays the
weight out anew in every step; by its own estimate that takes ten times what the matmul does. Here tiles stay.

The twin is `arrays._contract`, which takes and gives the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxllm import arrays
from jaxllm.arrays import QArray

LANES = 128  # columns of a weight that are taken at a time: a tile's, and a matmul unit's depth
WORD = 8  # int4 values in 32 bits
_GROUPS = (32, 64)  # besides multiples of LANES
_ROWS = 512  # of x at a time
_BLOCK = 1 << 21  # elements of x, and of w, that are on the chip at a time, twice
_N_BLOCKS = (512, 384, 256, LANES)  # rows of w
_K_BLOCK = 2048  # columns at a time, where groups allow it
_K_WHOLE = 16384  # columns that may be taken at once where they do not


def unfit(w: QArray) -> str:
    """Why the kernel does not take a weight of this shape; "" where it does.

    w: as one device holds it; shapes are enough. Two contracted axes, [.., heads, head_dim], are taken where a word
    holds eight heads, as XLA lays them out.
    """
    N, K = math.prod(w.shape[: -w.contracted]), math.prod(w.shape[-w.contracted :])
    group = K // w.groups
    if w.values.dtype != jnp.int4 or w.groups == 1:
        return f"{w.values.dtype} in {w.groups} group(s) is not group-wise int4"
    if K % w.groups or (group % LANES and group not in _GROUPS):
        return f"groups of {K / w.groups:g}; expected {', '.join(map(str, _GROUPS))} or a multiple of {LANES}"
    if N % LANES or K % LANES:
        return f"[{N}, {K}] is not a multiple of {LANES} both ways"
    if w.contracted > 2 or (w.contracted == 2 and (w.shape[-1] != LANES or w.shape[-2] % WORD)):
        return f"contracts {list(w.shape[-w.contracted :])}; expected one axis, or [multiple of {WORD}, {LANES}]"
    k_block = _k_block(K, group, w.contracted)
    if k_block > min(_K_WHOLE, LANES * group):
        return f"{K} columns are no multiple of {WORD} groups of {group}, and too many to take at once"
    return ""


def contract(contracted: int, x: jax.Array, w: QArray, out: DTypeLike) -> jax.Array:
    """[b..., K...] and [n..., K...] to float32 [b..., n...], on one device. Sums are accumulated in float32.

    out: what they are rounded to in the end, unless zero points are still to be taken out.

    Few rows are multiplied with the values, each group apart, and the sums scaled, as the twin does. Many are
    multiplied with scaled values, rounded to x's type. Raises ValueError for what `unfit` names.
    """
    if reason := unfit(w):
        raise ValueError(f"The int4 kernel does not take this weight: {reason}. arrays.einsum does.")
    batch, kept = x.shape[: x.ndim - contracted], w.shape[: len(w.shape) - contracted]
    x_MK, flat = x.reshape(math.prod(batch), -1), arrays.as_matrix(w)
    values = flat.values if contracted == 1 else w.values.reshape(flat.shape[0], *w.shape[-2:])
    scale_NG = flat.scale if flat.scale.dtype == jnp.bfloat16 else flat.scale.astype(jnp.float32)
    y_MN = _matmul(x_MK, values, scale_NG, jnp.dtype(out if w.zero_point is None else jnp.float32))
    if w.zero_point is not None:
        y_MN = arrays.shift(y_MN, x_MK, flat)
    return y_MN.astype(jnp.float32).reshape(*batch, *kept)


def _k_block(K: int, group: int, contracted: int) -> int:
    """Columns at a time: whole tiles of scales, and whole words."""
    if _by_row(K // group, group):
        return LANES * group
    unit = math.lcm(WORD * group, LANES * (WORD if contracted == 2 else 1))
    sizes = [size for size in range(unit, min(K, _K_BLOCK) + 1, unit) if K % size == 0]
    return sizes[-1] if sizes else K


def _by_row(groups: int, group: int) -> bool:
    """Whether scales are read as [N, G]. XLA lays them out so where that fills tiles, else as [G, N]."""
    return groups % LANES == 0 and group < LANES


@functools.partial(jax.jit, static_argnames="out")  # traced once for all layers
def _matmul(x_MK: jax.Array, values: jax.Array, scale_NG: jax.Array, out: jnp.dtype) -> jax.Array:
    """values: int4 [N, K], or [N, K / LANES, LANES]."""
    (M, K), (N, groups) = x_MK.shape, scale_NG.shape
    group = K // groups
    k_block = _k_block(K, group, values.ndim - 1)
    n_block = next(size for size in _N_BLOCKS if N % size == 0 and (size * k_block <= _BLOCK or size == LANES))
    most = min(_ROWS, 1 << (_BLOCK // k_block).bit_length() - 1)
    m_block = min(most, -(-M // 8) * 8)
    padded_MK = jnp.pad(x_MK, ((0, -M % m_block), (0, 0)))
    w_block = (n_block, k_block) if values.ndim == 2 else (n_block, k_block // LANES, LANES)
    few = m_block * max(1, LANES // group) <= LANES
    if by_row := _by_row(groups, group):
        scale, scale_spec = scale_NG, pl.BlockSpec((n_block, LANES), lambda m, n, k: (n, k))
    else:
        scale, scale_spec = scale_NG.T, pl.BlockSpec((k_block // group, n_block), lambda m, n, k: (k, n))
    y_MN = pl.pallas_call(
        functools.partial(_kernel, _sum_by_group if few else _sum_scaled, group, by_row),
        grid=(padded_MK.shape[0] // m_block, N // n_block, K // k_block),
        in_specs=[
            pl.BlockSpec((m_block, k_block), lambda m, n, k: (m, k)),
            pl.BlockSpec(w_block, lambda m, n, k: (n, k, 0)[: values.ndim]),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((m_block, n_block), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((padded_MK.shape[0], N), out),
        scratch_shapes=[pltpu.VMEM((m_block, n_block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            bytes_accessed=x_MK.nbytes * (N // n_block if k_block < K else 1)
            + (N * K // 2 + scale.nbytes) * (padded_MK.shape[0] // m_block),
            transcendentals=0,
        ),
        name="int4_matmul",
    )(padded_MK, values, scale)
    return y_MN[:M]


def _kernel(
    contract: Callable[..., jax.Array],
    group: int,
    by_row: bool,
    x_ref: Any,
    w_ref: Any,
    scale_ref: Any,
    y_ref: Any,
    sum_ref: Any,
) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    scale = scale_ref[...].astype(jnp.float32)
    sum_ref[...] += contract(group, x_ref, w_ref, scale.T if by_row else scale)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _sum_by_group(group: int, x_ref: Any, w_ref: Any, scale_GN: jax.Array) -> jax.Array:
    """Scales each group's sum. Groups of one tile share a matmul: x is repeated, with 0 in the others' columns."""
    (M, K), N, per_tile = x_ref.shape, scale_GN.shape[1], max(1, LANES // group)
    # Rows of scales can be loaded from a place that a loop gives where they are a whole tile's.
    columns = WORD * LANES if K % (WORD * LANES) == 0 and group <= LANES else K
    groups = columns // group

    def loop(scale_ref: Any) -> jax.Array:
        scale_ref[...] = scale_GN

        def add(step: jax.Array, total_MN: jax.Array) -> jax.Array:
            start = pl.multiple_of(step * columns, columns)
            scale_gN = scale_ref[pl.ds(pl.multiple_of(step * groups, groups), groups), :]
            for tile, values in enumerate(_tiles(w_ref, start, columns)):
                x = x_ref[:, pl.ds(start + tile * LANES, LANES)]
                if per_tile > 1:
                    of_group = lax.broadcasted_iota(jnp.int32, x.shape, 1) // group
                    alone = [jnp.where(of_group == i, x.astype(jnp.float32), 0.0) for i in range(per_tile)]
                    x = jnp.concatenate(alone).astype(x.dtype)
                y = _dot(x, _as_float(values, x.dtype))
                for i in range(per_tile):
                    g = tile * LANES // group + i
                    total_MN += y[i * M : (i + 1) * M] * scale_gN[g : g + 1]
            return total_MN

        return lax.fori_loop(0, K // columns, add, jnp.zeros((M, N), jnp.float32), unroll=2)

    return pl.run_scoped(loop, pltpu.VMEM(scale_GN.shape, jnp.float32))


def _sum_scaled(group: int, x_ref: Any, w_ref: Any, scale_GN: jax.Array) -> jax.Array:
    """Scales the values, rounds them to x's type and sums all groups at once."""
    groups, N = scale_GN.shape
    scale_NG = jnp.pad(scale_GN, ((0, LANES - groups), (0, 0))).T
    lane = lax.broadcasted_iota(jnp.int32, (N, LANES), 1)
    columns = _columns(w_ref)

    def add(step: jax.Array, total_MN: jax.Array) -> jax.Array:
        start = pl.multiple_of(step * columns, columns)
        scaled = []
        for tile, values in enumerate(_tiles(w_ref, start, columns)):
            of_group = (lane + (start + tile * LANES)) // group
            scale = jnp.take_along_axis(scale_NG, of_group, axis=1, mode="promise_in_bounds")
            scaled.append((_as_float(values, jnp.float32) * scale).astype(x_ref.dtype))
        return total_MN + _dot(x_ref[:, pl.ds(start, columns)], jnp.concatenate(scaled, axis=1))

    total_MN = jnp.zeros((x_ref.shape[0], N), jnp.float32)
    return lax.fori_loop(0, x_ref.shape[1] // columns, add, total_MN, unroll=2)


def _columns(w_ref: Any) -> int:
    """How many a loop's step takes."""
    if len(w_ref.shape) == 3:
        return WORD * LANES
    return next(size for size in (512, 256, LANES) if w_ref.shape[1] % size == 0)


def _tiles(w_ref: Any, start: jax.Array | int, columns: int) -> Iterator[jax.Array]:
    """The values [N, LANES] of one tile of columns after the other, as int4 or int32."""
    if len(w_ref.shape) == 2:
        for tile in range(columns // LANES):
            yield w_ref[:, pl.ds(start + tile * LANES, LANES)]
        return
    # A word has eight heads' values of the same row and lane. Loading every few words is what their layout is fast at.
    N, heads, _ = w_ref.shape
    words_ref = w_ref.bitcast(jnp.int32).reshape(N * heads // WORD, LANES)
    for word in range(columns // (WORD * LANES)):
        words = words_ref[pl.ds(start // (WORD * LANES) + word, N, heads // WORD), :]
        for i in range(WORD):
            yield (words << (28 - 4 * i)) >> 28  # sign-extended


def _as_float(values: jax.Array, dtype: DTypeLike) -> jax.Array:
    return values.astype(dtype) if values.dtype == jnp.int4 else values.astype(jnp.float32).astype(dtype)


def _dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
