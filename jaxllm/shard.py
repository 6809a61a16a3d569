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
from jaxllm.config import ModelConfig
from jaxllm.lm import param_info
from jaxllm.params import ParamInfo, Params, flatten, unflatten

AXES = ("stages", "data", "model", "share")
Rules = Mapping[str, str | tuple[str, ...] | None]

# Tensor parallelism (Shoeybi et al. 2019): the first matmul of each pair is split by its outputs and the second by its
# inputs, so that a block needs one sum over chips after attention and one after the feed-forward. Where there are more
# chips than KV heads, those along "share" have the same KV heads, each with query heads of its own.
RULES: Rules = {
    "batch": "data",
    "vocab": ("model", "share"),
    "heads": ("model", "share"),
    "kv_heads": "model",
    "ffw": ("model", "share"),
    "head_dim": None,
    "embed": None,
    "slots": None,
    "residual": None,
    "residual_step": None,
}
# In a chunk of prefill the residual stream is split between the parts of a block: what they add to it is scattered, and
# gathered where it is read (Korthikanti et al. 2022, but by its width instead of by tokens). As many bytes as the sums,
# and the norms' work is divided. In a decode step ("residual_step") more collectives would only wait longer.
SCATTER: Rules = {**RULES, "residual": ("model", "share")}
# The cache of chips that share KV heads is split by its slots, instead of each holding all of it.
SEQUENCE_PARALLEL: Rules = {**RULES, "slots": "share"}
# Weights are split over the batch's chips as well (Rajbhandari et al. 2020), and gathered where they are used.
FULLY_SHARDED: Rules = {**RULES, "embed": "data"}
TABLES = {"tensor": RULES, "scatter": SCATTER, "sequence": SEQUENCE_PARALLEL, "fully": FULLY_SHARDED}


def make_mesh(
    data: int = 1, model: int = 1, share: int = 1, stages: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of stages x data x model x share devices, with axes of these names; the compiler chooses inner shardings.

    data: over how many the batch is split. model x share: over how many a layer is. share: of these, how many have the
        same KV heads; for models with fewer of them than there are devices. stages: in how many runs the layers are
        split, each on a run of the devices: see `jaxllm.stages`.
    devices: all by default, of every process that joined (`hosts.join`).
    Raises ValueError when there are fewer devices than that, or a process would be left with none.
    """
    everyone = devices is None
    devices = jax.devices() if devices is None else devices
    sizes = {"stages": stages, "data": data, "model": model, "share": share}
    need = math.prod(sizes.values())
    if min(sizes.values()) < 1 or len(devices) < need:
        raise ValueError(
            f"A mesh of {' x '.join(f'{name}={size}' for name, size in sizes.items())} needs {max(need, 1)} devices; "
            f"there are {len(devices)} ({devices[0].device_kind if devices else 'none'}). Choose a smaller mesh."
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:need]}
    if everyone and idle:
        raise ValueError(
            f"A mesh of {need} of the {len(devices)} devices leaves processes {sorted(idle)} without any. Choose "
            f"data x model x share of {len(devices)}, or give devices=jax.local_devices() for this process alone."
        )
    # AxisType.Auto is said outright: jax.make_mesh's default has changed between releases.
    return Mesh(np.array(devices[:need]).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def stage_meshes(mesh: Mesh) -> list[Mesh]:
    """The mesh of each stage: a mesh of one stage."""
    return [Mesh(mesh.devices[i : i + 1], AXES, axis_types=mesh.axis_types) for i in range(mesh.shape["stages"])]


def check_mesh(cfg: ModelConfig, mesh: Mesh, batch: int, rules: Rules = RULES, slots: int = 0) -> None:
    """Raises ValueError when the mesh does not divide a sharded dimension, naming the sizes that would.

    Also when rules lack a logical axis, name an axis that no mesh has, or split one array twice over the same axis.
    mesh: of one stage. slots: of the cache; 0 where they are not known yet.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"The mesh has axes {mesh.axis_names}; expected {AXES}. jaxllm.make_mesh makes one.")
    if mesh.shape["stages"] > 1:
        raise ValueError(f"The mesh has {mesh.shape['stages']} stages; a program runs on one. See jaxllm.stages.")
    _check_rules(cfg, rules)
    sizes = {
        ("batch", "batch"): batch,
        ("slots", "slots"): slots,
        ("vocab_size", "vocab"): cfg.vocab_size,
        ("embed_dim", "embed"): cfg.embed_dim,
        ("embed_dim", "residual"): cfg.embed_dim,
        ("embed_dim", "residual_step"): cfg.embed_dim,
        ("num_kv_heads", "kv_heads"): math.gcd(*cfg.widths("num_kv_heads")),
        ("num_heads", "heads"): math.gcd(*cfg.widths("num_heads")),
        ("ffw_dim", "ffw"): math.gcd(*cfg.widths("ffw_dim")),
    }
    for (name, logical), size in sizes.items():
        axes = axes_of(rules[logical])
        if size % (chips := math.prod(mesh.shape[axis] for axis in axes)):
            split = [key for key in sizes if axes_of(rules[key[1]])[:1] == axes[:1]]
            common = math.gcd(*(sizes[key] for key in split))
            fits = [n for n in range(1, common + 1) if common % n == 0]
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
            more = " More chips may share KV heads: make_mesh(share=...)." if logical == "kv_heads" else ""
            raise ValueError(
                f"{name}={size} does not divide over the mesh's {over} ({chips} devices). "
                f"{axes[0]} may be one of {fits}.{more}"
            )


