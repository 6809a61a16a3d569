"""Number formats of quantised weights: their names, their grids, and rounding to them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.arrays import QArray

Values = Literal["int4", "int8", "float8_e4m3fn"]
Inputs = Literal["float", "dynamic", "static"]

NAMES = "int8, int8-gN, int4, int4-gN, each also with -affine, fp8, w8a8, w8a8-static"
_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored.

    values: type of each value.
    group: how many values along the contracted axes share a scale; None for a whole output channel.
    affine: whether each group has a zero point: its range [a, b], which includes 0, is cut into 2^bits - 1 steps.
        Otherwise the grid is symmetric, of 2^bits values from -absmax to absmax, whose middle is exactly zero.
    inputs: "dynamic" and "static" round activations to int8 as well, with a step for each token, or one step that
        calibration fixes.
    scale_dtype: of the scales. In bfloat16 the values are rounded with the scale as it is stored, so nothing is lost.
    """

    values: Values
    group: int | None = None
    affine: bool = False
    inputs: Inputs = "float"
    scale_dtype: str = "float32"

    @property
    def name(self) -> str:
        """The inverse of `parse`."""
        if self.inputs != "float":
            return "w8a8" if self.inputs == "dynamic" else "w8a8-static"
        if self.values == "float8_e4m3fn":
            return "fp8"
        group = "" if self.group is None else f"-g{self.group}"
        return f"{self.values}{group}{'-affine' if self.affine else ''}"

    @property
    def bits(self) -> int:
        return 4 if self.values == "int4" else 8

    def bits_per_weight(self, width: int) -> float:
        """With scales and zero points. width: how many values of the weight are contracted."""
        beside = 8 * jnp.dtype(self.scale_dtype).itemsize + (8 if self.affine else 0)
        return self.bits + beside / (self.group or width)


def parse(name: str) -> Format:
    """parse("int4-g32-affine"). Raises ValueError with the names there are."""
    fixed = {
        "fp8": Format("float8_e4m3fn"),
        "w8a8": Format("int8", inputs="dynamic"),
        "w8a8-static": Format("int8", inputs="static"),
    }
    if name in fixed:
        return fixed[name]
    found = re.fullmatch(r"(int4|int8)(?:-g([1-9]\d{0,5}))?(-affine)?", name)
    if not found:
        raise ValueError(f"{name!r} is no format of weights. There are {NAMES}.")
    values: Values = "int4" if found[1] == "int4" else "int8"
    group = int(found[2]) if found[2] else None
    return Format(values, group, bool(found[3]), scale_dtype="float32" if group is None else "bfloat16")


def check_group(fmt: Format, shape: tuple[int, ...], contracted: int, path: str) -> None:
    """Raises ValueError when the groups do not divide the weight."""
    width = math.prod(shape[len(shape) - contracted :])
    if fmt.group is not None and width % fmt.group:
        fits = [size for size in (16, 32, 64, 128, 256) if width % size == 0]
        raise ValueError(
            f"{fmt.name}: {path} contracts {width} values, which groups of {fmt.group} do not divide. "
            f"Groups of {fits} would; or give this weight another format by a rule."
        )


def as_groups(w: jax.Array, fmt: Format, contracted: int) -> jax.Array:
    """float32 [n..., G, g]."""
    kept = w.shape[: w.ndim - contracted]
    width = math.prod(w.shape[w.ndim - contracted :])
    return w.astype(jnp.float32).reshape(*kept, width // (fmt.group or width), -1)


def grid(w_nGg: jax.Array, fmt: Format, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point, [n..., G], that cover the values' range, or `shrink` times it.

    A range of nothing gets scale 1. The symmetric grid's outermost values reach half a step further than their
    centres, so that no |w - dequantised w| is above scale / 2 without shrinking.
    """
    if fmt.affine:
        low = jnp.minimum(jnp.min(w_nGg, axis=-1), 0.0) * shrink
        high = jnp.maximum(jnp.max(w_nGg, axis=-1), 0.0) * shrink
        scale = _stored((high - low) / (2**fmt.bits - 1), fmt)
        lowest = -(2 ** (fmt.bits - 1))
        return scale, jnp.round(lowest - low / scale.astype(jnp.float32)).astype(jnp.int8)
    absmax = jnp.max(jnp.abs(w_nGg), axis=-1) * shrink
    largest = _FP8_MAX if fmt.values == "float8_e4m3fn" else 2 ** (fmt.bits - 1) - 0.5
    return _stored(absmax / largest, fmt), None


def _stored(scale: jax.Array, fmt: Format) -> jax.Array:
    """In the type that it is kept in, rounded up, so that the grid still covers the range."""
    scale = jnp.where(scale > 1e-30, scale, 1.0)
    if fmt.scale_dtype == "float32":
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0xFFFF) & jnp.uint32(0xFFFF0000), jnp.float32).astype(fmt.scale_dtype)


def round_to(w_nGg: jax.Array, fmt: Format, scale_nG: jax.Array, zero_point_nG: jax.Array | None) -> jax.Array:
    """The nearest values on the grid, in float32."""
    scaled = w_nGg / scale_nG[..., None].astype(jnp.float32)
    if fmt.values == "float8_e4m3fn":
        return jnp.clip(scaled, -_FP8_MAX, _FP8_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    rounded = jnp.round(scaled)
    if zero_point_nG is not None:
        rounded += zero_point_nG[..., None].astype(jnp.float32)
    half = 2 ** (fmt.bits - 1)
    return jnp.clip(rounded, -half, half - 1)


def quantize(w: jax.Array, contracted: int, fmt: Format, shrink: jax.Array | float = 1.0) -> QArray:
    """Rounds a weight, whose last `contracted` axes are summed over, to the nearest values of a format.

    shrink: scalar or [n..., G], how much of each group's range is kept; what is outside is clipped.
    Zeros stay zeros. Static activations get their step later: x_scale is None.
    """
    w_nGg = as_groups(w, fmt, contracted)
    scale, zero_point = grid(w_nGg, fmt, shrink)
    values = round_to(w_nGg, fmt, scale, zero_point).reshape(w.shape).astype(fmt.values)
    return QArray(values, scale, zero_point, int8_inputs=fmt.inputs != "float")
