"""Leaves as jaxllm's own files have them: what describes a weight, and the plain arrays that stand for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import QArray, Weight
from jaxllm.checkpoint.names import listing
from jaxllm.checkpoint.place import Place, put_host
from jaxllm.config import ModelConfig
from jaxllm.lm import param_info
from jaxllm.params import ParamInfo

_VALUES = ("int8", "int4", "float8_e4m3fn")
_SCALES = ("float32", "bfloat16", "float16")
_CHUNK = 1 << 24  # weights of a sparse leaf that are spread out at a time; a multiple of 8

Description = Mapping[str, Any]  # JSON
Fields = dict[str, Any]  # the arrays of one leaf, by name


def describe(leaf: Weight) -> dict[str, Any]:
    """A weight's kind, shape and type, as JSON. `encode` says more where a float weight is stored sparse."""
    if not isinstance(leaf, QArray):
        return {"kind": "array", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return {
        "kind": "qarray",
        "shape": list(leaf.shape),
        "dtype": str(leaf.values.dtype),
        "groups": leaf.groups,
        "scale_dtype": str(leaf.scale.dtype),
        "zero_point": leaf.zero_point is not None,
        "x_scale": leaf.x_scale is not None,
        "int8_inputs": leaf.int8_inputs,
    }


def check_leaves(cfg: ModelConfig, leaves: Mapping[str, Description], source: str) -> None:
    """Raises ValueError when the weights described are not those of `cfg`, or of no kind that `describe` knows."""
    if cfg.num_layers > len(leaves):
        raise ValueError(f"{source} holds {len(leaves)} weights but claims {cfg.num_layers} layers.")
    info = param_info(cfg)
    if missing := [key for key in info if key not in leaves]:
        raise ValueError(f"{source} lacks {listing(missing)}.")
    if unexpected := [key for key in leaves if key not in info]:
        raise ValueError(f"{source} has {listing(unexpected)}, which its config does not.")
    for key, leaf in leaves.items():
        if leaf["kind"] == "qarray" and not info[key].contracted:
            raise ValueError(f"{source}: {key} is quantised, and is no matmul weight.")
        if dict(leaf) != (expected := _sound(leaf, info[key], cfg.dtype)):
            raise ValueError(f"{source}: {key} is {dict(leaf)}; its config makes it {expected}.")


def _sound(leaf: Description, info: ParamInfo, dtype: str) -> dict[str, Any]:
    """The nearest description that can be."""
    shape = list(info.shape)
    if leaf["kind"] == "sparse":
        count = leaf["nonzeros"]
        known = type(count) is int and 0 <= count <= math.prod(shape)
        return {"kind": "sparse", "shape": shape, "dtype": dtype, "nonzeros": count if known else math.prod(shape)}
    if leaf["kind"] != "qarray":
        return {"kind": "array", "shape": shape, "dtype": dtype}
    width = math.prod(shape[len(shape) - info.contracted :])
    values = leaf["dtype"] if leaf["dtype"] in _VALUES else "int8"
    groups = leaf["groups"]
    groups = groups if type(groups) is int and 0 < groups <= width and width % groups == 0 else 1
    int8_inputs = leaf["int8_inputs"] is True and groups == 1 and values == "int8"
    return {
        "kind": "qarray",
        "shape": shape,
        "dtype": values,
        "groups": groups,
        "scale_dtype": leaf["scale_dtype"] if leaf["scale_dtype"] in _SCALES else "float32",
        "zero_point": leaf["zero_point"] is True and values != "float8_e4m3fn",
        "x_scale": leaf["x_scale"] is True and int8_inputs,
        "int8_inputs": int8_inputs,
    }


def encode(leaf: Weight) -> tuple[dict[str, Any], Fields]:
    """What describes a leaf, and the arrays to store.

    An int4 is half a byte. A float weight with zeros enough is a bit for each weight, whether it is there, and those
    that are; -0.0 is there.
    """
    described = describe(leaf)
    if not isinstance(leaf, QArray):
        nonzeros = int(_count(leaf))
        if -(-leaf.size // 8) + nonzeros * leaf.dtype.itemsize >= leaf.nbytes:
            return described, {"array": leaf}
        return described | {"kind": "sparse", "nonzeros": nonzeros}, _squeeze(leaf, nonzeros)
    fields = {"values": _pack(leaf.values) if leaf.values.dtype == jnp.int4 else leaf.values, "scale": leaf.scale}
    return described, fields | {
        name: part for name, part in (("zero_point", leaf.zero_point), ("x_scale", leaf.x_scale)) if part is not None
    }


def expected(leaf: Description, info: ParamInfo, dtype: str, place: Place | None = None) -> Any:
    """The weight that a description stands for: shapes and types, and where a place is given, shardings.

    dtype: that floats are to be read as.
    """

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    out: Any = array(info.shape, leaf["dtype"] if leaf["kind"] == "qarray" else dtype)
    if leaf["kind"] == "qarray":
        scales = (*info.shape[: len(info.shape) - info.contracted], leaf["groups"])
        zero_point = array(scales, "int8") if leaf["zero_point"] else None
        x_scale = array((), "float32") if leaf["x_scale"] else None
        out = QArray(out, array(scales, leaf["scale_dtype"]), zero_point, x_scale, leaf["int8_inputs"])  # pyright: ignore
    if place is None:
        return out
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), out, place(info, out))


