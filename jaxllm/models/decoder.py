"""The decoder of the Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen 2 and 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxllm import cache as kv
from jaxllm.activations import Activations, Gated
from jaxllm.cache import Entries, KVCache, LayerCache
from jaxllm.config import ModelConfig
from jaxllm.models.layers import (
    Einsum,
    Embed,
    RMSNorm,
    attend,
    past_part,
    present_part,
    rope,
    rope_angles,
    rope_frequencies,
    together,
)

Constrain = Callable[..., Any]  # (activations, their logical axes …) -> the same, where the mesh wants them
Write = Callable[..., LayerCache]  # as kv.write
# (cache, q, k, v, positions, rope's angles, window) -> (y, cache), q and k not being rotated yet; None of what it does
# not take
Attend = Callable[..., tuple[jax.Array, LayerCache] | None]


def _anywhere(x: Any, *axes: str | None) -> Any:
    return x


def residual_axes(length: int) -> tuple[str | None, ...]:
    """Logical axes of the residual stream [B, T, D] between the parts of a block."""
    return "batch", None, "residual" if length > 1 else "residual_step"


class Attention(nn.Module):
    cfg: ModelConfig
    constrain: Constrain = _anywhere
    write: Write = kv.write
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, normed_BTD: Activations, x_BTD: jax.Array, positions_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x_BTD with what attention makes of `normed_BTD` added, and the cache."""
        c = self.cfg
        D, H = c.embed_dim, c.head_dim
        (N,), (K,) = c.widths("num_heads"), c.widths("num_kv_heads")
        q_axes, kv_axes = ("heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed")
        q_BTNH, k_BTKH, v_BTKH = together(
            normed_BTD,
            Einsum("BTD,NHD->BTNH", (N, H, D), q_axes, c.dtype, c.qkv_bias, name="q"),
            Einsum("BTD,KHD->BTKH", (K, H, D), kv_axes, c.dtype, c.qkv_bias, name="k"),
            Einsum("BTD,KHD->BTKH", (K, H, D), kv_axes, c.dtype, c.qkv_bias, name="v"),
        )
        if c.qk_norm:
            q_BTNH = RMSNorm("head_dim", c.norm_eps, c.dtype, name="q_norm")(q_BTNH).value()
            k_BTKH = RMSNorm("head_dim", c.norm_eps, c.dtype, name="k_norm")(k_BTKH).value()
        angles_BTh = rope_angles(positions_BT, rope_frequencies(H, c.rope_theta, c.rope_scaling))
        attended = None
        if cache is not None and self.attend is not None:
            attended = self.attend(cache, q_BTNH, k_BTKH, v_BTKH, positions_BT, angles_BTh, c.sliding_window)
        if attended is None:
            q_BTNH, k_BTKH = rope(q_BTNH, angles_BTh), rope(k_BTKH, angles_BTh)
            attended = self._attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, cache)
        y_BTNH, cache = attended
        o_axes = ("embed", "heads", "head_dim")
        return Einsum("BTNH,DNH->BTD", (D, N, H), o_axes, c.dtype, name="o")(y_BTNH, add=x_BTD), cache

    def _attend(
        self,
        q_BTNH: jax.Array,
        new_k_BTKH: jax.Array,
        new_v_BTKH: jax.Array,
        positions_BT: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.cfg
        k_BTKH: Entries = new_k_BTKH
        v_BTKH: Entries = new_v_BTKH
        if c.kv_dtype == "int8":  # this call's as well, so that a token's answer does not depend on how calls are cut
            k_BTKH, v_BTKH = kv.round_int8(new_k_BTKH), kv.round_int8(new_v_BTKH)
        if cache is None:
            return attend(q_BTNH, [present_part(k_BTKH, v_BTKH, positions_BT)], positions_BT, c.sliding_window), None
        if cache.split:
            parts = [present_part(k_BTKH, v_BTKH, positions_BT), past_part(cache, positions_BT)]
            y_BTNH = attend(q_BTNH, parts, positions_BT, c.sliding_window)
            return y_BTNH, kv.write_split(cache, k_BTKH, v_BTKH, positions_BT, after_BTNH=y_BTNH)
        k_BTKH, v_BTKH = jax.tree.map(lambda x: self.constrain(x, "batch", None, "kv_heads", None), (k_BTKH, v_BTKH))
        cache = self.write(cache, k_BTKH, v_BTKH, positions_BT)
        return attend(q_BTNH, [past_part(cache, positions_BT)], positions_BT, c.sliding_window), cache


class Mlp(nn.Module):
    """Gated feed-forward (Shazeer 2020)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, normed_BTD: Activations, x_BTD: jax.Array) -> jax.Array:
        """x_BTD with what the layer makes of `normed_BTD` added."""
        D, dtype = self.cfg.embed_dim, self.cfg.dtype
        (F,) = self.cfg.widths("ffw_dim")
        gate_BTF, up_BTF = together(
            normed_BTD,
            Einsum("BTD,FD->BTF", (F, D), ("ffw", "embed"), dtype, name="gate"),
            Einsum("BTD,FD->BTF", (F, D), ("ffw", "embed"), dtype, name="up"),
        )
        return Einsum("BTF,DF->BTD", (D, F), ("embed", "ffw"), dtype, name="down")(Gated(gate_BTF, up_BTF), add=x_BTD)


class Block(nn.Module):
    """One layer; cfg: of that layer alone."""

    cfg: ModelConfig
    constrain: Constrain = _anywhere
    write: Write = kv.write
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c, axes = self.cfg, residual_axes(x_BTD.shape[1])
        normed_BTD = RMSNorm("embed", c.norm_eps, c.dtype, name="attn_norm")(x_BTD)
        x_BTD, cache = Attention(c, self.constrain, self.write, self.attend, name="attn")(
            self.constrain(normed_BTD, "batch", None, None), x_BTD, positions_BT, cache
        )
        x_BTD = self.constrain(x_BTD, *axes)
        normed_BTD = RMSNorm("embed", c.norm_eps, c.dtype, name="mlp_norm")(x_BTD)
        x_BTD = Mlp(c, name="mlp")(self.constrain(normed_BTD, "batch", None, None), x_BTD)
        return self.constrain(x_BTD, *axes), cache


class Decoder(nn.Module):
    """Token ids to logits.

    constrain: applied to the residual stream, to what blocks read of it, and to new keys and values; a sharding
        constraint where there is a mesh. write: puts new keys and values into a cache that is not split; over a mesh
        each device does so with its own.
    """

    cfg: ModelConfig
    constrain: Constrain = _anywhere
    write: Write = kv.write
    attend: Attend | None = None

    def setup(self):
        c = self.cfg
        self.embed = Embed(c.vocab_size, c.embed_dim, c.dtype)
        self.layers = [Block(c.layer(i), self.constrain, self.write, self.attend) for i in range(c.num_layers)]
        self.final_norm = RMSNorm("embed", c.norm_eps, c.dtype)
        if not c.tie_embeddings:
            shape, axes = (c.vocab_size, c.embed_dim), ("vocab", "embed")
            self.head = Einsum("BTD,VD->BTV", shape, axes, c.dtype, out_dtype="float32")

    def __call__(
        self,
        x: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
        last_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns float32 logits [B, T, V] and the cache with this call's positions written.

        x: as of `run`. last_B: index into T of the one token of each row to give logits for: then they are [B, 1, V].
        """
        x_BTD, cache = self.run(x, positions_BT, cache)
        if last_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
        return self.predict(x_BTD), cache

    def run(
        self, x: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """The residual stream [B, T, D] after the layers, and the cache.

        x: token ids [B, T], or the residual stream [B, T, D] after the layers before these, of another program.
        """
        x_BTD = self.constrain(self.embed(x) if x.ndim == 2 else x, *residual_axes(x.shape[1]))
        caches: list[LayerCache] = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                layer_cache = None if cache is None else LayerCache(cache.k[i], cache.v[i], cache.split)
                x_BTD, layer_cache = layer(x_BTD, positions_BT, layer_cache)
            if layer_cache is not None:
                caches.append(layer_cache)
        if cache is not None:
            cache = KVCache(tuple(layer.k for layer in caches), tuple(layer.v for layer in caches), cache.split)
        return x_BTD, cache

    def predict(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] from what the last layer gave."""
        x_BTD = self.constrain(self.final_norm(x_BTD), "batch", None, None)
        return self.embed.logits(x_BTD) if self.cfg.tie_embeddings else self.head(x_BTD)