def _check_rules(cfg: ModelConfig, rules: Rules) -> None:
    if rules.keys() != RULES.keys():
        raise ValueError(f"The rules are for {sorted(rules)}; expected one for each of {sorted(RULES)}.")
    if unknown := {axis for rule in rules.values() for axis in axes_of(rule)} - set(AXES[1:]):
        raise ValueError(f"The rules split over {sorted(unknown)}; expected axes of {AXES[1:]}.")
    activations = [("batch", "residual"), ("batch", "residual_step"), ("batch", "kv_heads", "slots")]
    for logical in dict.fromkeys([*activations, *(info.axes for info in param_info(cfg).values())]):
        axes = [axis for name in logical for axis in axes_of(rules[name])]
        if twice := {axis for axis in axes if axes.count(axis) > 1}:
            given = ", ".join(f"{name}: {rules[name]}" for name in logical)
            raise ValueError(f"The rules split one array twice over {sorted(twice)}: {given}. Give each its own axis.")


def axes_of(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that a rule names."""
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def sharding(mesh: Mesh, rules: Rules, *axes: str | None) -> NamedSharding:
    """Of an array with these logical axes; None for one that is not split."""
    return NamedSharding(mesh, P(*(None if axis is None else rules[axis] for axis in axes)))


def param_shardings(cfg: ModelConfig, params: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """A NamedSharding for each array of `params`, arrays or their shapes: see `leaf_shardings`."""
    info = param_info(cfg)
    return unflatten({path: leaf_shardings(info[path], leaf, mesh, rules) for path, leaf in flatten(params).items()})


def leaf_shardings(info: ParamInfo, leaf: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Of a weight, or of a QArray's parts: its scales lie with its values where the mesh divides them.

    All devices have the scales of the whole vocabulary, where a token has one: to look a token up they then add up its
    values alone.
    """
    values = sharding(mesh, rules, *info.axes)
    if not isinstance(leaf, QArray):
        return values
    kept = leaf.scale.ndim - 1
    chips = math.prod(mesh.shape[axis] for axis in axes_of(rules[info.axes[kept]]))
    rows = [None if axis == "vocab" and leaf.groups == 1 else axis for axis in info.axes[:kept]]
    scale = sharding(mesh, rules, *rows, info.axes[kept] if leaf.groups % chips == 0 else None)
    return QArray(
        values,  # pyright: ignore[reportArgumentType]
        scale,  # pyright: ignore[reportArgumentType]
        None if leaf.zero_point is None else scale,  # pyright: ignore[reportArgumentType]
        None if leaf.x_scale is None else NamedSharding(mesh, P()),  # pyright: ignore[reportArgumentType]
        leaf.int8_inputs,
    )


def across_hosts(mesh: Mesh | None) -> bool:
    """Whether some of its devices belong to other processes, whose arrays this one cannot read."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def put(params: Params, shardings: Params) -> Params:
    """The weights where the shardings want them, those that lie there already as they are.

    Where some devices belong to other processes, each process gives its own devices their part of what it holds whole.
    """

    def one(x: jax.Array, where: NamedSharding) -> jax.Array:
        if x.is_fully_addressable and not where.is_fully_addressable:
            host = np.asarray(x)  # device_put would first ask all processes whether they have the same
            return jax.make_array_from_callback(x.shape, where, host.__getitem__)
        return jax.device_put(x, where)

    return jax.tree.map(one, params, shardings)


def to_host(x: jax.Array) -> np.ndarray:
    """An array's values, also where other processes hold parts of it: then all of them have to call this."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        mesh = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        x = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(x)
    return np.asarray(x)


def _same(x: jax.Array) -> jax.Array:  # has a name, so that it is compiled once a shape
    return x


def cache_shardings(cfg: ModelConfig, mesh: Mesh, split: bool, rules: Rules = RULES) -> KVCache:
    """split: as of the cache."""
    slots = cfg.head_dim + 1  # unlike every other extent behind the heads

    def one(part: jax.ShapeDtypeStruct) -> NamedSharding:
        last = ["slots" if size == slots else None for size in part.shape[2:]]
        return sharding(mesh, rules, "batch", "kv_heads", *last)

    return jax.tree.map(one, jax.eval_shape(lambda: init_cache(cfg, 1, slots, split)))