def stored(leaf: Description, weight: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that `encode` made of a leaf so described, by name, and where to read them to.

    weight: `expected` of it. What has another form in memory than in the file is read whole, onto one device.
    """

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    size = math.prod(weight.shape)
    if leaf["kind"] == "array":
        return {"array": array(weight.shape, weight.dtype, weight.sharding)}
    if leaf["kind"] == "sparse":
        return {"mask": array((-(-size // 8),), "uint8"), "values": array((max(1, leaf["nonzeros"]),), weight.dtype)}
    parts = {"values": weight.values, "scale": weight.scale, "zero_point": weight.zero_point, "x_scale": weight.x_scale}
    fields = {name: array(part.shape, part.dtype, part.sharding) for name, part in parts.items() if part is not None}
    return fields | ({"values": array((-(-size // 2),), "uint8")} if leaf["dtype"] == "int4" else {})


def decode(leaf: Description, fields: Fields, weight: Any) -> Weight:
    """The inverse of `encode`. Empties `fields`, so that no array is held longer than it is needed.

    weight: `expected` of the leaf.
    Raises ValueError for a sparse leaf whose bits are not as many as its values.
    """
    if leaf["kind"] == "array":
        return fields.pop("array")
    shape = tuple(leaf["shape"])
    if leaf["kind"] == "sparse":
        host = _spread(np.asarray(fields.pop("mask")), np.asarray(fields.pop("values"))[: leaf["nonzeros"]], shape)
        return put_host(host, weight.sharding)
    values = fields.pop("values")
    if leaf["dtype"] == "int4":
        # By way of the host, for one device as well: on CPU a program compiled ahead refuses what _unpack makes, taking
        # its layout for another (jax 0.10).
        values = put_host(np.asarray(_unpack(values, shape)), weight.values.sharding)
    out = QArray(values, int8_inputs=leaf["int8_inputs"], **fields)
    fields.clear()
    return out


@jax.jit
def _count(w: jax.Array) -> jax.Array:
    """How many are not +0.0. By their bits: -0.0 compares equal to zero."""
    return jnp.sum(_bits(w) != 0)


def _bits(w: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(w, jnp.uint32 if w.dtype.itemsize == 4 else jnp.uint16)


def _squeeze(w: jax.Array, nonzeros: int) -> Fields:
    flat = np.asarray(w.reshape(-1))
    mask = np.empty(-(-flat.size // 8), np.uint8)
    values, filled = np.zeros(max(1, nonzeros), flat.dtype), 0  # Orbax has no arrays of nothing
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        there = part.view(np.dtype(f"u{part.itemsize}")) != 0
        mask[start // 8 : -(-(start + part.size) // 8)] = np.packbits(there)
        found = part[there]
        values[filled : filled + found.size] = found
        filled += found.size
    return {"mask": jnp.asarray(mask), "values": jnp.asarray(values)}


def _spread(mask: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out, used = np.zeros(math.prod(shape), values.dtype), 0
    for start in range(0, out.size, _CHUNK):
        part = out[start : start + _CHUNK]
        there = np.unpackbits(mask[start // 8 :][: -(-part.size // 8)], count=part.size).view(bool)
        count = int(there.sum())
        if used + count > values.size:
            raise ValueError(f"its mask marks more than its {values.size} values")
        part[there] = values[used : used + count]
        used += count
    if used < values.size:
        raise ValueError(f"its mask marks {used} of its {values.size} values")
    return out.reshape(shape)


@jax.jit
def _pack(values: jax.Array) -> jax.Array:
    """Two to a byte, the first in the low half."""
    flat = values.astype(jnp.int8).reshape(-1)
    pairs = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2).astype(jnp.uint8)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


@functools.partial(jax.jit, static_argnums=1)
def _unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jnp.stack([packed << 4, packed], axis=1).astype(jnp.int8)
    return (pairs >> 4).reshape(-1)[: math.prod(shape)].reshape(shape).astype(jnp.int4)
