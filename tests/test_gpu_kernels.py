"""Kernels for GPUs against their plain-XLA twins, interpreted on CPU, and the programs that only a GPU has."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas as pl

import jaxllm
from jaxllm import activations, arrays, formats, kernels
from jaxllm import cache as kv
from jaxllm.activations import Gated, Normed
from jaxllm.cache import LayerCache, Rounded
from jaxllm.compile import Lowering, Programs
from jaxllm.kernels import gpu
from jaxllm.kernels.gpu import attention, matvec
from jaxllm.models import layers
from jaxllm.params import flatten
from jaxllm.sample import Sampling, as_arrays


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on CPU, by jax's interpreter of them, which knows no machine instructions."""

    def dot4(w, x, total):
        return total + w.astype(jnp.int32) * x.astype(jnp.int32)

    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(matvec, "dot4", dot4)
    # Of a plain number as an index of a store, the interpreter asks a shape that it has not.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    traced = attention._attend, matvec._contract
    for function in traced:
        function.clear_cache()  # of what was traced as a kernel
    yield
    for function in traced:
        function.clear_cache()


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def quantised(shape, contracted=1, name="int8"):
    return formats.quantize(normal(shape), contracted, formats.parse(name))


def activation(kind, shape, dtype):
    x = normal(shape, 1, dtype)
    if kind is Normed:
        return Normed(x, normal(shape[-1:], 2, dtype), 1e-5)
    return Gated(x, normal(shape, 2, dtype)) if kind is Gated else x


@pytest.mark.parametrize(
    ("width", "kind", "dtype"),
    [
        (64, jax.Array, jnp.float32),
        (576, Normed, jnp.bfloat16),  # part of a block
        (1536, Gated, jnp.float32),
        (4096, Normed, jnp.float32),  # two blocks
        (4864, jax.Array, jnp.bfloat16),  # and of those for many columns four and three quarters
    ],
)
def test_int8_weights_are_contracted_as_by_the_twin(interpreted, monkeypatch, width, kind, dtype):
    monkeypatch.setattr(matvec, "_PROGRAMS", 14)  # so that some take several tiles, of several weights
    weights = [quantised((rows, width)) for rows in (48, 5, 64)]
    x = activation(kind, (1, 1, width), dtype)
    results = matvec.contract(1, x, weights, None, jnp.float32)
    # 16 bits of the largest: five deviations of what rounding each activation adds up to. And of bfloat16 the kernel's
    # activations may be rounded to the next value.
    value = activations.value(x).astype(jnp.float32)
    tolerance = 5 * float(jnp.max(jnp.abs(value)) / (127 * 256 * 12**0.5) / jnp.sqrt(jnp.mean(value**2)))
    tolerance += 2e-2 * (dtype == jnp.bfloat16 and kind is not jax.Array)
    for y, w in zip(results, weights, strict=True):
        assert not matvec.refuses(w)
        twin = arrays.contract_gpu(1, activations.value(x), w, jnp.float32)
        assert (y.shape, y.dtype) == (twin.shape, twin.dtype)
        np.testing.assert_allclose(y, twin, atol=tolerance * float(jnp.std(twin)))


@pytest.mark.parametrize(("width", "kind"), [(576, Normed), (1536, Gated), (4096, Normed)])
def test_half_precision_weights_are_contracted_as_by_the_twin(interpreted, monkeypatch, width, kind):
    monkeypatch.setattr(matvec, "_PROGRAMS", 7)
    weights = [normal((rows, width), rows, jnp.bfloat16) for rows in (48, 6)]
    x = activation(kind, (1, 1, width), jnp.bfloat16)
    results = matvec.contract(1, x, weights, None, jnp.float32)
    for y, w in zip(results, weights, strict=True):
        assert not matvec.refuses(w)
        twin = arrays.contract_gpu(1, activations.value(x), w, jnp.float32)
        np.testing.assert_allclose(y, twin, atol=2e-2 * float(jnp.std(twin)))


