import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import arrays, formats
from jaxllm.arrays import QArray

INT8 = formats.parse("int8")


def weight(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("shape", "contracted"), [((7, 5, 12), 1), ((9, 3, 4), 2), ((5, 1), 1)])
def test_rounding_error_is_at_most_half_a_step_and_zeros_stay(shape, contracted):
    w = weight(shape).at[0].set(0.0).at[1, 0].set(0.0)
    q = formats.quantize(w, contracted, INT8)
    assert q.values.dtype == jnp.int8
    assert q.scale.shape == (*shape[: len(shape) - contracted], 1)
    error = jnp.abs(arrays.dequantize(q) - w)
    scale = q.scale.reshape(q.scale.shape[:-1] + (1,) * contracted)
    assert bool(jnp.all(error <= scale / 2 * (1 + 1e-5)))
    assert bool(jnp.all(q.values[w == 0] == 0))
    assert int(jnp.max(jnp.abs(q.values))) == 127


@pytest.mark.parametrize("rows", [1, 2, 5, 127, 128, 300])
def test_every_form_of_the_cpu_contraction_equals_float64(rows):
    q = formats.quantize(weight((10, 3, 64)), 1, INT8)
    x = weight((rows, 64), seed=1) * jnp.asarray(10.0 ** np.arange(rows).clip(0, 5)[:, None], jnp.float32)
    y = arrays.einsum("BK,NHK->BNH", x, q)
    exact = np.einsum("bk,nhk->bnh", np.asarray(x, np.float64), np.asarray(arrays.dequantize(q), np.float64))
    # 16 bits of each row's largest activation, times the root of the number of terms.
    bound = 2e-5 * np.abs(exact).max(axis=(1, 2), keepdims=True) * 8
    assert np.all(np.abs(np.asarray(y) - exact) <= bound)


def test_a_row_of_zeros_stays_zero():
    q = formats.quantize(weight((4, 8)), 1, INT8)
    np.testing.assert_array_equal(arrays.einsum("BK,NK->BN", jnp.zeros((2, 8)), q), np.zeros((2, 4)))


FORMATS = ["int8", "int8-affine", "int8-g16", "int4", "int4-g16", "int4-g32-affine", "fp8"]


@pytest.mark.parametrize(("rows", "shape"), [(1, (10, 3, 64)), (3, (9, 4, 16)), (130, (10, 3, 64))])
@pytest.mark.parametrize("name", FORMATS)
def test_both_forms_of_every_format_equal_float64(name, rows, shape):
    contracted = 1 if shape[-1] == 64 else 2
    q, x = formats.quantize(weight(shape), contracted, formats.parse(name)), weight((rows, 64), seed=2)
    x = x.reshape(rows, *shape[len(shape) - contracted :])
    w = np.asarray(arrays.dequantize(q), np.float64).reshape(-1, 64)
    exact = (np.asarray(x, np.float64).reshape(rows, 64) @ w.T).reshape(rows, *shape[: len(shape) - contracted])
    for contract in (arrays._contract, arrays.contract_cpu):
        y = np.asarray(jax.jit(contract, static_argnums=0)(contracted, x, q))
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, exact, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["int8", "int4-g16", "int4-g32-affine", "fp8"])
def test_both_forms_take_bfloat16(name):
    q, x = formats.quantize(weight((12, 64)), 1, formats.parse(name)), weight((3, 64), seed=2).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(arrays.dequantize(q), np.float64).T
    for contract in (arrays._contract, arrays.contract_cpu):
        np.testing.assert_allclose(jax.jit(contract, static_argnums=0)(1, x, q), exact, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 130])
