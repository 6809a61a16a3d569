"""The KV cache: explicit, donated, one array a layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.arrays import INT8_MAX
from jaxllm.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Keys or values in int8, with a scale for each head of each token: x ≈ values * scale.

    values: int8. scale: float32, values' shape with 1 for head_dim; in a cache that is not split, [B, K, S].
    """

    values: jax.Array
    scale: jax.Array


Entries = jax.Array | Rounded  # keys or values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far. Slot s of a row holds position s.

    A slot is read only by queries at its own or a later position, so what a slot held before it was written, or what a
    padded prompt left in it, is never seen.

    split: how it is used, which is for the compiler. XLA on CPU copies a cache that is written and then read: without
    the kernel that does both (`kernels.cpu`), a call's own keys and values are attended to beside the cache and written
    afterwards; and keys have their slots last, or the whole of them would be transposed in every step. A TPU's or GPU's
    writes first and reads the cache alone; keys with slots last would be laid out anew around every write.
    """

    k: tuple[Entries, ...]  # num_layers of [B, K, H, S] where split, else of [B, K, S, H]
    v: tuple[Entries, ...]  # num_layers of [B, K, S, H]
    split: bool = dataclasses.field(default=True, metadata={"static": True})


class LayerCache(NamedTuple):
    """A layer's part of a KVCache."""

    k: Entries
    v: Entries
    split: bool


def init_cache(cfg: ModelConfig, batch: int, slots: int, split: bool = True) -> KVCache:
    """An empty cache: 2 * num_layers * batch * slots * num_kv_heads * head_dim elements of `cfg.kv_dtype`."""

    def entries(*shape: int, head_axis: int) -> Entries:
        if cfg.kv_dtype is None:
            return jnp.zeros(shape, cfg.dtype)
        scale = tuple(1 if axis == head_axis else size for axis, size in enumerate(shape))
        return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(scale if split else scale[:3], jnp.float32))

    H, heads = cfg.head_dim, cfg.widths("num_kv_heads")

    def rows() -> tuple[Entries, ...]:
        return tuple(entries(batch, K, slots, H, head_axis=3) for K in heads)

    k = tuple(entries(batch, K, H, slots, head_axis=2) for K in heads) if split else rows()
    return KVCache(k, rows(), split)


def round_int8(x_BTKH: jax.Array) -> Rounded:
    """Rounds each head of each token to 255 levels."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x_BTKH), axis=-1, keepdims=True)
    scale = jnp.where(absmax == 0, 1.0, absmax / INT8_MAX)  # a NaN stays one
    return Rounded(jnp.round(x_BTKH / scale).astype(jnp.int8), scale)


def as_keys(x_BTKH: Entries) -> Entries:
    """[B, K, H, T], as keys lie in a cache that is split."""
    return jax.tree.map(_slots_last, x_BTKH)


def as_values(x_BTKH: Entries) -> Entries:
    """[B, K, T, H], as values lie in the cache."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), x_BTKH)


def _slots_last(x_BTKH: jax.Array) -> jax.Array:
    return x_BTKH.transpose(0, 2, 3, 1)


def write_split(
    past: LayerCache, new_k_BTKH: Entries, new_v_BTKH: Entries, positions_BT: jax.Array, after_BTNH: jax.Array
) -> LayerCache:
    """Puts the keys and values of this call into their slots of a cache that is split.

    With T > 1 the positions must be contiguous and the same in every row (a prefill chunk); with T == 1 each row has
    its own, which must lie in the cache.

    after_BTNH: what attention made of `past`. XLA writes in place only where the data say that all reads come first;
        otherwise it copies the whole cache in every step.
    """
    batch, length, _, H = after_BTNH.shape

    def after(x_BTKH: jax.Array) -> jax.Array:
        # Zero, though XLA may not assume so of a float. Each KV head waits for a query head of its own device.
        zero_BTKH = after_BTNH.reshape(batch, length, x_BTKH.shape[2], -1, H)[:, :, :, 0] * 0
        return x_BTKH + zero_BTKH[..., : x_BTKH.shape[3]].astype(x_BTKH.dtype)

    new_k_BTKH, new_v_BTKH = jax.tree.map(after, (new_k_BTKH, new_v_BTKH))
    k = jax.tree.map(functools.partial(_put, positions_BT, 3), past.k, as_keys(new_k_BTKH))
    v = jax.tree.map(functools.partial(_put, positions_BT, 2), past.v, as_values(new_v_BTKH))
    return LayerCache(k, v, True)