def test_heads_are_contracted_and_a_residual_is_added(interpreted):
    w, x, add = quantised((64, 4, 32), 2), normal((1, 1, 4, 32), 1), normal((1, 1, 64), 2)
    (y,) = matvec.contract(2, x, [w], add, jnp.float32)
    twin = add + arrays.contract_gpu(2, x, w, jnp.float32)
    np.testing.assert_allclose(y, twin, atol=1e-3)


def calls(x, weights):
    """The kernels that a contraction calls."""
    traced = jax.make_jaxpr(lambda x: matvec.contract(1, x, weights, None, jnp.float32))(x)
    return re.findall(r"name=(matvec)\b", str(traced).replace("name_and_src_info=", "name="))


def test_what_xla_does_as_well_is_left_to_it():
    half, rounded = normal((64, 4096), 1, jnp.bfloat16), quantised((64, 4096))
    x = normal((1, 1, 4096), 2, jnp.bfloat16)
    normed = Normed(x, jnp.ones(4096, jnp.bfloat16), 1e-5)
    assert (
        len(calls(normed, [half, half]))
        == len(calls(x, [half]))
        == len(calls(x, [rounded]))
        == len(calls(normed, [rounded] * 3))
        == 1
    )
    assert len(calls(normed, [half, rounded])) == 2
    wide = Normed(normal((1, 1, 4224), 2, jnp.bfloat16), jnp.ones(4224, jnp.bfloat16), 1e-5)
    assert not calls(wide, [normal((64, 4224), 1, jnp.bfloat16)])
    assert len(calls(wide, [quantised((64, 4224))])) == 1
    assert not calls(normal((1, 2, 4096), 2, jnp.bfloat16), [rounded])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", [None, "int8", "int8-affine", "int4-g32", "fp8", "w8a8"])
def test_what_xla_does_on_a_gpu_is_what_it_does_elsewhere(name, rows):
    w = normal((8, 4, 16)) if name is None else quantised((8, 4, 16), 2, name)
    x = normal((rows, 1, 4, 16), 1)
    twin = arrays._contract(2, x, w)
    y = arrays.contract_gpu(2, x, w, jnp.float32)
    assert (y.shape, y.dtype) == (twin.shape, twin.dtype)
    np.testing.assert_allclose(y, twin, atol=1e-5 * float(jnp.std(twin)) + 1e-6)


@pytest.mark.parametrize("name", ["int8", "int8-affine"])
def test_some_dozens_of_rows_are_split_for_large_weights(monkeypatch, name):
    w, x = quantised((64, 512), name=name), normal((32, 1, 512), 1, jnp.bfloat16)
    twin = arrays._contract(1, x, w)

    def in_integers(x):
        text = jax.jit(lambda x: arrays.contract_gpu(1, x, w, jnp.float32)).lower(x).as_text()
        return "tensor<64x512xi8>) -> tensor<64x64xi32>" in text

    assert not in_integers(x)
    monkeypatch.setattr(arrays, "_SPLIT_SIZE", 64 * 512)
    assert in_integers(x)
    assert not in_integers(x[:8])
    y = arrays.contract_gpu(1, x, w, jnp.float32)
    assert (y.shape, y.dtype) == (twin.shape, twin.dtype)
    np.testing.assert_allclose(y, twin, atol=2e-2 * float(jnp.std(twin)))


def test_several_rows_are_the_twins(interpreted):
    w, x = quantised((64, 64)), normal((2, 1, 64), 1)
    (y,) = matvec.contract(1, x, [w], None, jnp.float32)
    np.testing.assert_array_equal(y, arrays.contract_gpu(1, x, w, jnp.float32))


