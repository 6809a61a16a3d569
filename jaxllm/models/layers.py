"""Parts of a decoder, as Linen modules that read like the papers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jaxllm import arrays
from jaxllm.activations import Activations, Normed
from jaxllm.cache import Entries, LayerCache, Rounded, as_keys, as_values
from jaxllm.config import LinearRope, Llama3Rope
from jaxllm.params import boxed


class Einsum(nn.Module):
    """A matmul: its weight's contracted axes are the last ones ([out, in], as Hugging Face stores it)."""

    eqn: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    bias: bool = False
    out_dtype: str | None = None

    def setup(self):
        contracted = arrays.num_contracted(self.eqn)
        kept = len(self.shape) - contracted
        self.w = self.param("w", boxed(self.axes, contracted), self.shape, self.dtype)
        if self.bias:
            self.b = self.param("b", boxed(self.axes[:kept]), self.shape[:kept], self.dtype)

    def __call__(self, x: Activations, add: jax.Array | None = None) -> jax.Array:
        """add: is added to the result."""
        return together(x, self, add=add)[0]


def together(x: Activations, *parts: Einsum, add: jax.Array | None = None) -> list[jax.Array]:
    """The results of several matmuls of the same activations. add: to that of a single one."""
    results = arrays.einsums([part.eqn for part in parts], x, [part.w for part in parts], parts[0].out_dtype, add)
    return [
        y + jnp.expand_dims(part.b, range(y.ndim - part.b.ndim)) if part.bias else y
        for part, y in zip(parts, results, strict=True)
    ]


class Embed(nn.Module):
    """The table of token vectors, looked up on the way in and, where it is tied, contracted on the way out."""

    vocab_size: int
    embed_dim: int
    dtype: str

    def setup(self):
        self.w = self.param("w", boxed(("vocab", "embed"), 1), (self.vocab_size, self.embed_dim), self.dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return arrays.take(self.w, tokens_BT, self.dtype)

    def logits(self, x_BTD: Activations) -> jax.Array:
        return arrays.einsum("BTD,VD->BTV", x_BTD, self.w, "float32")


class RMSNorm(nn.Module):
    """Scales the last axis to unit root mean square: see `activations.Normed`."""

    axis: str
    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> Normed:
        w = self.param("w", boxed((self.axis,)), x.shape[-1:], self.dtype)
        return Normed(x, w, self.eps)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Rope | LinearRope | None) -> jax.Array:
    """Radians a position for each pair: float32 [head_dim / 2]."""
    freq = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if isinstance(scaling, LinearRope):
        return freq / scaling.factor
    if isinstance(scaling, Llama3Rope):
        turns = scaling.original_max_len * freq / (2 * jnp.pi)  # over the original context
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return keep * freq + (1 - keep) * freq / scaling.factor
    return freq


def rope_angles(positions_BT: jax.Array, freq_h: jax.Array) -> jax.Array:
    """Float32 [B, T, H / 2]."""
    return positions_BT[:, :, None].astype(jnp.float32) * freq_h[None, None]


def rope(x_BTNH: jax.Array, angles_BTh: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), pairing the two halves of each head as Hugging Face does."""
    sin, cos = jnp.sin(angles_BTh)[:, :, None], jnp.cos(angles_BTh)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class Part(NamedTuple):
    """Keys and values that a call attends to.

    k: [B, K, H, S], or [B, K, S, H] unless slots_last. v: [B, K, S, H]. at_BS: their positions.
    seen_BTS: whether a query sees them, but for the window.
    """

    k: Entries
    v: Entries
    slots_last: bool
    at_BS: jax.Array
    seen_BTS: jax.Array


def present_part(k_BTKH: Entries, v_BTKH: Entries, positions_BT: jax.Array) -> Part:
    """This call's own."""
    causal_BTS = positions_BT[:, :, None] >= positions_BT[:, None]
    return Part(as_keys(k_BTKH), as_values(v_BTKH), True, positions_BT, causal_BTS)


