"""Optimal brain surgeon, a column at a time: what a weight loses in one input, its other inputs make up for.

One solver for GPTQ (Frantar et al. 2023: columns are rounded to a grid) and SparseGPT (Frantar & Alistarh 2023: some of
each column become zero). With H the mean of x xᵀ over the calibration text and U the upper Cholesky factor of H⁻¹, a
column that changes from w to q adds to each later column j the part -(w - q) / U[i, i] * U[i, j].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm import formats
from jaxllm.arrays import QArray
from jaxllm.formats import Format
from jaxllm.transforms.mask import Pattern, choose, least_of_group

DAMPING = 0.01  # of the mean of H's diagonal, added to it
_BLOCK = 128  # columns that are corrected at once


@jax.jit
def inverse_factor(hessian_KK: jax.Array) -> jax.Array:
    """The upper triangular U with Uᵀ U = H⁻¹, of the damped H. Inputs that are always zero get a diagonal of one."""
    diagonal = jnp.diagonal(hessian_KK)
    dead = diagonal == 0
    damped = hessian_KK + jnp.diag(jnp.where(dead, 1.0, 0.0) + DAMPING * jnp.mean(diagonal))
    # With J the reversal of order: J H J = L Lᵀ gives H⁻¹ = Uᵀ U for U = J L⁻¹ J, without forming the inverse.
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    identity = jnp.eye(lower.shape[0], dtype=lower.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1]


@jax.jit
def loudest_first(hessian_KK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of inputs by falling mean square, and `inverse_factor` in that order.

    What is settled last has the fewest columns left to be made up for by, so it should matter least.
    """
    order_K = jnp.argsort(-jnp.diagonal(hessian_KK))
    return order_K, inverse_factor(hessian_KK[order_K][:, order_K])


def require_finite(factor_KK: jax.Array, what: str) -> None:
    """Raises ValueError when a Hessian could not be inverted: what came of it would be numbers without meaning."""
    if not bool(jnp.all(jnp.isfinite(jnp.diagonal(factor_KK)))):
        raise ValueError(f"{what}: its inputs on the calibration text are not finite, or too large to be inverted.")


