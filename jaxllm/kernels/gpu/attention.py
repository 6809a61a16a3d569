"""A decode step's attention on an NVIDIA GPU: rotary embedding, the write into the cache and the reading of it.

Where XLA falls short: it takes nine kernels for these, each of which waits for the one before, and reads the slots of
the whole cache. Here each KV head's slots are split among programs, as many as fill the GPU, which read what a row has;
a second kernel joins their softmaxes (Dao et al. 2023, "Flash-Decoding").

The twin is what `models.decoder.Attention` does without.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxllm.arrays import INT8_MAX
from jaxllm.cache import LayerCache

_ROWS = 16  # of queries: the fewest that tensor cores take
_BLOCK = 64  # slots at a time
_PROGRAMS = 256  # that fill a GPU
_SPLITS = 32
_NEVER = -1e30  # a score that weighs nothing


def attend(
    past: LayerCache,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    angles_BTh: jax.Array,
    window: int | None,
) -> tuple[jax.Array, LayerCache] | None:
    """What `models.decoder.Attend` says; None of what is not for this kernel: several tokens a row, other types."""
    B, T, N, H = q_BTNH.shape
    K, slots = jax.tree.leaves(past.v)[0].shape[1:3]
    block = min(_BLOCK, slots & -slots)
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    if T > 1 or not half or N // K > _ROWS or H & (H - 1) or H < 2 * _ROWS or block < _ROWS:
        return None
    splits = 1
    while splits < _SPLITS and B * K * splits < _PROGRAMS and slots % (2 * splits * block) == 0:
        splits *= 2
    entries, structure = jax.tree.flatten((past.k, past.v))
    y_BNH, *entries = _attend(
        positions_BT[:, 0],
        q_BTNH[:, 0],
        k_BTKH[:, 0],
        v_BTKH[:, 0],
        jnp.cos(angles_BTh[:, 0]),
        jnp.sin(angles_BTh[:, 0]),
        *entries,
        window=window or slots,
        splits=splits,
        block=block,
    )
    k, v = jax.tree.unflatten(structure, entries)
    return y_BNH[:, None], LayerCache(k, v, past.split)


@functools.partial(jax.jit, static_argnames=("window", "splits", "block"))  # traced once for all layers
def _attend(
    position_B: jax.Array,
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    *entries: jax.Array,
    window: int,
    splits: int,
    block: int,
) -> list[jax.Array]:
    """y [B, N, H] and the entries, updated in place. entries: keys and values, or of each its values and scales."""
    B, N, H = q_BNH.shape
    K, slots = entries[0].shape[1:3]
    arguments = position_B, q_BNH, k_BKH, v_BKH, cos_Bh, sin_Bh
    sums = jax.ShapeDtypeStruct((B, K, splits, _ROWS), jnp.float32)
    *written, y_BKPGH, highest_BKPG, total_BKPG = pl.pallas_call(
        functools.partial(_kernel, slots // splits, block, window),
        grid=(B, K, splits),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in entries),
            jax.ShapeDtypeStruct((*sums.shape, H), jnp.float32),
            sums,
            sums,
        ],
        input_output_aliases={len(arguments) + i: i for i in range(len(entries))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        name="attend",
    )(*arguments, *entries)
    y_BNH = pl.pallas_call(
        _join,
        grid=(B, K, N // K),
        out_shape=jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name="join",
    )(y_BKPGH, highest_BKPG, total_BKPG)
    return [y_BNH, *written]


def _kernel(
    slots: int,
    block: int,
    window: int,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    *refs: Any,
) -> None:
    """The part of some slots, the token's own among them or not. Queries of a KV head are rows G, the last repeated.

    Heads are taken by halves, which turn into each other.
    """
    *caches, y_ref, highest_ref, total_ref = refs
    old, new = caches[: len(caches) // 2], caches[len(caches) // 2 :]
    rounded = len(old) == 4
    (k_old, *k_scale_old), (v_old, *v_scale_old) = old[: len(old) // 2], old[len(old) // 2 :]
    (k_new, *k_scale_new), (v_new, *v_scale_new) = new[: len(new) // 2], new[len(new) // 2 :]
    b, head, part = (pl.program_id(axis) for axis in range(3))
    H, dtype = q_ref.shape[2], q_ref.dtype
    groups = q_ref.shape[1] // k_ref.shape[1]
    halves = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
    at, first = position_ref[b], part * slots
    own = (at >= first) & (at < first + slots)

    cos, sin = cos_ref[b, :], sin_ref[b, :]
    rows = head * groups + jnp.minimum(jnp.arange(_ROWS), groups - 1)
    q = _turn([q_ref[b, rows, half] for half in halves], cos[None], sin[None])
    k, v = _turn([k_ref[b, head, half] for half in halves], cos, sin), [v_ref[b, head, :]]
    k_scale = v_scale = jnp.float32(1)
    if rounded:
        (k, k_scale), (v, v_scale) = _round(k), _round(v)

    @pl.when(own)
    def _():
        for half, values in zip(halves, k, strict=True):
            k_new[b, head, at, half] = values
        v_new[b, head, at, :] = v[0]
        for ref, scale in ((*k_scale_new, k_scale), (*v_scale_new, v_scale)) if rounded else ():
            ref[b, head, at] = scale

    # The sums begin with the token itself, which is not read from the cache.
    scores_G = sum(jnp.sum(_32(q) * _32(k.astype(dtype))[None], axis=1) for q, k in zip(q, k, strict=True))
    scores_G = jnp.where(jnp.full((_ROWS,), own), scores_G * H**-0.5 * k_scale, _NEVER)
    total_G = jnp.where(scores_G == _NEVER, 0.0, 1.0)
    y_GH = (total_G * v_scale).astype(dtype).astype(jnp.float32)[:, None] * _32(v[0].astype(dtype))[None]

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest_G, total_G, y_GH = carry
        here = pl.ds(first + i * block, block)
        slot_S = first + i * block + jnp.arange(block)
        seen_S = (slot_S < at) & (slot_S > at - window)
        k_hS = [k_old[b, head, here, half].astype(dtype).T for half in halves]
        scores_GS = sum(_dot(q, k) for q, k in zip(q, k_hS, strict=True)) * H**-0.5
        if rounded:
            scores_GS *= k_scale_old[0][b, head, here][None]
        scores_GS = jnp.where(seen_S[None], scores_GS, _NEVER)
        now_G = jnp.maximum(highest_G, jnp.max(scores_GS, axis=1))
        weights_GS = jnp.where(seen_S[None], jnp.exp(scores_GS - now_G[:, None]), 0.0)
        fade_G = jnp.exp(highest_G - now_G)
        total_G = total_G * fade_G + jnp.sum(weights_GS, axis=1)
        if rounded:
            weights_GS *= jnp.where(seen_S, v_scale_old[0][b, head, here], 0.0)[None]
        v_SH = v_old[b, head, here, :].astype(dtype)
        return now_G, total_G, y_GH * fade_G[:, None] + _dot(weights_GS.astype(dtype), v_SH)

    begin = jnp.maximum(at - window + 1 - first, 0) // block
    end = jnp.clip(pl.cdiv(at - first, block), 0, slots // block)
    highest_G, total_G, y_GH = lax.fori_loop(begin, end, add, (scores_G, total_G, y_GH))
    y_ref[b, head, part, :, :] = y_GH
    highest_ref[b, head, part, :], total_ref[b, head, part, :] = highest_G, total_G


def _join(y_ref: Any, highest_ref: Any, total_ref: Any, joined_ref: Any) -> None:
    b, head, g = (pl.program_id(axis) for axis in range(3))
    highest_P = highest_ref[b, head, :, g]
    weights_P = jnp.exp(highest_P - jnp.max(highest_P))
    y_H = jnp.sum(y_ref[b, head, :, g, :] * weights_P[:, None], axis=0)
    y_H /= jnp.sum(weights_P * total_ref[b, head, :, g])
    joined_ref[b, head * pl.num_programs(2) + g, :] = y_H.astype(joined_ref.dtype)


def _turn(halves: list[jax.Array], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """As `layers.rope`."""
    a, b = (_32(half) for half in halves)
    return [half.astype(halves[0].dtype) for half in (a * cos - b * sin, b * cos + a * sin)]


def _round(parts: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """As `cache.round_int8`, of a head in parts."""
    highest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(_32(part))) for part in parts))
    scale = jnp.where(highest == 0, 1.0, highest / INT8_MAX)
    return [_nearest(_32(part) / scale).astype(jnp.int8) for part in parts], scale


def _nearest(x: jax.Array) -> jax.Array:
    """jnp.round, which Triton has not."""
    up = jnp.floor(x + 0.5)
    odd = up - 2 * jnp.floor(up / 2)
    return jnp.where(up - x == 0.5, up - odd, up)


def _32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot(a, b, preferred_element_type=jnp.float32)
