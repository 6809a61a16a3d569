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

    Keys have their slots last and values their head_dim, so that both matmuls of attention read the cache as it lies;
    the other way round XLA on CPU transposes the whole of it in every step.
    """

    k: tuple[jax.Array, ...]  # num_layers of [B, K, H, S]
    v: tuple[jax.Array, ...]  # num_layers of [B, K, S, H]


def init_cache(cfg: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache: 2 * num_layers * batch * slots * num_kv_heads * head_dim elements of the model's dtype."""
    k_shape = (batch, cfg.num_kv_heads, cfg.head_dim, slots)
    v_shape = (batch, cfg.num_kv_heads, slots, cfg.head_dim)
    k, v = (tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers)) for shape in (k_shape, v_shape))
    return KVCache(k, v)


def write(
    past: tuple[jax.Array, jax.Array],
    new_k_BTKH: jax.Array,
    new_v_BTKH: jax.Array,
    positions_BT: jax.Array,
    after_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Puts the keys and values of this call into their slots.

    With T > 1 the positions must be contiguous and the same in every row (a prefill chunk); with T == 1 each row has
    its own, which must lie in the cache.

    past: k [B, K, H, S] and v [B, K, S, H].
    after_BTNH: what attention made of `past`. XLA writes in place only where the data say that all reads come first;
        otherwise it copies the whole cache in every step.
    """
    k_BKHS, v_BKSH = past
    batch, length, K, H = new_k_BTKH.shape
    # Zero, though XLA may not assume so of a float. Each KV head waits for a query head of its own device.
    zero_BTKH = after_BTNH.reshape(batch, length, K, -1, H)[:, :, :, 0] * 0
    new_k_BTKH, new_v_BTKH = new_k_BTKH + zero_BTKH, new_v_BTKH + zero_BTKH
    if length == 1 and batch > 1:
        rows_B, slots_B = jnp.arange(batch), positions_BT[:, 0]
        k_BKHS = k_BKHS.at[rows_B, :, :, slots_B].set(new_k_BTKH[:, 0], mode="drop", unique_indices=True)
        v_BKSH = v_BKSH.at[rows_B, :, slots_B].set(new_v_BTKH[:, 0], mode="drop", unique_indices=True)
        return k_BKHS, v_BKSH
    start = positions_BT[0, 0]
    k_BKHS = jax.lax.dynamic_update_slice_in_dim(k_BKHS, new_k_BTKH.transpose(0, 2, 3, 1), start, axis=3)
    v_BKSH = jax.lax.dynamic_update_slice_in_dim(v_BKSH, new_v_BTKH.transpose(0, 2, 1, 3), start, axis=2)
    return k_BKHS, v_BKSH
