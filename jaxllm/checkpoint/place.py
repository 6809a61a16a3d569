"""Weights straight onto the devices of a mesh: each process reads what its own devices hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxllm.params import ParamInfo

Box = tuple[slice, ...]  # a part of an array: where it starts and stops on each axis
Place = Callable[[ParamInfo, Any], Any]  # a weight, or its shapes, to the shardings of its arrays; see leaf_shardings


def target(info: ParamInfo, dtype: str, place: Place | None) -> jax.ShapeDtypeStruct:
    """A float weight that is to be made; without a sharding where no place is given."""
    leaf = jax.ShapeDtypeStruct(info.shape, jax.numpy.dtype(dtype))
    return leaf if place is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(info, leaf))


def whole(shape: tuple[int, ...]) -> Box:
    return tuple(slice(0, size) for size in shape)


def put(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None, read: Callable[[Box], np.ndarray]) -> jax.Array:
    """An array whose parts come from `read`, each once, where several devices here hold the same.

    sharding: None for the default device.
    """
    if sharding is None:
        return jax.device_put(read(whole(shape))).block_until_ready()  # the host copy can go before the next is made
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple((start, stop) for start, stop, _ in map(slice.indices, index, shape))
        if bounds not in parts:
            parts[bounds] = read(tuple(slice(*pair) for pair in bounds))
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part).block_until_ready()


def put_host(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """`put` of what is on the host already."""
    return put(host.shape, sharding, host.__getitem__)
