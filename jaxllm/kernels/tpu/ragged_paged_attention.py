"""Attention over a paged KV cache, rows of any lengths side by side: prefill chunks and decode steps in one call.

On TPU it is jax's own kernel, jax.experimental.pallas.ops.tpu.ragged_paged_attention; elsewhere, and for shapes that it
does not take, its twin in plain XLA. Both are for one device: on a mesh, call it in a shard_map over KV heads.

Letters besides the usual: R rows, T tokens of all rows in this call, P pages, S slots of a page, X pages that a row may
have, C = 2K keys and values in turn.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as jax_kernel

_log = logging.getLogger(__name__)

_QUERIES = 32  # tokens of a block
_BUFFER_BYTES = 4 << 20  # of the two blocks of pages that are on the chip


def interleave(k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
    """Keys and values as they lie in a page's slots: [T, C, H]."""
    T, K, H = k_TKH.shape
    return jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, 2 * K, H)


def ragged_paged_attention(
    q_TNH: jax.Array,
    pages_PSCH: jax.Array,
    lens_R: jax.Array,
    table_RX: jax.Array,
    starts_R1: jax.Array,
    rows: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention of each token over its row's pages: [T, N, H], in q's type. Softmax in float32.

    q_TNH: the rows' tokens, one row after the other. pages_PSCH: as of `interleave`, this call's own keys and values
        written already. bfloat16 or float32; int8 or float8_e4m3fn with scales.
    lens_R: int32, slots of each row that are written: its last token sees so many. table_RX: int32, its pages in order;
        what lies behind the last must still be a page's number.
    starts_R1: int32 [R + 1], where each row's tokens begin in T, and the end. A row may have none.
    rows: int32 [], how many of the R rows are in use, the first ones. Tokens that are no row's give 0.
    window: how many positions back a query looks, itself included; None for all. soft_cap: c in c * tanh(scores / c).
    k_scale, v_scale: what a stored key or value of 1 stands for.
    """
    reason = unfit(q_TNH, pages_PSCH)
    _say(reason)
    how = {"window": window, "soft_cap": soft_cap, "k_scale": k_scale, "v_scale": v_scale}
    twin = functools.partial(plain, **how)
    kernels = {} if reason else {"tpu": functools.partial(_kernel, **how)}
    return lax.platform_dependent(q_TNH, pages_PSCH, lens_R, table_RX, starts_R1, rows, default=twin, **kernels)


def unfit(q_TNH: jax.Array, pages_PSCH: jax.Array) -> str:
    """Why the kernel does not take these shapes; "" where it does."""
    C, H = pages_PSCH.shape[2:]
    words, rest = divmod(C * jnp.dtype(pages_PSCH.dtype).itemsize, 4)
    if H % 128:
        return f"head_dim {H} is not a multiple of 128"
    if rest or (words not in (1, 2, 4, 8) and words % 8):
        return f"{C // 2} KV heads in {pages_PSCH.dtype} do not fill tiles"
    return ""


@functools.cache
def _say(reason: str) -> None:
    which = f"plain XLA: {reason}" if reason else "on TPU jax's kernel, elsewhere plain XLA"
    _log.info("ragged paged attention: %s", which)


def _kernel(
    q_TNH: jax.Array,
    pages_PSCH: jax.Array,
    lens_R: jax.Array,
    table_RX: jax.Array,
    starts_R1: jax.Array,
    rows: jax.Array,
    *,
    window: int | None,
    soft_cap: float | None,
    k_scale: float | None,
    v_scale: float | None,
) -> jax.Array:
    # Block sizes are given: the kernel's own table asks the devices at hand, which may not be those compiled for.
    page_bytes = 2 * pages_PSCH.nbytes // pages_PSCH.shape[0]
    y_TNH = jax_kernel.ragged_paged_attention(
        q_TNH,
        pages_PSCH,
        jnp.maximum(lens_R, 1),  # of a row without slots it would wait for a page for ever
        table_RX,
        starts_R1,
        rows.reshape(1),
        sm_scale=q_TNH.shape[2] ** -0.5,
        sliding_window=window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        num_kv_pages_per_block=max(1, min(table_RX.shape[1], _BUFFER_BYTES // page_bytes)),
        num_queries_per_block=min(_QUERIES, q_TNH.shape[0]),
    )
    return jnp.where((jnp.arange(q_TNH.shape[0]) < starts_R1[rows])[:, None, None], y_TNH, 0)


def plain(
    q_TNH: jax.Array,
    pages_PSCH: jax.Array,
    lens_R: jax.Array,
    table_RX: jax.Array,
    starts_R1: jax.Array,
    rows: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> jax.Array:
    """The twin: each token looks up its row's pages."""
    T, N, H = q_TNH.shape
    K = pages_PSCH.shape[2] // 2
    tokens_T = jnp.arange(T)
    rows_T = jnp.clip(jnp.searchsorted(starts_R1, tokens_T, side="right") - 1, 0, rows - 1)
    position_T = lens_R[rows_T] - starts_R1[rows_T + 1] + tokens_T

    def one(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_NH, row, position = token
        cache_LKcH = pages_PSCH[table_RX[row]].reshape(-1, K, 2, H)
        k_LKH, v_LKH = (
            part if scale is None else (part.astype(jnp.float32) * scale).astype(q_NH.dtype)
            for part, scale in ((cache_LKcH[:, :, 0], k_scale), (cache_LKcH[:, :, 1], v_scale))
        )
        scores_KGL = jnp.einsum(
            "KGH,LKH->KGL", q_NH.reshape(K, N // K, H), k_LKH, preferred_element_type=jnp.float32
        ) * (H**-0.5)
        if soft_cap is not None:
            scores_KGL = soft_cap * jnp.tanh(scores_KGL / soft_cap)
        slots_L = jnp.arange(k_LKH.shape[0])
        seen_L = slots_L <= position
        if window is not None:
            seen_L &= slots_L > position - window
        weights_KGL = jax.nn.softmax(jnp.where(seen_L[None, None], scores_KGL, -jnp.inf), axis=-1)
        v_LKH = jnp.where(seen_L[:, None, None], v_LKH, 0)  # slots not written may hold anything
        y_KGH = jnp.einsum("KGL,LKH->KGH", weights_KGL, v_LKH.astype(jnp.float32))
        return y_KGH.reshape(N, H).astype(q_NH.dtype)

    y_TNH = lax.map(one, (q_TNH, rows_T, jnp.maximum(position_T, 0)))
    return jnp.where((tokens_T < starts_R1[rows])[:, None, None], y_TNH, 0)