def write(
    past: LayerCache,
    new_k_BTKH: Entries,
    new_v_BTKH: Entries,
    positions_BT: jax.Array,
    first_slot: jax.Array | None = None,
    *,
    keep_layout: bool = False,
) -> LayerCache:
    """The same for a cache that is not split: before attention reads it.

    first_slot: int32 [], of a device that has a part of the slots, with T == 1: what belongs to others is left out.
        None where it has all.
    keep_layout: for a TPU, whose compiler would lay a cache of many heads out anew in a loop, and back.
    """
    length = positions_BT.shape[1]
    if first_slot is not None:
        positions_BT -= first_slot

    def put(old: Entries, new: Entries) -> Entries:
        if isinstance(old, Rounded) and isinstance(new, Rounded):
            return Rounded(values(old.values, new.values), scales(old.scale, new.scale[..., 0].swapaxes(1, 2)))
        return jax.tree.map(values, old, new)

    def values(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BKTH = new_BTKH.swapaxes(1, 2)
        if length > 1:
            return lax.dynamic_update_slice_in_dim(old_BKSH, new_BKTH, positions_BT[0, 0], 2)
        put_rows = _scatter_rows if first_slot is not None else _update_rows
        y_BKSH = lax.platform_dependent(old_BKSH, new_BKTH, positions_BT[:, 0], cuda=_scatter_rows, default=put_rows)
        return with_layout_constraint(y_BKSH, Layout((0, 1, 2, 3))) if keep_layout else y_BKSH

    def scales(old_BKS: jax.Array, new_BKT: jax.Array) -> jax.Array:
        if length > 1:
            return lax.dynamic_update_slice_in_dim(old_BKS, new_BKT, positions_BT[0, 0], 2)
        return jnp.where(jnp.arange(old_BKS.shape[2])[None, None] == positions_BT[:, :, None], new_BKT, old_BKS)

    return LayerCache(put(past.k, new_k_BTKH), put(past.v, new_v_BTKH), False)


def _update_rows(old_BKSH: jax.Array, new_BK1H: jax.Array, at_B: jax.Array) -> jax.Array:
    """A slot of each row, row by row. A TPU does so in place; to scatter it copies an int8 cache, and in a loop any."""
    for b in range(len(at_B)):
        old_BKSH = lax.dynamic_update_slice(old_BKSH, new_BK1H[b : b + 1], (b, 0, at_B[b], 0))
    return old_BKSH


def _scatter_rows(old_BKSH: jax.Array, new_BK1H: jax.Array, at_B: jax.Array) -> jax.Array:
    """The same; slots that lie outside are left out."""
    at_B = jnp.where(at_B < 0, old_BKSH.shape[2], at_B)  # a negative index would count from the end
    return old_BKSH.at[jnp.arange(len(at_B)), :, at_B].set(new_BK1H[:, :, 0], mode="drop", unique_indices=True)


def _put(positions_BT: jax.Array, axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
    """old with `new` at the slots of these positions. axis: the slots'."""
    batch, length = positions_BT.shape
    if length > 1 or batch == 1:
        return lax.dynamic_update_slice_in_dim(old, new, positions_BT[0, 0], axis)
    where = (jnp.arange(batch), *(slice(None),) * (axis - 1), positions_BT[:, 0])
    return old.at[where].set(new.squeeze(axis), mode="drop", unique_indices=True)