def test_int8_times_int8_is_numpys_in_integers(rows, static):
    q = formats.quantize(weight((10, 3, 64)), 1, formats.parse("w8a8"))
    x = weight((rows, 64), seed=3) * 4
    if static:
        q = dataclasses.replace(q, x_scale=jnp.float32(2.0 / 127))  # less than the range: the rest is clipped
    step = np.float32(2.0 / 127) if static else np.abs(np.asarray(x)).max(1, keepdims=True) / np.float32(127)
    rounded = np.clip(np.round(np.asarray(x) / step), -127, 127).astype(np.int64)
    sums = rounded @ np.asarray(q.values, np.int64).reshape(30, 64).T
    expected = (sums * np.asarray(q.scale, np.float64).reshape(1, 30) * step).reshape(rows, 10, 3)
    for contract in (arrays._contract, arrays.contract_cpu):
        np.testing.assert_allclose(jax.jit(contract, static_argnums=0)(1, x, q), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16_accumulates_in_float32(rows):
    x, w = weight((rows, 4096)).astype(jnp.bfloat16), weight((4, 4096), seed=3).astype(jnp.bfloat16)
    y = arrays.einsum("BK,NK->BN", x, w, jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(y, exact, atol=1e-3)


def test_two_contracted_axes():
    x, w = weight((2, 5, 3, 4)), weight((6, 3, 4), seed=4)
    expected = np.einsum("btnh,dnh->btd", x, w)
    np.testing.assert_allclose(arrays.einsum("BTNH,DNH->BTD", x, w), expected, atol=1e-5)


@pytest.mark.parametrize("eqn", ["BK,KN->BN", "BK,NK->NB", "BK,NK->B", "BKJ,NJK->BN", "BK,NK"])
def test_other_equations_are_refused(eqn):
    with pytest.raises(ValueError, match="not of the form"):
        arrays.num_contracted(eqn)


def test_shapes_that_do_not_contract_are_refused():
    with pytest.raises(ValueError, match=r"does not contract with \(4, 9\)"):
        arrays.einsum("BK,NK->BN", jnp.ones((1, 8)), jnp.ones((4, 9)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_take_equals_rows_of_the_dequantised_table(name, dtype):
    q = formats.quantize(weight((20, 64)), 1, formats.parse(name))
    rows = jnp.asarray([[3, 19], [0, 3]])
    np.testing.assert_array_equal(arrays.take(q, rows, dtype), arrays.dequantize(q)[rows].astype(dtype))


def test_a_tap_sees_what_its_weight_is_applied_to():
    seen = {}

    def run(w, x):
        tap = arrays.Tap(w, lambda x, y: seen.update(x=x.shape, y=y.shape))
        return arrays.einsum("BK,NK->BN", x, tap)

    w, x = weight((4, 8)), weight((2, 8), seed=1)
    np.testing.assert_array_equal(jax.jit(run)(w, x), arrays.einsum("BK,NK->BN", x, w))
    assert seen == {"x": (2, 8), "y": (2, 4)}


def test_a_quantised_array_is_a_pytree_whose_first_leaf_has_the_weights_shape():
    q = formats.quantize(weight((4, 8)), 1, INT8)
    assert [leaf.shape for leaf in jax.tree.leaves(q)] == [(4, 8), (4, 1)]
    assert isinstance(jax.tree.map(lambda a: a, q), QArray)
    affine = formats.quantize(weight((4, 64)), 1, formats.parse("int4-g16-affine"))
    assert [leaf.shape for leaf in jax.tree.leaves(affine)] == [(4, 64), (4, 4), (4, 4)]
    assert (affine.shape, affine.size, affine.groups, affine.contracted) == ((4, 64), 256, 4, 1)


@pytest.mark.parametrize("rows", [1, 5])
def test_nan_stays_nan_where_activations_are_rounded(rows):
    """An int8 of NaN is 0: without care a ruined model's predictions would be finite."""
    for name in ("int8", "w8a8"):
        w = formats.quantize(jnp.ones((4, 8)), 1, formats.parse(name))
        x = jnp.ones((rows, 8)).at[0, 3].set(jnp.nan)
        y = np.asarray(arrays.einsum("MK,NK->MN", x, w))
        assert np.isnan(y[0]).all()
        assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (1, 5), (2, 9)])
@pytest.mark.parametrize("name", [None, "int8", "int4-g16-affine", "w8a8"])
def test_filled_rows_change_nothing(rows, name):
    """What a TPU is given to do for few rows."""
    w, x = weight((12, 32)), weight((*rows, 32), seed=1)
    if name:
        w = formats.quantize(w, 1, formats.parse(name))
    y = arrays._contract_filled(1, x, w, jnp.float32)
    np.testing.assert_allclose(y, arrays._contract(1, x, w), rtol=1e-5, atol=1e-5)
    ids = jnp.arange(rows[0] * rows[1]).reshape(rows) % 12
    if name != "w8a8":
        np.testing.assert_array_equal(arrays._look_up_tpu(w, ids, jnp.float32), arrays._look_up(w, ids, jnp.float32))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 5), (7, 64, 33), (130, 96, 40)])
def test_gradients_of_bfloat16_are_those_of_float32(shape):
    rows, columns, outputs = shape
    x, w = weight((rows, columns)).astype(jnp.bfloat16), weight((outputs, columns), seed=2).astype(jnp.bfloat16)
    up = weight((rows, outputs), seed=3).astype(jnp.bfloat16).astype(jnp.float32)

    def loss(x, w):
        return jnp.sum(arrays.einsum("bK,nK->bn", x, w, jnp.float32) * up)

    for found, exact in zip(
        jax.jit(jax.grad(loss, (0, 1)))(x, w),
        jax.grad(loss, (0, 1))(x.astype(jnp.float32), w.astype(jnp.float32)),
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_gradients_of_bfloat16_are_matmuls_of_bfloat16():
    """At twice the rate: also where what comes before or after would have them transposed."""
    x, w = jnp.ones((4, 32, 48), jnp.bfloat16), jnp.ones((8, 16, 48), jnp.bfloat16)

    def loss(x, w):
        y = arrays.einsum("BTD,NHD->BTNH", x.transpose(1, 0, 2), w)
        return jnp.sum(y.astype(jnp.float32).transpose(2, 3, 1, 0) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    jax.block_until_ready(compiled(x, w))
    text = compiled.as_text()
    types = dict(re.findall(r"%(\S+) = (\w+)\[", text))
    operands = [types[name] for pair in re.findall(r" dot\(%(\S+), %(\S+)\)", text) for name in pair]
    assert operands == ["bf16"] * 6
