"""Where each weight lives: one table from logical axes to the axes of a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.arrays import QArray
from jaxllm.cache import KVCache, init_cache
from jaxllm.config import WIDTHS, ModelConfig
from jaxllm.lm import param_info
from jaxllm.params import Params, flatten, unflatten

AXES = ("data", "model")

# Tensor parallelism (Shoeybi et al. 2019): the first matmul of each pair is split by its outputs and the second by its
# inputs, so that a block needs one sum over chips after attention and one after the feed-forward.
RULES: Mapping[str, str | None] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "ffw": "model",
    "head_dim": None,
    "embed": None,
}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data × model devices with axes "data" and "model", the compiler choosing inner shardings (Auto).

    Raises ValueError when there are fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    need = data * model
    if data < 1 or model < 1 or len(devices) < need:
        raise ValueError(
            f"A mesh of data={data} x model={model} needs {max(need, 1)} devices; there are {len(devices)} "
            f"({devices[0].device_kind if devices else 'none'}). Choose a smaller mesh."
        )
    # AxisType.Auto is said outright: jax.make_mesh's default has changed between releases.
    return Mesh(np.array(devices[:need]).reshape(data, model), AXES, axis_types=(AxisType.Auto,) * 2)


def check_mesh(cfg: ModelConfig, mesh: Mesh, batch: int) -> None:
    """Raises ValueError when the mesh does not divide a sharded dimension, naming the sizes that would."""
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"The mesh has axes {mesh.axis_names}; expected {AXES}. jaxllm.make_mesh makes one.")
    sizes = {
        "batch": batch,
        "vocab_size": cfg.vocab_size,
        **{name: math.gcd(*cfg.widths(name)) for name in WIDTHS},
    }
    data, model = mesh.shape["data"], mesh.shape["model"]
    for name, size in sizes.items():
        axis, chips = ("data", data) if name == "batch" else ("model", model)
        if size % chips:
            common = size if name == "batch" else math.gcd(*(v for k, v in sizes.items() if k != "batch"))
            fits = [n for n in range(1, common + 1) if common % n == 0]
            raise ValueError(
                f"{name}={size} does not divide over the mesh's {axis}={chips} devices. {axis} may be one of {fits}."
            )


def param_shardings(cfg: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """A NamedSharding for each array of `params`. A QArray's scales lie with its values where the mesh divides them."""
    info = param_info(cfg)

    def shard(path: str, leaf: jax.Array | QArray):
        axes = [RULES[axis] for axis in info[path].axes]
        values = NamedSharding(mesh, P(*axes))
        if not isinstance(leaf, QArray):
            return values
        kept, first = leaf.scale.ndim - 1, axes[leaf.scale.ndim - 1]
        group = first if first is not None and leaf.groups % mesh.shape[first] == 0 else None
        scale = NamedSharding(mesh, P(*axes[:kept], group))
        whole = NamedSharding(mesh, P())
        return QArray(
            values,  # pyright: ignore[reportArgumentType]
            scale,  # pyright: ignore[reportArgumentType]
            None if leaf.zero_point is None else scale,  # pyright: ignore[reportArgumentType]
            None if leaf.x_scale is None else whole,  # pyright: ignore[reportArgumentType]
            leaf.int8_inputs,
        )

    return unflatten({path: shard(path, leaf) for path, leaf in flatten(params).items()})


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """For an array whose first axis is the batch."""
    return NamedSharding(mesh, P(RULES["batch"], *(None,) * (rank - 1)))


def cache_shardings(cfg: ModelConfig, mesh: Mesh, split: bool) -> KVCache:
    """split: as of the cache."""
    by_head = NamedSharding(mesh, P(RULES["batch"], RULES["kv_heads"]))
    return jax.tree.map(lambda _: by_head, jax.eval_shape(lambda: init_cache(cfg, 1, 1, split)))