@functools.partial(jax.jit, static_argnums=(3, 4))
def quantize(
    w: jax.Array,
    order_K: jax.Array,
    factor_KK: jax.Array,
    contracted: int,
    fmt: Format,
    shrink: jax.Array | float = 1.0,
) -> QArray:
    """GPTQ on the grids of rounding to nearest.

    w: float, its last `contracted` axes the inputs. order_K, factor_KK: the order in which columns are settled, and
    `inverse_factor` of the Hessian in that order. shrink: see `formats.quantize`. Zeros stay zeros.
    """
    w_nGg = formats.as_groups(w, fmt, contracted)
    scale, zero_point = formats.grid(w_nGg, fmt, shrink)
    w_KN = _columns(w, contracted)[order_K]
    K, N = w_KN.shape
    group_K = jnp.pad(order_K // w_nGg.shape[-1], (0, _BLOCK))
    grids_GN = jax.tree.map(lambda part: part.reshape(N, -1).T, (scale, zero_point))

    def begin(block_CN: jax.Array, zeros_CN: jax.Array, start: jax.Array) -> tuple[()]:
        return ()

    def settle(i: jax.Array, block_CN: jax.Array, zeros_CN: jax.Array, start: jax.Array, state: tuple[()]) -> Any:
        scale_N, zero_N = jax.tree.map(lambda part: _row(part, group_K[start + i]), grids_GN)
        values_N = formats.round_to(_row(block_CN, i)[:, None], fmt, scale_N, zero_N)[:, 0]
        shift_N = jnp.zeros_like(values_N) if zero_N is None else zero_N.astype(jnp.float32)
        values_N = jnp.where(_row(zeros_CN, i), shift_N, values_N)
        return values_N, (values_N - shift_N) * scale_N.astype(jnp.float32), state

    values_KN = _solve(w_KN, factor_KK, min(_BLOCK, K), begin, settle)
    values_KN = jnp.zeros_like(values_KN).at[order_K].set(values_KN)
    values = values_KN.T.reshape(w.shape).astype(fmt.values)
    return QArray(values, scale, zero_point, int8_inputs=fmt.inputs != "float")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def prune(w: jax.Array, factor_KK: jax.Array, contracted: int, pattern: Pattern, sparsity: float) -> jax.Array:
    """SparseGPT. What goes is chosen by w² / U[i, i]² when its block of columns (for N:M: its group) is reached.

    Exactly floor(sparsity * size) weights, or as many blocks, become zero; zeros that were there are among them.
    """
    w_KN = _columns(w, contracted)
    K, N = w_KN.shape
    row, column = pattern.block
    unit = pattern.of or column
    size = max(1, min(_BLOCK, K) // unit) * unit
    blocks = -(-K // size)
    # How many go up to the end of each block of columns, and so in it.
    upto = [int(sparsity * (min(b * size, K) * N // (row * column))) for b in range(blocks + 1)]
    counts = jnp.asarray([end - start for start, end in itertools.pairwise(upto)], jnp.int32)
    diagonal_K = jnp.pad(jnp.diagonal(factor_KK), (0, blocks * size - K), constant_values=1.0)

    def score(now_MN: jax.Array, zeros_MN: jax.Array, start: jax.Array) -> jax.Array:
        d_M1 = lax.dynamic_slice_in_dim(diagonal_K, start, now_MN.shape[0])[:, None]
        real_M1 = (start + jnp.arange(now_MN.shape[0]) < K)[:, None]
        return jnp.where(real_M1, jnp.where(zeros_MN, 0.0, jnp.square(now_MN / d_M1)), jnp.inf)

    def begin(block_CN: jax.Array, zeros_CN: jax.Array, start: jax.Array) -> jax.Array:
        """bool [C, N]: what goes; groups of N:M decide when they are reached."""
        if pattern.of:
            return jnp.zeros(block_CN.shape, bool)
        return choose(score(block_CN, zeros_CN, start).T, pattern, counts[start // size]).T

    def settle(i: jax.Array, block_CN: jax.Array, zeros_CN: jax.Array, start: jax.Array, gone_CN: jax.Array) -> Any:
        if pattern.of:

            def decide() -> jax.Array:
                now, zeros = (lax.dynamic_slice_in_dim(part, i, pattern.of) for part in (block_CN, zeros_CN))
                gone_NM = least_of_group(score(now, zeros, start + i).T, pattern.of - pattern.keep, pattern.of)
                return lax.dynamic_update_slice_in_dim(gone_CN, gone_NM.T, i, axis=0)

            gone_CN = lax.cond(i % pattern.of == 0, decide, lambda: gone_CN)
        kept_N = jnp.where(_row(gone_CN, i) | _row(zeros_CN, i), 0.0, _row(block_CN, i))
        return kept_N, kept_N, gone_CN

    kept_KN = _solve(w_KN, factor_KK, size, begin, settle)
    return kept_KN.T.reshape(w.shape).astype(w.dtype)


def _solve(
    w_KN: jax.Array, factor_KK: jax.Array, size: int, begin: Callable[..., Any], settle: Callable[..., Any]
) -> jax.Array:
    """Settles the columns of a weight in order, blocks of `size` at a time. [K, N]: an input's weights lie together.

    begin(block_CN, zeros_CN, start) -> state, when a block is reached. zeros_CN: where the weight was zero at first.
    settle(i, block_CN, zeros_CN, start, state) -> (out_N, kept_N, state): for the block's i-th column what is put out
        for it, and the value that it has from now on.
    Returns out [K, N].
    """
    K, N = w_KN.shape
    blocks = -(-K // size)
    padding = (0, blocks * size - K)
    zeros_KN = jnp.pad(w_KN == 0, (padding, (0, 0)))
    w_KN = jnp.pad(w_KN, (padding, (0, 0)))
    factor_KK = jnp.pad(factor_KK, (padding, padding)) + jnp.diag((jnp.arange(blocks * size) >= K).astype(jnp.float32))

    def block(w_KN: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_CK = lax.dynamic_slice_in_dim(factor_KK, start, size)
        u_CC = lax.dynamic_slice_in_dim(rows_CK, start, size, axis=1)
        block_CN, zeros_CN = (lax.dynamic_slice_in_dim(part, start, size) for part in (w_KN, zeros_KN))

        def column(i: jax.Array, carry: Any) -> Any:
            block_CN, out_CN, error_CN, state = carry
            out_N, kept_N, state = settle(i, block_CN, zeros_CN, start, state)
            u_C = _row(u_CC, i)
            error_N = (_row(block_CN, i) - kept_N) / u_C[i]
            block_CN = block_CN - u_C[:, None] * error_N[None]
            out_CN = lax.dynamic_update_index_in_dim(out_CN, out_N, i, 0)
            return block_CN, out_CN, lax.dynamic_update_index_in_dim(error_CN, error_N, i, 0), state

        empty = jnp.zeros((size, N), jnp.float32)
        _, out_CN, error_CN, _ = lax.fori_loop(
            0, size, column, (block_CN, empty, empty, begin(block_CN, zeros_CN, start))
        )
        later_K = jnp.arange(blocks * size) >= start + size
        change = jnp.matmul(jnp.where(later_K[None], rows_CK, 0.0).T, error_CN, precision=lax.Precision.HIGHEST)
        return w_KN - change, out_CN

    _, out_bCN = lax.scan(block, w_KN, jnp.arange(blocks, dtype=jnp.int32) * size)
    return out_bCN.reshape(-1, N)[:K]


def _row(part_CN: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(part_CN, i, keepdims=False)


def _columns(w: jax.Array, contracted: int) -> jax.Array:
    """float32 [K, N]."""
    return w.astype(jnp.float32).reshape(math.prod(w.shape[: w.ndim - contracted]), -1).T