def past_part(cache: LayerCache, positions_BT: jax.Array) -> Part:
    """The cache's: those before this call where it is split, else up to each query's position."""
    batch, length = positions_BT.shape
    slots = jax.tree.leaves(cache.v)[0].shape[2]
    slots_BS = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    end_BT1 = positions_BT[:, :1, None] if cache.split else positions_BT[:, :, None] + 1
    seen_BTS = jnp.broadcast_to(slots_BS[:, None] < end_BT1, (batch, length, slots))
    return Part(cache.k, cache.v, cache.split, slots_BS, seen_BTS)


def attend(q_BTNH: jax.Array, parts: Sequence[Part], positions_BT: jax.Array, window: int | None) -> jax.Array:
    """Causal grouped-query attention: [B, T, N, H]. Softmax in float32.

    window: how many positions back a query looks, itself included; None for all.
    """
    B, T, N, H = q_BTNH.shape
    K = jax.tree.leaves(parts[0].v)[0].shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = []
    for part in parts:
        seen_BTS = part.seen_BTS
        if window is not None:
            seen_BTS &= positions_BT[:, :, None] - part.at_BS[:, None] < window
        scores_BKGTS = _score(q_BKGTH, part.k, part.slots_last) * H**-0.5
        scores.append(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf))

    # One softmax over all parts, each summed where it is: joining them would copy the past.
    tops = (jnp.max(part, axis=-1, keepdims=True) for part in scores)
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))  # it cancels out: no gradient is due
    total, y_BKGTH = jnp.zeros_like(highest), jnp.zeros(q_BKGTH.shape, jnp.float32)
    for scores_BKGTS, part in zip(scores, parts, strict=True):
        weights = jnp.exp(scores_BKGTS - highest)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        y_BKGTH += _mix(weights, part.v, q_BTNH.dtype)
    y_BKGTH = (y_BKGTH / total).astype(q_BTNH.dtype)
    return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _score(q_BKGTH: jax.Array, k: Entries, slots_last: bool) -> jax.Array:
    """float32 q·k. The scales of int8 keys multiply the result, never the cache."""
    keys = _as_float(k.values, q_BKGTH) if isinstance(k, Rounded) else k
    eqn = "BKGTH,BKHS->BKGTS" if slots_last else "BKGTH,BKSH->BKGTS"
    scores_BKGTS = jnp.einsum(eqn, q_BKGTH, keys, preferred_element_type=jnp.float32)
    return scores_BKGTS * _scale_by_slot(k) if isinstance(k, Rounded) else scores_BKGTS


def _scale_by_slot(rounded: Rounded) -> jax.Array:
    """[B, K, 1, 1, S]."""
    return rounded.scale.reshape(*rounded.scale.shape[:2], 1, 1, -1)


def _mix(weights_BKGTS: jax.Array, v_BKSH: Entries, dtype: DTypeLike) -> jax.Array:
    """float32 sums of values. The scales of int8 values multiply the weights."""
    values = v_BKSH
    if isinstance(v_BKSH, Rounded):
        weights_BKGTS *= _scale_by_slot(v_BKSH)
        values = _as_float(v_BKSH.values, weights_BKGTS.astype(dtype))
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(dtype), values, preferred_element_type=jnp.float32)


def _as_float(rounded: jax.Array, after_BKGTx: jax.Array) -> jax.Array:
    """A cache in the type of `after`, and not before that is there: XLA on CPU would make all layers' float first."""

    def wait(rounded: jax.Array, after_BKGTx: jax.Array) -> jax.Array:
        zero_BK = after_BKGTx[:, :, 0, 0, 0] * 0  # though XLA may not assume so of a float
        return rounded.astype(after_BKGTx.dtype) + zero_BK[:, :, None, None]

    def convert(rounded: jax.Array, after_BKGTx: jax.Array) -> jax.Array:
        return rounded.astype(after_BKGTx.dtype)

    return jax.lax.platform_dependent(rounded, after_BKGTx, cpu=wait, default=convert)
