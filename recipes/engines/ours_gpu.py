"""jaxllm on a GPU, with random weights that are made there; variant: "llama-3-8b int8"."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from engines import ours
from engines.shapes import SHAPES
from jax import lax

import jaxllm
from jaxllm.arrays import QArray
from jaxllm.lm import LM, param_info
from jaxllm.measure import read_bandwidth
from jaxllm.params import unflatten


class Engine(ours.Engine):
    def __init__(self, folder: Path, variant: str, threads: int):
        super().__init__(folder, variant, threads)
        if jax.default_backend() != "gpu":
            raise RuntimeError(f"jax found {jax.devices()}; expected a GPU. Install jaxllm[cuda].")

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        self.engine = None
        self.lm = self.lm or random_model(*self.variant.split())
        self.engine = jaxllm.compile(self.lm, batch=batch, max_len=max_len)
        return {"step_bytes": self.engine.step_bytes, "device": jax.devices()[0].device_kind}

    def read(self) -> float:
        """GB (1e9 bytes) a second."""
        return read_bandwidth.__wrapped__()


def random_model(shape: str, kind: str) -> LM:
    """kind: "bfloat16", or "int8": all matrices, with a scale a channel."""
    cfg, params = SHAPES[shape], {}
    for i, (path, info) in enumerate(param_info(cfg).items()):
        contracted = math.prod(info.shape[len(info.shape) - info.contracted :])
        if not info.contracted:
            params[path] = jnp.ones(info.shape, cfg.dtype)
        elif kind == "int8":
            scale = jnp.full((*info.shape[: -info.contracted], 1), contracted**-0.5 / 73, jnp.float32)
            params[path] = QArray(_bytes(jax.random.key(i), info.shape), scale)
        else:
            params[path] = _normal(jax.random.key(i), info.shape, contracted**-0.5)
    return LM(cfg, unflatten(params))


@functools.partial(jax.jit, static_argnums=1)
def _bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)
