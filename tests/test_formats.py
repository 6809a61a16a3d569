"""Grids of quantised weights: what every format promises, and the same numbers as Qwix, which others wrote."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.arrays import dequantize
from jaxllm.formats import as_groups, check_group, grid, parse, quantize, round_to

INTEGER = [
    f"int{bits}{group}{affine}" for bits in (4, 8) for group in ("", "-g16", "-g32") for affine in ("", "-affine")
]
FORMATS = [*INTEGER, "fp8", "w8a8", "w8a8-static"]


def weight(shape=(24, 64), seed=0, dtype=jnp.float32):
    """Rows of very different size, a tenth zeros, one row of nothing else, one of one value, one without sign."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 2, (shape[0], *[1] * (len(shape) - 1)))
    w[rng.random(shape) < 0.1] = 0
    w[0], w[1], w[2] = 0, -0.37, np.abs(w[2])
    return jnp.asarray(w, dtype)


def per_value(part, fmt, w):
    """Of scales or zero points: one for each weight, float64."""
    group = fmt.group or w.size // w.shape[0]
    return np.repeat(np.asarray(part, np.float64).reshape(-1), group).reshape(w.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", INTEGER)
def test_no_weight_moves_by_more_than_half_a_step(name, dtype):
    fmt, w = parse(name), weight(dtype=dtype)
    q = quantize(w, 1, fmt)
    assert q.scale.dtype == (jnp.float32 if fmt.group is None else jnp.bfloat16)
    error = np.abs(np.asarray(dequantize(q), np.float64) - np.asarray(w, np.float64))
    # Halves of a step exist in bfloat16; the arithmetic is float32.
    assert np.all(error <= per_value(q.scale, fmt, w) / 2 + np.abs(np.asarray(w, np.float64)) * 2.0**-22)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_in_every_format(name):
    w = weight()
    assert np.all(np.asarray(dequantize(quantize(w, 1, parse(name))))[np.asarray(w) == 0] == 0)


def test_fp8_keeps_three_bits_of_each_value_and_the_largest_exactly():
    w = weight()
    q = quantize(w, 1, parse("fp8"))
    scale = per_value(q.scale, parse("fp8"), w)
    error = np.abs(np.asarray(dequantize(q)) - np.asarray(w))
    # Half a step of e4m3: 2^-4 of the value, and no less than half of the least, 2^-9 of scale.
    assert np.all(error <= np.maximum(np.abs(w) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-5))
    np.testing.assert_allclose(np.abs(dequantize(q)).max(1), np.abs(w).max(1), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in INTEGER if "-g" in name])
def test_a_scale_kept_in_bfloat16_is_rounded_up(name):
    """Rounded down, the grid would end before the largest weight."""
    fmt = parse(name)
    groups = as_groups(weight(), fmt, 1)
    stored, _ = grid(groups, fmt)
    exact, _ = grid(groups, dataclasses.replace(fmt, scale_dtype="float32"))
    ratio = np.asarray(stored, np.float64) / np.asarray(exact, np.float64)
    assert np.all((ratio >= 1) & (ratio <= 1 + 2.0**-7))


@pytest.mark.parametrize("name", ["int8", "int4-g16", "int8-g16-affine"])
def test_two_contracted_axes_are_one(name):
    w = weight((6, 4, 16))
    q, flat = quantize(w, 2, parse(name)), quantize(w.reshape(6, 64), 1, parse(name))
    np.testing.assert_array_equal(q.values.reshape(6, 64), flat.values)
    np.testing.assert_array_equal(q.scale, flat.scale)
    assert (q.shape, q.contracted, q.groups) == (w.shape, 2, 64 // (parse(name).group or 64))


@pytest.mark.parametrize("name", INTEGER)
def test_clipping_to_less_of_the_range_clips_to_the_grids_end(name):
    fmt, w = parse(name), weight()[3:]
    q = quantize(w, 1, fmt, 0.5)
    values = np.asarray(q.values, np.int32)
    ends = (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)
    assert ends[0] <= values.min()
    assert values.max() == ends[1]
    limit = np.abs(np.asarray(as_groups(w, fmt, 1))).max(-1) * 0.5
    # A symmetric grid has one value more below zero than above; a scale in bfloat16 is rounded up.
    reach = limit.max(1) * (1 + 1 / (2**fmt.bits - 1)) * (1 + 2.0**-7)
    assert np.all(np.abs(np.asarray(dequantize(q))).max(1) <= reach)


def test_int4_takes_half_a_byte_a_value():
    q = quantize(weight(), 1, parse("int4-g32-affine"))
    assert q.nbytes == 24 * 64 // 2 + 24 * 2 * 2 + 24 * 2  # values, bfloat16 scales, int8 zero points


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_is_parsed_to_the_format_of_that_name(name):
    assert parse(name).name == name


@pytest.mark.parametrize("name", ["int7", "int4-g0", "int4-g", "int4-g9999999", "fp8-g32", "", "INT8", "int8 "])
def test_a_bad_name_lists_the_formats(name):
    with pytest.raises(ValueError, match=r"is no format of weights\. There are int8, int8-gN, int4.*fp8, w8a8"):
        parse(name)


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"int4-g48: layers_0/mlp/up/w contracts 64 .* \[16, 32, 64\] would"):
        check_group(parse("int4-g48"), (10, 64), 1, "layers_0/mlp/up/w")
    check_group(parse("int4-g48"), (10, 3, 16), 2, "layers_0/attn/o/w")


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*INTEGER, "fp8"])
def test_rounding_to_nearest_equals_qwix(name, dtype):
    qwix = pytest.importorskip("qwix._src.core.qarray", reason="the peer extra is not installed")
    fmt, w = dataclasses.replace(parse(name), scale_dtype="float32"), weight((48, 96), 1, dtype)
    how = qwix.HowToQuantize(
        qtype=fmt.values,
        channelwise_axes=(0,),
        tiled_axes={} if fmt.group is None else {1: fmt.group},
        calibration_method="minmax" if fmt.affine else "absmax",
    )
    theirs, ours = qwix.quantize(w.astype(jnp.float32), how), quantize(w, 1, fmt)
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=3e-7)
    if fmt.affine:
        np.testing.assert_array_equal(ours.zero_point, theirs.zero_point.astype(jnp.int8))
    off = np.abs(np.asarray(ours.values, np.float32) - np.asarray(theirs.qvalue, np.float32))
    if fmt.affine:  # Qwix adds the zero point and then rounds halves to even, so an odd one turns a tie round
        steps = np.asarray(w, np.float64) / per_value(ours.scale, fmt, w)
        tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
        assert off[tie].max(initial=0) <= 1
        assert off[~tie].max() == 0
        assert (off > 0).mean() < 0.005  # measured: none in float32, 0.002 in bfloat16
    else:
        assert off.max() == 0


def test_rounding_is_to_the_nearest_value_of_the_grid():
    fmt = parse("int4-affine")
    w = jnp.linspace(-1.0, 3.0, 1001)[None, None]
    scale, zero_point = grid(w, fmt)
    values = np.asarray(round_to(w, fmt, scale, zero_point), np.float64)[0, 0]
    levels = (np.arange(-8, 8) - int(zero_point[0, 0])) * float(scale[0, 0])
    nearest = np.abs(np.asarray(w)[0, 0][:, None] - levels[None]).min(1)
    chosen = np.abs(np.asarray(w)[0, 0] - (values - int(zero_point[0, 0])) * float(scale[0, 0]))
    np.testing.assert_allclose(chosen, nearest, atol=1e-6)