@pytest.mark.parametrize(("programs", "counts"), [(7, (6, 1, 16)), (1056, (768, 1000, 3000)), (3, (3,))])
def test_every_tile_is_one_programs(programs, counts):
    """More would be written beyond the results, which the interpreter forgives."""
    for i, count in enumerate(counts):
        turns = [matvec._turns(np.int32(p), programs, sum(counts[:i]), count) for p in range(programs)]
        taken = [int(first) + j * programs for first, number in turns for j in range(int(number))]
        assert sorted(taken) == list(range(count))
    load = [
        sum(int(matvec._turns(np.int32(p), programs, sum(counts[:i]), n)[1]) for i, n in enumerate(counts))
        for p in range(programs)
    ]
    assert max(load) - min(load) <= 1


@pytest.mark.parametrize(
    ("shape", "rows"), [((64, 576), 8), ((64, 2048), 4), ((64, 4096), 2), ((63, 576), 1), ((64, 14336), 1)]
)
def test_tiles_are_of_whole_rows(shape, rows):
    other = jax.ShapeDtypeStruct((64, shape[1]), jnp.int8)
    assert matvec._rows([[other], [jax.ShapeDtypeStruct(shape, jnp.int8)]]) == rows


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (quantised((64, 64), name="int4-g32"), "not int8"),
        (quantised((64, 64), name="int8-g32"), "not int8 with one scale"),
        (dataclasses.replace(quantised((64, 64)), int8_inputs=True), "tensor cores"),
        (normal((64, 64)), "half precision"),
    ],
)
def test_what_the_kernel_does_not_take_it_says(w, reason):
    assert re.search(reason, matvec.refuses(w))


def test_not_a_number_stays_one(interpreted):
    w, x = quantised((64, 64)), normal((1, 64), 1).at[0, 3].set(jnp.nan)
    assert jnp.isnan(matvec.contract(1, x, [w], None, jnp.float32)[0]).all()


@pytest.mark.parametrize(
    ("slots", "heads", "window", "rounded"),
    [
        (48, (8, 2), None, True),
        (48, (9, 3), 20, False),
        (256, (8, 2), 50, True),
        (256, (9, 3), None, False),
        (256, (4, 4), 50, False),
    ],
)
def test_attention_equals_what_the_decoder_does_without(interpreted, slots, heads, window, rounded):
    (N, K), H, B = heads, 32, 3
    q, k, v = (normal((B, 1, n, H), i, jnp.bfloat16) for i, n in enumerate((N, K, K)))
    past = [normal((B, K, slots, H), 3 + i, jnp.bfloat16) for i in range(2)]
    position_B1 = jnp.asarray([[0], [slots // 2], [slots - 1]], jnp.int32)
    angles = layers.rope_angles(position_B1, layers.rope_frequencies(H, 1e4, None))
    if rounded:
        past = [Rounded((r := kv.round_int8(x)).values, r.scale[..., 0]) for x in past]
    cache = LayerCache(*past, split=False)

    attended = attention.attend(cache, q, k, v, position_B1, angles, window)
    assert attended is not None
    y, written = attended
    new_k, new_v = layers.rope(k, angles), v
    if rounded:
        new_k, new_v = kv.round_int8(new_k), kv.round_int8(new_v)
    expected = kv.write(cache, new_k, new_v, position_B1)
    twin = layers.attend(layers.rope(q, angles), [layers.past_part(expected, position_B1)], position_B1, window)
    np.testing.assert_allclose(y.astype(jnp.float32), twin.astype(jnp.float32), atol=2e-2)
    for one, other in zip(*(jax.tree.leaves((layer.k, layer.v)) for layer in (written, expected)), strict=True):
        # An entry may be rounded to the next value: the turned key that it is made of is, in its last bit.
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), atol=1 if rounded else 2e-2)
        assert (jnp.asarray(one) == jnp.asarray(other)).mean() > 0.999


@pytest.mark.parametrize(("length", "dtype"), [(2, jnp.bfloat16), (1, jnp.float32)])
def test_attention_leaves_the_rest_to_the_decoder(length, dtype):
    q, k = normal((1, length, 4, 32), 0, dtype), normal((1, length, 2, 32), 1, dtype)
    cache = LayerCache(*(jnp.zeros((1, 2, 64, 32), dtype) for _ in range(2)), split=False)
    positions = jnp.arange(length)[None]
    angles = layers.rope_angles(positions, layers.rope_frequencies(32, 1e4, None))
    assert attention.attend(cache, q, k, k, positions, angles, None) is None


def test_greedy_does_what_decode_does(tiny):
    lower = Lowering(tiny.cfg, tiny.params, 2, 32, None)
    how, stops = Sampling(), frozenset()
    state = lower.start().compile()()
    tokens = np.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32)
    tokens = np.pad(tokens, ((0, 0), (0, 11)))
    state, first = lower.prefill(16).compile()(
        tiny.params, state, tokens, np.int32(0), np.asarray([5, 3], np.int32), np.arange(2), as_arrays(how, stops)
    )
    arguments = tiny.params, state, np.int32(8)
    expected, answers = jax.jit(lower.function("decode", 8))(*arguments, as_arrays(how, stops))
    # What the second row says last in its first four ends it.
    for stop in ((), (int(answers[1, 3]),)):
        sampling = as_arrays(how, frozenset(stop))
        one = jax.jit(lower.function("decode", 8))(*arguments, sampling)
        other = jax.jit(lower.function("greedy", 8))(*arguments, sampling)
        np.testing.assert_array_equal(one[1], other[1])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one[0])[-4:], jax.tree.leaves(other[0])[-4:])
    assert answers.shape == (2, 8)
    assert expected.position_B.tolist() == [13, 11]
    assert first.shape == (2,)


