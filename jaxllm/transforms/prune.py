"""Unstructured pruning: zeros where weights were small. Shapes, and so a dense program's speed, stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.lm import LM, Transform, record, require_order
from jaxllm.params import flatten, select, unflatten


def prune_magnitude(
    sparsity: float, match: str = r"layers_\d+/.*", scope: Literal["layer", "global"] = "layer"
) -> Transform:
    """Zeroes the smallest |w|.

    sparsity: fraction of zeros, in [0, 1). Exactly floor(sparsity * size) weights become zero; of equal magnitudes the
        first ones go.
    match: regular expression for whole weight paths; the default leaves embedding and head alone.
    scope: "layer" gives each weight matrix that sparsity, "global" all matching ones together.

    Raises ValueError when `match` names no weight, and lists what is there.
    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected a fraction of zeros in [0, 1).")
    if scope not in ("layer", "global"):
        raise ValueError(f'scope is {scope!r}; expected "layer" or "global".')

    def transform(lm: LM) -> LM:
        require_order(lm, "prune_magnitude")
        paths = select(lm.info, match)
        flat = flatten(lm.params)
        for group in [paths] if scope == "global" else [[path] for path in paths]:
            leaves = [flat[path] for path in group]
            count = int(sparsity * sum(leaf.size for leaf in leaves))
            flat |= zip(group, _zero_smallest(leaves, count), strict=True)
        params = unflatten(flat)
        args = {"sparsity": float(sparsity), "match": match, "scope": scope}
        return record(lm, "prune_magnitude", args, paths, params=params)

    return transform


def _zero_smallest(leaves: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """The leaves with exactly `count` of their elements, those of least magnitude, zero.

    The threshold is found bit by bit (magnitudes order as their bit patterns do), so that nothing is sorted, nothing
    gathered from other devices, and only a single leaf has to have fewer than 2**31 elements.
    """
    threshold = 0
    for bit in reversed(range(31)):
        trial = threshold | 1 << bit
        if sum(int(n) for n in [_count_below(leaf, trial) for leaf in leaves]) <= count:
            threshold = trial
    # Strictly smaller magnitudes go, then ties until the count is full.
    ties = count - sum(int(_count_below(leaf, threshold)) for leaf in leaves)
    out = []
    for leaf in leaves:
        leaf, used = _zero_below(leaf, threshold, min(ties, leaf.size))
        ties -= int(used)
        out.append(leaf)
    return out


def _bits(w: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.abs(w.astype(jnp.float32)), jnp.int32)


@jax.jit
def _count_below(w: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sum(_bits(w) < threshold)


@jax.jit
def _zero_below(w: jax.Array, threshold: jax.Array, ties: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = _bits(w).reshape(-1)
    tied = bits == threshold
    zeroed = (bits < threshold) | (tied & (jnp.cumsum(tied) <= ties))
    return jnp.where(zeroed.reshape(w.shape), jnp.zeros((), w.dtype), w), jnp.sum(tied & zeroed)
