"""The KV cache: explicit, donated, one array a layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far. Slot s of a row holds position s.

    A slot is read only by queries at its own or a later position, so what a slot held before it was written, or what a
    padded prompt left in it, is never seen.
    """

    k: tuple[jax.Array, ...]  # num_layers × [B, K, S, H]
    v: tuple[jax.Array, ...]  # num_layers × [B, K, S, H]


def init_cache(cfg: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache of 2 * num_layers * batch * slots * num_kv_heads * head_dim elements in the model's dtype."""
    shape = (batch, cfg.num_kv_heads, slots, cfg.head_dim)
    k, v = (tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers)) for _ in "kv")
    return KVCache(k, v)


def write(cache_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Puts the keys or values of this call into their slots.

    With T > 1 the positions must be contiguous and the same in every row (a prefill chunk); with T == 1 each row has
    its own, and one that lies beyond the cache is dropped.
    """
    batch, length = positions_BT.shape
    if length == 1 and batch > 1:
        slots = jnp.arange(batch), slice(None), positions_BT[:, 0]
        return cache_BKSH.at[slots].set(new_BTKH[:, 0], mode="drop", unique_indices=True)
    return jax.lax.dynamic_update_slice_in_dim(cache_BKSH, new_BTKH.swapaxes(1, 2), positions_BT[0, 0], axis=2)