@pytest.mark.parametrize(
    ("limit", "sampling", "chosen"),
    [
        (8, Sampling(), "greedy"),
        (9, Sampling(), "greedy"),
        (7, Sampling(), "decode"),
        (8, Sampling(temperature=0.5), "decode"),
        (8, Sampling(repetition_penalty=1.1), "decode"),
    ],
)
def test_the_greedy_program_runs_where_it_does_the_same(limit, sampling, chosen):
    def program(name):
        return lambda params, state, limit, how: name

    compiled = {name: program(name.split()[0]) for name in ("start", "decode 8", "greedy 8", "prefill 16")}
    decode = Programs.of(compiled, 1, 16).decode
    assert decode(None, None, np.int32(limit), as_arrays(sampling, frozenset())) == chosen


def test_only_one_nvidia_gpu_has_the_kernels(monkeypatch, tiny):
    class Device:
        def __init__(self, version, capability):
            self.client, self.compute_capability = type("Client", (), {"platform_version": version}), capability

    assert gpu.runs(Device("PJRT C API\ncuda 13000", "9.0"))
    assert not gpu.runs(Device("PJRT C API\ncuda 13000", "7.5"))
    assert not gpu.runs(Device("PJRT C API\nrocm 70000", "gfx942"))
    monkeypatch.setenv("JAXLLM_GPU_KERNELS", "0")
    assert not gpu.runs(Device("PJRT C API\ncuda 13000", "9.0"))

    for runs in (True, False):
        monkeypatch.setattr(gpu, "runs", lambda _, runs=runs: runs)
        lower = Lowering(tiny.cfg, tiny.params, 1, 32, None, platform="gpu")
        assert ("greedy 8" in lower.names()) is runs
        assert lower._model.platform == ("cuda" if runs else "gpu")
        assert (lower._model.decoder.attend is attention.attend) is runs


def test_the_log_tells_which_weights_have_the_kernel(caplog, tiny):
    caplog.set_level("INFO", "jaxllm.kernels")
    weights = sum(path.endswith("/w") and len(w.shape) > 1 for path, w in flatten(tiny.params).items())
    assert kernels.choose(tiny.params, "gpu") == {}
    assert f"GPU kernels contract 0 weights, XLA {weights} (" in caplog.text
    assert "not in half precision" in caplog.text
    caplog.clear()
    assert len(kernels.choose(jaxllm.quantize("int8")(tiny).params, "gpu")) == weights
    assert f"GPU kernels contract {weights} weights, XLA 0\n" in caplog.text + "\n"
