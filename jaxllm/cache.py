"""The KV cache: explicit, donated, one array a layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.arrays import INT8_MAX
from jaxllm.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Keys or values in int8, with a scale for each head of each token: x ≈ values * scale.

    values: int8. scale: float32, values' shape with 1 for head_dim.
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

    Keys have their slots last and values their head_dim, so that both matmuls of attention read the cache as it lies;
    the other way round XLA on CPU transposes the whole of it in every step.
    """

    k: tuple[Entries, ...]  # num_layers of [B, K, H, S]
    v: tuple[Entries, ...]  # num_layers of [B, K, S, H]


def init_cache(cfg: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache: 2 * num_layers * batch * slots * num_kv_heads * head_dim elements of `cfg.kv_dtype`."""

    def entries(*shape: int, head_axis: int) -> Entries:
        if cfg.kv_dtype is None:
            return jnp.zeros(shape, cfg.dtype)
        scale = [1 if axis == head_axis else size for axis, size in enumerate(shape)]
        return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(scale, jnp.float32))

    H, heads = cfg.head_dim, cfg.widths("num_kv_heads")
    k = tuple(entries(batch, K, H, slots, head_axis=2) for K in heads)
    v = tuple(entries(batch, K, slots, H, head_axis=3) for K in heads)
    return KVCache(k, v)


def round_int8(x_BTKH: jax.Array) -> Rounded:
    """Rounds each head of each token to 255 levels."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x_BTKH), axis=-1, keepdims=True)
    scale = jnp.where(absmax == 0, 1.0, absmax / INT8_MAX)  # a NaN stays one
    return Rounded(jnp.round(x_BTKH / scale).astype(jnp.int8), scale)


def as_keys(x_BTKH: Entries) -> Entries:
    """[B, K, H, T], as keys lie in the cache."""
    return jax.tree.map(lambda x: x.transpose(0, 2, 3, 1), x_BTKH)


def as_values(x_BTKH: Entries) -> Entries:
    """[B, K, T, H], as values lie in the cache."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), x_BTKH)


def write(
    past: tuple[Entries, Entries],
    new_k_BTKH: Entries,
    new_v_BTKH: Entries,
    positions_BT: jax.Array,
    after_BTNH: jax.Array,
) -> tuple[Entries, Entries]:
    """Puts the keys and values of this call into their slots.

    With T > 1 the positions must be contiguous and the same in every row (a prefill chunk); with T == 1 each row has
    its own, which must lie in the cache.

    past: k [B, K, H, S] and v [B, K, S, H].
    after_BTNH: what attention made of `past`. XLA writes in place only where the data say that all reads come first;
        otherwise it copies the whole cache in every step.
    """
    batch, length, _, H = after_BTNH.shape

    def after(x_BTKH: jax.Array) -> jax.Array:
        # Zero, though XLA may not assume so of a float. Each KV head waits for a query head of its own device.
        zero_BTKH = after_BTNH.reshape(batch, length, x_BTKH.shape[2], -1, H)[:, :, :, 0] * 0
        return x_BTKH + zero_BTKH[..., : x_BTKH.shape[3]].astype(x_BTKH.dtype)

    new_k_BTKH, new_v_BTKH = jax.tree.map(after, (new_k_BTKH, new_v_BTKH))
    if length == 1 and batch > 1:
        rows_B, slots_B = jnp.arange(batch), positions_BT[:, 0]

        def put_k(k_BKHS: jax.Array, new: jax.Array) -> jax.Array:
            return k_BKHS.at[rows_B, :, :, slots_B].set(new[:, 0], mode="drop", unique_indices=True)

        def put_v(v_BKSH: jax.Array, new: jax.Array) -> jax.Array:
            return v_BKSH.at[rows_B, :, slots_B].set(new[:, 0], mode="drop", unique_indices=True)

        return jax.tree.map(put_k, past[0], new_k_BTKH), jax.tree.map(put_v, past[1], new_v_BTKH)

    def put(old: Entries, new: Entries, axis: int) -> Entries:
        start = positions_BT[0, 0]
        return jax.tree.map(lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n, start, axis), old, new)

    return put(past[0], as_keys(new_k_BTKH), 3), put(past[1], as_values(new_v_BTKH), 2)
