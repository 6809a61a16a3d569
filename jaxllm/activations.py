"""Activations that are not computed yet: a kernel computes them where it reads them, other contractions before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """x [..., D], its last axis scaled to unit root mean square and by w [D] (Zhang & Sennrich 2019), in float32."""

    x: jax.Array
    w: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})

    def value(self) -> jax.Array:
        x32 = self.x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(self.x.dtype) * jnp.expand_dims(self.w, range(self.x.ndim - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """silu(x) * up, of one shape (Shazeer 2020)."""

    x: jax.Array
    up: jax.Array

    def value(self) -> jax.Array:
        return jax.nn.silu(self.x) * self.up


Activations = jax.Array | Normed | Gated


def value(x: Activations) -> jax.Array:
    return x.value() if isinstance(x, Normed | Gated) else x


def shape(x: Activations) -> tuple[int, ...]:
    return x.x.shape if isinstance(x, Normed | Gated) else x.shape


def dtype(x: Activations) -> jnp.dtype:
    return x.x.dtype if isinstance(x, Normed | Gated) else x.dtype
