"""The leaf types of a model and the one contraction that knows them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jaxllm import activations
from jaxllm.activations import Activations

INT8_MAX = 127  # of rounded activations: symmetric, -128 is unused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantised weight: w ≈ (values - zero_point) * scale, group by group.

    values: int8, int4 or float8_e4m3fn, the float weight's shape. First field: Linen checks its shape.
    scale: float > 0, [n..., G]: the kept axes, then a scale for each of G equal groups of the contracted axes taken as
        one. G = 1 is per output channel.
    zero_point: int8 like scale, what zero is stored as; None for 0.
    x_scale: float32 [], the step of activations that are rounded to int8 as well; None where it is not fixed.
    int8_inputs: whether activations are rounded to int8, so that the contraction is int8 x int8. Without x_scale each
        token has a step of its own.
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    x_scale: jax.Array | None = None
    int8_inputs: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def contracted(self) -> int:
        """How many of the last axes are contracted."""
        return self.values.ndim - self.scale.ndim + 1

    @property
    def groups(self) -> int:
        return self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of all parts, an int4 being half a byte, as on a TPU and in files. XLA on CPU gives it a whole one."""
        bits = 4 if self.values.dtype == jnp.int4 else 8
        rest = [part for part in (self.scale, self.zero_point, self.x_scale) if part is not None]
        return -(-self.size * bits // 8) + sum(part.nbytes for part in rest)


PANEL = 16  # rows of a Packed weight that lie together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A QArray of int8 or int4 as the kernels for CPUs read it: panels of 16 rows, the last filled up with zeros.

    values: [panel, K / 4, 64] int8: four values of a row lie beside those of the panel's next. Of int4 [panel, K / 8,
        64] uint8: byte i of four has value i in its low half and value i + 4 in its high half, 8 added to each.
    scale, zero_point: [panel, G, 16]. x_scale, int8_inputs: as of QArray.
    shape, contracted: of the weight.
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    x_scale: jax.Array | None
    int8_inputs: bool = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    contracted: int = dataclasses.field(metadata={"static": True})

    @property
    def kept(self) -> tuple[int, ...]:
        return self.shape[: len(self.shape) - self.contracted]

    def unpack(self) -> QArray:
        """The weight that it was made of."""
        rows = math.prod(self.kept)

        def by_row(part: jax.Array) -> jax.Array:  # [panel, G, 16] to [n..., G]
            return part.swapaxes(1, 2).reshape(-1, part.shape[1])[:rows].reshape(*self.kept, -1)

        zero_point = None if self.zero_point is None else by_row(self.zero_point)
        values_NK = _unpack(self.values.reshape(len(self.values), -1, PANEL, 4).swapaxes(1, 2))
        values = values_NK.reshape(-1, math.prod(self.shape) // rows)[:rows].reshape(self.shape)
        return QArray(values, by_row(self.scale), zero_point, self.x_scale, self.int8_inputs)

    def take(self, rows: jax.Array) -> QArray:
        """Rows [..., D] of a weight [V, D]."""

        def by_row(part: jax.Array) -> jax.Array:
            return part[rows // PANEL, :, rows % PANEL]

        zero_point = None if self.zero_point is None else by_row(self.zero_point)
        values = self.values.reshape(len(self.values), -1, PANEL, 4)[rows // PANEL, :, rows % PANEL]
        return QArray(_unpack(values).reshape(*rows.shape, -1), by_row(self.scale), zero_point)


def _unpack(bytes_k4: jax.Array) -> jax.Array:
    """[..., K / 4 or K / 8, 4] of a Packed weight to [..., K] int8."""
    if bytes_k4.dtype != jnp.uint8:
        return bytes_k4.reshape(*bytes_k4.shape[:-2], -1)
    halves = jnp.stack([bytes_k4 & 15, bytes_k4 >> 4], axis=-2)
    return (halves.astype(jnp.int8) - 8).reshape(*bytes_k4.shape[:-2], -1)


Weight = jax.Array | QArray  # of a model
Prepared = Weight | Packed  # of what runs it


def dequantize(w: Prepared) -> jax.Array:
    """The float32 weight that a QArray stands for; a float weight as it is."""
    w = w.unpack() if isinstance(w, Packed) else w
    if not isinstance(w, QArray):
        return w
    kept = w.shape[: w.scale.ndim - 1]
    return _dequantize(w.values.reshape(*kept, w.groups, -1), w.scale, w.zero_point).reshape(w.shape)


def _dequantize(values_nGg: jax.Array, scale_nG: jax.Array, zero_point_nG: jax.Array | None) -> jax.Array:
    values_nGg = values_nGg.astype(jnp.float32)
    if zero_point_nG is not None:
        values_nGg -= zero_point_nG[..., None].astype(jnp.float32)
    return values_nGg * scale_nG[..., None].astype(jnp.float32)


def take(w: Prepared | Fast, rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Looks up rows of an embedding [V, D]: [..., D] in `dtype`."""
    here = {"tpu": functools.partial(_look_up_tpu, dtype=dtype)}
    if isinstance(w, Fast):
        if w.look_up is not None:
            here[w.platform] = functools.partial(w.look_up, dtype=dtype)
        w = w.weight
    return lax.platform_dependent(w, rows, default=functools.partial(_look_up, dtype=dtype), **here)


def _look_up(w: Prepared, rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    if isinstance(w, Packed):
        taken = w.take(rows)
        values = taken.values.reshape(*rows.shape, taken.groups, -1)
        return _dequantize(values, taken.scale, taken.zero_point).reshape(*rows.shape, -1).astype(dtype)
    if isinstance(w, QArray):
        # Rows first: a dequantised table would be a float copy of the whole weight.
        zero_point = None if w.zero_point is None else w.zero_point[rows]
        values = _rows(w.values, rows).reshape(*rows.shape, w.groups, -1)
        return _dequantize(values, w.scale[rows], zero_point).reshape(*rows.shape, -1).astype(dtype)
    return _rows(w, rows).astype(dtype)


def _look_up_tpu(w: Prepared, rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Of one row alone XLA would lay the whole of an int8 table out anew."""
    length = rows.shape[-1]
    return _look_up(w, _fill(rows, rows.ndim - 1), dtype)[..., :length, :]


def _rows(values: jax.Array, rows: jax.Array) -> jax.Array:
    """values[rows]. XLA on CPU makes a whole table of float8 float32 to look rows up in it, but none of bytes."""
    if values.dtype != jnp.float8_e4m3fn:
        return values[rows]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(values, jnp.uint8)[rows], values.dtype)


def einsum(
    eqn: str,
    x: Activations,
    w: Prepared | Tap | Fast,
    dtype: DTypeLike | None = None,
    add: jax.Array | None = None,
) -> jax.Array:
    """Contracts activations with a weight of any kind.

    eqn: "bK,nK->bn", where b, n and K are groups of axes: the weight's contracted axes K come last in both operands
        and its other axes n last in the result, so that no transpose is needed.
    dtype: of the result; x's by default. Sums are accumulated in float32.
    add: is added to the result, whose shape and type it has.

    A QArray's scale multiplies the result, never the weight: the int8 values are what is read from memory.
    """
    return einsums([eqn], x, [w], dtype, add)[0]


def einsums(
    eqns: Sequence[str],
    x: Activations,
    weights: Sequence[Prepared | Tap | Fast],
    dtype: DTypeLike | None = None,
    add: jax.Array | None = None,
) -> list[jax.Array]:
    """The same activations contracted with each of several weights; in one call of a kernel that takes them all.

    Arguments as of `einsum`; add: to a single one.
    """
    out = jnp.dtype(dtype or activations.dtype(x))
    if len(weights) > 1 and not _together(weights):
        x = activations.value(x)
        return [einsum(eqn, x, w, out) for eqn, w in zip(eqns, weights, strict=True)]
    if isinstance(weights[0], Tap):
        x = activations.value(x)
        y = einsum(eqns[0], x, weights[0].weight, jnp.dtype(jnp.float32))
        weights[0].record(x, y)
        return [_plus(y.astype(out), add)]
    contracted, given = num_contracted(eqns[0]), activations.shape(x)
    leaves = [w.weight if isinstance(w, Fast | Tap) else w for w in weights]
    for eqn, w in zip(eqns, leaves, strict=True):
        if (
            num_contracted(eqn) != contracted
            or given[len(given) - contracted :] != w.shape[len(w.shape) - contracted :]
        ):
            raise ValueError(f"einsum {eqn!r}: {given} does not contract with {w.shape}.")

    def plain(contract: Contract) -> Callable[..., list[jax.Array]]:
        def each(x: Activations, weights: Sequence[Prepared], add: jax.Array | None) -> list[jax.Array]:
            value = activations.value(x)
            return [_plus(contract(contracted, value, w, out).astype(out), add) for w in weights]

        return each

    here = {"cpu": plain(contract_cpu), "tpu": plain(_contract_filled), "cuda": plain(contract_gpu)}
    if isinstance(weights[0], Fast):
        here[weights[0].platform] = functools.partial(weights[0].contract, contracted, out=out)
    return lax.platform_dependent(x, leaves, add, default=plain(_contract), **here)


def _plus(y: jax.Array, add: jax.Array | None) -> jax.Array:
    return y if add is None else add + y


def _together(weights: Sequence[Prepared | Tap | Fast]) -> bool:
    """Whether one kernel takes them all."""
    first = weights[0]
    return isinstance(first, Fast) and all(
        isinstance(w, Fast) and (w.contract, w.platform) == (first.contract, first.platform) for w in weights
    )


def num_contracted(eqn: str) -> int:
    """How many of the weight's axes, the last ones, `eqn` sums over. Refuses every other form of equation."""
    operands, _, out = eqn.partition("->")
    x, _, w = operands.partition(",")
    kept = len(w)
    while kept and not out.endswith(w[:kept]):
        kept -= 1
    contracted = w[kept:]
    if not contracted or not x.endswith(contracted) or out != x.removesuffix(contracted) + w[:kept]:
        raise ValueError(f'einsum {eqn!r} is not of the form "bK,nK->bn".')
    return len(contracted)


def _contract(contracted: int, x: jax.Array, w: Prepared, out: DTypeLike = jnp.float32) -> jax.Array:
    """[b..., K...] and [n..., K...] to float32 [b..., n...]. A TPU's matmul takes the int8 values as they are.

    out: of the matmul alone, which accumulates in float32 in any case. In bfloat16, what chips add up among themselves
        is half as much.
    """
    w = w.unpack() if isinstance(w, Packed) else w
    if not isinstance(w, QArray):
        axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(w.ndim - contracted, w.ndim))
        return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=out).astype(jnp.float32)
    batch, kept = x.shape[: x.ndim - contracted], w.shape[: len(w.shape) - contracted]
    x_MK, flat = x.reshape(math.prod(batch), -1), as_matrix(w)
    if w.int8_inputs:
        return _int8_dot(x_MK, flat).reshape(*batch, *kept)
    if w.groups == 1:
        y_MN = _dot(x_MK, flat.values.astype(x.dtype), out).astype(jnp.float32) * _row(flat.scale)
        return shift(y_MN, x_MK, flat).reshape(*batch, *kept)
    # The scale multiplies each group's partial sum: scaling the weight would write a float copy of it.
    x_GMg = x_MK.reshape(x_MK.shape[0], w.groups, -1).transpose(1, 0, 2)
    values_NGg = flat.values.reshape(flat.shape[0], w.groups, -1).astype(x.dtype)
    y_GMN = lax.dot_general(x_GMg, values_NGg, (((2,), (2,)), ((0,), (1,))), preferred_element_type=jnp.float32)
    scale_NG = flat.scale.astype(jnp.float32)
    y_MN = jnp.einsum("GMN,NG->MN", y_GMN, scale_NG, preferred_element_type=out).astype(jnp.float32)
    return shift(y_MN, x_MK, flat).reshape(*batch, *kept)


def _contract_filled(contracted: int, x: jax.Array, w: Prepared, out: DTypeLike) -> jax.Array:
    """The same; with few rows XLA would leave the matmul units, which are faster, to others."""
    last = x.ndim - contracted - 1
    y = _contract(contracted, _fill(x, last), w, out)
    return lax.slice_in_dim(y, 0, x.shape[last], axis=last)


def contract_gpu(contracted: int, x: jax.Array, w: Prepared, out: DTypeLike) -> jax.Array:
    """As `_contract`, of what XLA on GPU does well: of one row of float weights, a sum of products, in float32; of int8
    with a scale a channel, more rows, for without tensor cores each value is made float for a single product."""
    batch, kept = x.shape[: x.ndim - contracted], w.shape[: len(w.shape) - contracted]
    rows = math.prod(batch)
    if _split_on_gpu(rows, w):
        assert isinstance(w, QArray)
        x_MK, flat = x.reshape(rows, -1), as_matrix(w)
        y_MN = _split_dot(x_MK.astype(jnp.float32), flat.values) * _row(flat.scale)
        return shift(y_MN, x_MK, flat).reshape(*batch, *kept)
    if rows == 1 and isinstance(w, QArray) and w.groups == 1:
        return _contract_filled(contracted, x, w, out)
    if rows != 1 or isinstance(w, Packed | QArray):
        return _contract(contracted, x, w, out)
    x_1K = x.reshape(*(1,) * len(kept), *w.shape[len(kept) :])
    products = w.astype(jnp.float32) * x_1K.astype(jnp.float32)
    return jnp.sum(products, axis=tuple(range(len(kept), w.ndim))).reshape(*batch, *kept)


_SPLIT_SIZE = 2**25  # of a weight, from which on


def _split_on_gpu(rows: int, w: Prepared) -> bool:
    """Whether int8 tensor cores are to take the rows, each as two: with some dozens of rows, and so large a weight,
    that takes less time than making the weight float, though rounding the rows is two kernels more."""
    if not isinstance(w, QArray) or w.values.dtype != jnp.int8 or w.groups > 1 or w.int8_inputs:
        return False
    return 16 <= rows <= 64 and math.prod(w.shape) >= _SPLIT_SIZE


_MATMUL_ROWS = 8


def _fill(x: jax.Array, last: int) -> jax.Array:
    """x with zeros behind its axis `last`, where it and those before it are fewer rows than matmul units take at once.

    The last of them: it is tokens, while those of the batch may lie on several devices.
    """
    if not 0 < math.prod(x.shape[: last + 1]) < _MATMUL_ROWS:
        return x
    return jnp.pad(x, [(0, _MATMUL_ROWS - size if axis == last else 0) for axis, size in enumerate(x.shape)])


def as_matrix(w: QArray) -> QArray:
    """The same weight as [N, K]."""
    rows = math.prod(w.scale.shape[:-1])
    zero_point = None if w.zero_point is None else w.zero_point.reshape(rows, -1)
    return QArray(w.values.reshape(rows, -1), w.scale.reshape(rows, -1), zero_point, w.x_scale, w.int8_inputs)


def _row(scale_N1: jax.Array) -> jax.Array:
    return scale_N1.reshape(1, -1).astype(jnp.float32)


def shift(y_MN: jax.Array, x_MK: jax.Array, w: QArray) -> jax.Array:
    """Takes the zero points' part out of a contraction with the values alone."""
    if w.zero_point is None:
        return y_MN
    sums_MG = jnp.sum(x_MK.reshape(x_MK.shape[0], w.groups, -1).astype(jnp.float32), axis=-1)
    return y_MN - _dot(sums_MG, w.zero_point.astype(jnp.float32) * w.scale.astype(jnp.float32))


def _dot(x_MK: jax.Array, w_NK: jax.Array, out: DTypeLike = jnp.float32) -> jax.Array:
    return lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _int8_dot(x_MK: jax.Array, w: QArray) -> jax.Array:
    """x, rounded to int8, times the values, in integers; one scale a channel."""
    x_MK = x_MK.astype(jnp.float32)
    step = _step(x_MK) if w.x_scale is None else w.x_scale.reshape(1, 1)
    rounded_MK = jnp.clip(jnp.round(x_MK / step), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    y_MN = _dot(rounded_MK, w.values.astype(jnp.int8), jnp.int32).astype(jnp.float32) * _row(w.scale)
    return shift(y_MN, rounded_MK, w) * step


def _step(x_MK: jax.Array) -> jax.Array:
    absmax_M1 = jnp.max(jnp.abs(x_MK), axis=1, keepdims=True)
    return jnp.where(absmax_M1 == 0, 1.0, absmax_M1 / INT8_MAX)  # of NaN it is NaN, whose int8 would be 0


# XLA on CPU has fast kernels for float32 and, from two rows on, for bfloat16 and for int8 x int8. Everything else falls
# into a naive loop: one row of bfloat16, or int8 converted to float32, runs at less than a tenth of the speed.
# The forms below stay on the fast kernels.
_SPLIT_MAX_ROWS = 127  # from here on, float32 blocks are the faster form
_BLOCKS = 4


def contract_cpu(contracted: int, x: jax.Array, w: Prepared, out: DTypeLike = jnp.float32) -> jax.Array:
    """As `_contract`, of what XLA on CPU does well. Always float32."""
    w = w.unpack() if isinstance(w, Packed) else w
    kept = w.shape[: len(w.shape) - contracted]
    batch = x.shape[: x.ndim - contracted]
    x_MK = x.reshape(math.prod(batch), -1)
    if isinstance(w, QArray):
        y_MN = _contract_quantised_cpu(x_MK.astype(jnp.float32), as_matrix(w))
    elif x.dtype == w.dtype == jnp.bfloat16:
        y_MN = _bfloat16_dot(x_MK, w.reshape(math.prod(kept), -1))
    else:
        y_MN = _dot(x_MK, w.reshape(math.prod(kept), -1))
    return y_MN.reshape(*batch, *kept)


@jax.custom_vjp
def _bfloat16_dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Float32 [M, N] by the kernel for bfloat16, which runs at twice the rate of float32: gradients too."""
    return _dot(jnp.concatenate([x_MK, x_MK]), w_NK)[:1] if len(x_MK) == 1 else _dot(x_MK, w_NK)


def _bfloat16_dot_forward(x_MK: jax.Array, w_NK: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_dot(x_MK, w_NK), (x_MK, w_NK)


def _bfloat16_dot_backward(kept: tuple[jax.Array, jax.Array], d_y_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MK, w_NK = kept
    d_y_MN = d_y_MN.astype(jnp.bfloat16)
    # The kernel wants the left operand's contracted axis last and the result as it is written here. Not told so, XLA
    # would transpose within the matmul, and go through float32.
    d_x_MK = _row_major(lax.dot(d_y_MN, w_NK, preferred_element_type=jnp.float32))
    d_w_NK = _row_major(lax.dot(_row_major(d_y_MN.T), x_MK, preferred_element_type=jnp.float32))
    return d_x_MK.astype(x_MK.dtype), d_w_NK.astype(w_NK.dtype)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


_bfloat16_dot.defvjp(_bfloat16_dot_forward, _bfloat16_dot_backward)


def _contract_quantised_cpu(x_MK: jax.Array, w: QArray) -> jax.Array:
    rows = x_MK.shape[0]
    if w.int8_inputs:
        return _int8_dot(jnp.concatenate([x_MK, x_MK]) if rows == 1 else x_MK, w)[:rows]
    if w.groups > 1 or w.values.dtype == jnp.float8_e4m3fn or rows > _SPLIT_MAX_ROWS:
        return _blocked_dot(x_MK, w)
    return shift(_split_dot(x_MK, w.values.astype(jnp.int8)) * _row(w.scale), x_MK, w)


def _split_dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """float32 x times int8 w by two int8 rows for each row of x: x ≈ step * (high + low / 254).

    `low` is what rounding to `high` lost, so x keeps 16 bits (relative error 2e-5 of its largest element), and the
    weight is still read once: the kernel wants at least two rows anyway.
    """
    step_M1 = _step(x_MK)
    scaled_MK = x_MK / step_M1
    high_MK = jnp.round(scaled_MK)
    low_MK = jnp.round((scaled_MK - high_MK) * (2 * INT8_MAX))
    rows = jnp.concatenate([high_MK, low_MK]).astype(jnp.int8)
    high_MN, low_MN = jnp.split(_dot(rows, w_NK, jnp.int32).astype(jnp.float32), 2)
    return (high_MN + low_MN / (2 * INT8_MAX)) * step_M1


def _blocked_dot(x_MK: jax.Array, w: QArray) -> jax.Array:
    """float32 x times w, one block of w's rows after the other, so that no float copy of the whole weight exists.

    Left alone, XLA makes all blocks of all weights float first, and in a loop of decode steps before the loop.
    """
    x_MK, w = lax.optimization_barrier((x_MK, w))  # what the weight is made float from seems to change in a loop
    size = -(-w.shape[0] // _BLOCKS)
    blocks, before = [], x_MK[0, 0]
    for start in range(0, w.shape[0], size):
        values, scale, zero_point = (
            None if part is None else part[start : start + size] for part in (w.values, w.scale, w.zero_point)
        )
        assert values is not None
        assert scale is not None
        scale = scale.astype(jnp.float32) + before * 0  # zero, though XLA may not assume so of a float: wait
        blocks.append(_dot(x_MK, dequantize(QArray(values, scale, zero_point))))
        before = blocks[-1][0, 0]
    return jnp.concatenate(blocks, axis=1)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A weight that shows whoever made it what it is applied to; see `calibrate`."""

    weight: Weight
    record: Callable[[jax.Array, jax.Array], None]  # called with x and the float32 result, while tracing


jax.tree_util.register_dataclass(Tap, data_fields=["weight"], meta_fields=["record"])


Contract = Callable[..., jax.Array]  # (how many axes are contracted, x, w, out) -> [b..., n...], float32 or `out`
# (how many axes are contracted, activations, weights, what is added to a single result or None, out=) -> results in out
Kernel = Callable[..., list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Fast:
    """A weight with kernels that contract it, and look rows up in it, in XLA's place on one platform; see `kernels`.

    look_up: as `take`; None for XLA's own.
    """

    weight: Prepared
    contract: Kernel
    platform: str
    look_up: Callable[..., jax.Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape
