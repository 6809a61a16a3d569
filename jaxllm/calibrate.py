"""What the weights of a model meet: statistics of activations on a text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import Tap
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, check_tokens, forward, param_info
from jaxllm.params import Params, flatten, unflatten


def input_mean_squares(lm: LM, tokens_NT: Any, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """For each weight at `paths`, the mean over all tokens of x², x being what the weight is contracted with.

    tokens_NT: integer ids. Returns float64 arrays of the shapes of the weights' contracted axes.
    """
    tokens_NT = check_tokens(lm.cfg, tokens_NT)
    totals: dict[str, Any] = dict.fromkeys(paths, 0.0)
    for tokens_T in tokens_NT:
        for path, value in _mean_squares(lm.cfg, tuple(paths), lm.params, tokens_T[None]).items():
            totals[path] += np.asarray(value, np.float64)
    return {path: total / len(tokens_NT) for path, total in totals.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_squares(
    cfg: ModelConfig, paths: tuple[str, ...], params: Params, tokens_BT: jax.Array
) -> dict[str, jax.Array]:
    info = param_info(cfg)
    found: dict[str, jax.Array] = {}

    def record(path: str, x: jax.Array, y: jax.Array) -> None:
        del y
        batch_axes = tuple(range(x.ndim - info[path].contracted))
        found[path] = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=batch_axes)

    flat = flatten(params)
    flat |= {path: Tap(flat[path], functools.partial(record, path)) for path in paths}
    forward(cfg, unflatten(flat), tokens_BT)
    return found
