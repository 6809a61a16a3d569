"""The C++ kernels of each instruction set against float64, their plain-XLA twins, and each other."""

import ctypes
import dataclasses
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import activations, arrays, cache, contracts, formats, kernels
from jaxllm.arrays import QArray
from jaxllm.cache import LayerCache, Rounded
from jaxllm.compile import Lowering
from jaxllm.generate import storable
from jaxllm.kernels import cpu
from jaxllm.models import layers
from jaxllm.params import flatten
from tests.conftest import TINY

ISAS = ("avx512bf16", "avx512", "avx2", "neon", "portable")


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has."""
    path = cpu.library()
    assert path is not None, "the kernels are not built"
    use = ctypes.CDLL(str(path)).jaxllm_use
    use.argtypes, use.restype = (ctypes.c_char_p,), ctypes.c_char_p
    if use(request.param.encode()).decode() != request.param:
        use(b"")
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    use(b"")


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(name, shape):
    """As the kernels take it, and its float64 value."""
    w = normal(shape, seed=len(name))
    if name in ("float32", "bfloat16"):
        w = w.astype(name)
        return w, np.asarray(w, np.float64)
    q = formats.quantize(w, 1, formats.parse(name))
    return cpu.pack(q), np.asarray(arrays.dequantize(q), np.float64)


REACH = 3.5  # kReach of ffi.cc


def rounding(x, exact, reach):
    """What rounding activations [M, K] may change of their product with a weight [N, K]: five standard deviations.

    An error of at most half a step in each, all equally likely: 1 / sqrt(12) of a step. For the step see `round` in
    kernels.h.
    """
    x = np.asarray(x, np.float64)
    absmax, mean = np.abs(x).max(-1), np.abs(x).mean(-1)
    step = np.maximum(np.minimum(absmax, reach * mean), absmax / 254) / 127
    return 5 / np.sqrt(12) * step[:, None] * np.sqrt((exact**2).sum(-1)) + 1e-5


SHAPES = ((1, (7, 64)), (2, (33, 576)), (3, (48, 64)), (5, (130, 192)), (9, (16, 128)), (40, (50, 64)))


@pytest.mark.parametrize(("name", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_float_matmuls_of_odd_shapes_equal_float64(isa, name, dtype):
    for rows, shape in SHAPES:
        w, exact = weight(name, shape)
        x = normal((rows, shape[1]), rows, dtype)
        (y,) = cpu.contract(1, x, [w], None, jnp.float32)
        expected = np.asarray(x, np.float64) @ exact.T
        np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max(), err_msg=f"{rows} x {shape}")


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("int8", REACH),
        ("int8-affine", REACH),
        ("int8-g32", REACH),
        ("int4", 0.0),
        ("int4-g32-affine", 0.0),
        ("int4-g64", 0.0),
    ],
)
def test_quantised_matmuls_equal_float64_but_for_rounded_activations(isa, name, reach):
    for rows, shape in SHAPES:
        w, exact = weight(name, shape)
        x = normal((rows, shape[1]), seed=rows)
        x = x.at[:, 1::37].mul(40.0)  # far beyond what one int8 reaches
        (y,) = cpu.contract(1, x, [w], None, jnp.float32)
        error = np.abs(y - np.asarray(x, np.float64) @ exact.T)
        assert (error <= rounding(x, exact, reach)).all(), f"{rows} x {shape}"


@pytest.mark.parametrize("name", ["int8", "int8-g32-affine"])
def test_activations_that_are_whole_steps_are_exact(isa, name):
    """Also those at the border of one int8, and far beyond it, of either sign and at any place."""
    w, exact = weight(name, (48, 224))
    for most, at in itertools.product((127, 128, -128, 254, 380, -381, 382), (0, 31, 223)):
        # Integers, with the mean magnitude for which a step is 1.
        x = np.diff(np.linspace(0, 224 * 127 / REACH - abs(most), 224).round()) * (-1) ** np.arange(223)
        x = np.insert(x, at, most)
        assert REACH * np.abs(x).mean() == 127
        rows = jnp.asarray([np.roll(x, 7 * row) for row in range(5)], jnp.float32)
        (y,) = cpu.contract(1, rows, [w], None, jnp.float32)
        expected = np.asarray(rows, np.float64) @ exact.T
        np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max(), err_msg=f"{most} at {at}")


@pytest.mark.parametrize("name", ["int4", "int4-g32-affine"])
def test_activations_of_16_bits_are_exact(isa, name):
    w, exact = weight(name, (48, 64))
    x = np.random.default_rng(0).integers(-32258, 32259, (5, 64))
    x[:, :6] = [32258, -32258, 127, 128, -381, 382]
    (y,) = cpu.contract(1, jnp.asarray(x, jnp.float32), [w], None, jnp.float32)
    np.testing.assert_allclose(y, x @ exact.T, atol=2e-6 * np.abs(x @ exact.T).max())


def test_weights_that_want_activations_rounded_otherwise_may_be_in_one_call(isa):
    weights = [weight(name, (48, 96))[0] for name in ("int8", "int4-g32", "float32")]
    x = normal((6, 96))
    together = cpu.contract(1, x, weights, None, jnp.float32)
    for y, w in zip(together, weights, strict=True):
        np.testing.assert_array_equal(y, cpu.contract(1, x, [w], None, jnp.float32)[0])


@pytest.mark.parametrize("width", [5, 31, 100])
@pytest.mark.parametrize(("name", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_float_weights_may_have_any_width(isa, name, dtype, width):
    w, exact = weight(name, (21, width))
    x = normal((3, width), 1, dtype)
    (y,) = cpu.contract(1, x, [w], None, jnp.float32)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ exact.T, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_of_floats_are_xlas_but_where_bfloat16_is_multiplied(isa, dtype):
    w, x = normal((64, 96), 0, dtype), normal((40, 96), 1, dtype)
    text = jax.jit(lambda x: cpu.contract(1, x, [w], None, dtype)).lower(x).as_text()
    assert ("@jaxllm_matmul" in text) is (isa == "avx512bf16" and dtype == "bfloat16")


def test_no_number_is_lost_in_bfloat16(isa):
    for bad in (np.nan, np.inf):
        x = normal((6, 96), 1, "bfloat16").at[1, 5].set(bad)
        (y,) = cpu.contract(1, x, [weight("bfloat16", (12, 96))[0]], None, jnp.bfloat16)
        assert np.isfinite(y[::2].astype(np.float32)).all()
        assert not np.isfinite(y[1].astype(np.float32)).any()


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static"])
def test_rounded_activations_give_the_twins_integers(isa, name):
    q = formats.quantize(normal((48, 96)), 1, formats.parse(name))
    q = dataclasses.replace(q, x_scale=jnp.float32(0.02) if name == "w8a8-static" else None)
    for rows in (1, 6):
        x = normal((rows, 96), seed=rows)
        (y,) = cpu.contract(1, x, [cpu.pack(q)], None, jnp.float32)
        np.testing.assert_allclose(y, arrays.contract_cpu(1, x, q), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4-g32"])
def test_what_comes_before_and_after_a_matmul_is_part_of_it(isa, name, dtype):
    """Against the same in float64, from the activations as they are given."""
    reach = REACH if name == "int8" else 0.0
    first, exact = weight(name, (64, 96))
    second, exact_second = weight(name, (40, 96))
    x, up, scale = normal((2, 3, 96), 1, dtype), normal((2, 3, 96), 2, dtype), normal((96,), 3, dtype)
    add = normal((2, 3, 64), 4, dtype)
    x64, up64, scale64, add64 = (np.asarray(a, np.float64) for a in (x, up, scale, add))
    normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * scale64
    gated = x64 / (1 + np.exp(-x64)) * up64
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5

    def close(y, x, exact, more=0.0):
        assert y.dtype == dtype
        expected = x @ exact.T + more
        bound = rounding(x.reshape(-1, 96), exact, reach).reshape(expected.shape) + tolerance * np.abs(expected).max()
        assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()

    (y,) = cpu.contract(1, activations.Gated(x, up), [first], add, dtype)
    close(y, gated, exact, add64)
    both = cpu.contract(1, activations.Normed(x, scale, 1e-5), [first, second], None, dtype)
    close(both[0], normed, exact)
    close(both[1], normed, exact_second)


def test_a_nan_and_an_infinity_show_in_all_results(isa):
    for bad in (np.nan, np.inf):
        x = normal((2, 64)).at[1, 5].set(bad)
        (y,) = cpu.contract(1, x, [weight("int8", (16, 64))[0]], None, jnp.float32)
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
        assert not np.isfinite(cpu.contract(1, x, [weight("float32", (16, 64))[0]], None, jnp.float32)[0][1]).any()


def test_the_likeliest_is_the_first_of_the_highest(isa):
    logits = np.zeros((4, 1003), np.float32)
    logits[0, [77, 500]], logits[1, 1002], logits[2] = 3, 1, -np.inf
    np.testing.assert_array_equal(cpu.likeliest(jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.parametrize("name", ["int8", "int4-g32-affine"])
def test_packing_loses_nothing(name):
    q = formats.quantize(normal((37, 4, 16)), 2, formats.parse(name))
    back = cpu.pack(q).unpack()
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    q = formats.quantize(normal((37, 64)), 1, formats.parse(name))
    rows = jnp.asarray([[0, 36], [17, 16]])
    np.testing.assert_array_equal(arrays.take(cpu.pack(q), rows, "float32"), arrays.take(q, rows, "float32"))


def entries(shape, seed, kind):
    """Of a cache [B, K, S, H]."""
    x = normal(shape, seed, "float32" if kind == "int8" else kind)
    if kind != "int8":
        return x
    rounded = cache.round_int8(x)
    return Rounded(rounded.values, rounded.scale[..., 0])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "width", "slots", "window"),
    [
        (1, 1, 9, 3, 64, 300, None),  # longer than what one thread takes
        (3, 1, 4, 4, 20, 150, 40),
        (1, 1, 16, 1, 8, 64, None),  # more queries of one head than a vector has lanes
        (2, 1, 14, 2, 128, 133, 50),  # more than a register's row of columns, and than are multiplied at once
        (2, 37, 8, 2, 20, 150, 13),
        (1, 64, 6, 3, 64, 128, None),
    ],
)
def test_attention_equals_its_twin(isa, kind, batch, length, heads, kv_heads, width, slots, window):
    dtype = "float32" if kind == "int8" else kind
    past = LayerCache(
        entries((batch, kv_heads, slots, width), 1, kind), entries((batch, kv_heads, slots, width), 2, kind), False
    )
    q = normal((batch, length, heads, width), 3, dtype)
    k, v = (normal((batch, length, kv_heads, width), seed, dtype) for seed in (4, 5))
    first = np.array([slots - length - 7 * b for b in range(batch)] if length == 1 else [slots - length] * batch)
    positions = jnp.asarray(first[:, None] + np.arange(length)[None], jnp.int32)
    angles = layers.rope_angles(positions, layers.rope_frequencies(width, 1e4, None))

    def twin(past):
        new_k, new_v = layers.rope(k, angles), v
        if kind == "int8":
            new_k, new_v = cache.round_int8(new_k), cache.round_int8(new_v)
        written = cache.write(past, new_k, new_v, positions)
        return layers.attend(layers.rope(q, angles), [layers.past_part(written, positions)], positions, window), written

    y, written = jax.jit(lambda past: cpu.attend(past, q, k, v, positions, angles, window))(past)
    expected, kept = jax.jit(twin)(past)
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(kept), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # sin and cos are the same, but sums may be fused: a value may fall on the other side of a rounding.
        step = 1.01 if a.dtype == np.int8 else 2e-6
        np.testing.assert_allclose(a, b, atol=1.01 if kind == "int8" else 4e-2 if kind == "bfloat16" else step)
        assert (np.abs(a - b) > 1e-5).mean() < 0.01
    tolerance = {"float32": 3e-6, "bfloat16": 2e-2, "int8": 2e-3}[kind]
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "slots"), [(9, 3, 64, 300), (14, 2, 128, 133), (6, 2, 20, 150)])
def test_queries_and_weights_over_an_int8_cache_have_15_bits(isa, heads, kv_heads, width, slots):
    past = LayerCache(*(entries((1, kv_heads, slots, width), seed, "int8") for seed in (1, 2)), False)
    q, new = normal((1, 1, heads, width), 3), normal((1, 1, kv_heads, width), 4)
    last = jnp.full((1, 1), slots - 1)
    y, written = cpu.attend(past, q, new, new, last, jnp.zeros((1, 1, width // 2)), None)
    k, v = (np.asarray(x.values[0], np.float64) * np.asarray(x.scale[0])[..., None] for x in (written.k, written.v))
    grouped = np.asarray(q, np.float64).reshape(kv_heads, -1, width)
    weights = np.exp(grouped @ k.swapaxes(1, 2) / np.sqrt(width))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-4)


def test_what_does_not_fit_the_cache_is_left_out(isa):
    past = LayerCache(jnp.zeros((1, 1, 16, 8)), jnp.zeros((1, 1, 16, 8)), False)
    x = jnp.ones((1, 1, 1, 8))
    for position in (-1, 16, 2**30):
        at = jnp.full((1, 1), position)
        _, written = cpu.attend(past, x, x, x, at, jnp.zeros((1, 1, 4)), None)
        assert not jnp.any(written.k)
        assert not jnp.any(written.v)


def test_under_vmap():
    w, _ = weight("int8", (48, 64))
    x = normal((3, 2, 64))
    y = jax.vmap(lambda x: cpu.contract(1, x, [w], None, jnp.float32)[0])(x)
    alone = [cpu.contract(1, x[i], [w], None, jnp.float32)[0] for i in range(3)]
    np.testing.assert_array_equal(y, jnp.stack(alone))


# Every weight of it is one that the kernels take.
CONFIG = dataclasses.replace(TINY, head_dim=16, num_heads=4, num_kv_heads=2)
FORMATS = ["int8", "int4-g32", "w8a8"]


@functools.cache
def model(name):
    lm = jaxllm.init(CONFIG)
    return lm if name == "float32" else jaxllm.quantize(name)(lm)


PROMPT = [5, 77, 130, 8, 201]


@pytest.mark.parametrize("name", ["float32", *FORMATS])
def test_an_engine_with_kernels_draws_what_the_model_finds_likeliest(name):
    lm = model(name)
    tokens = jaxllm.compile(lm, max_len=64).generate(PROMPT, max_new_tokens=24, stop_tokens=())[0].tokens
    logits = np.asarray(jaxllm.logits(lm, [PROMPT + tokens])[0])[len(PROMPT) - 1 : -1]
    loss = logits.max(-1) - logits[np.arange(24), tokens]
    assert loss.max() < (0.05 if name == "w8a8" else 1e-3)  # of w8a8 an activation may round to its other neighbour


def test_a_rows_answer_does_not_depend_on_its_batch():
    lm = model("int8")
    prompts = [[b + 1, 7, 9 * b, 11] for b in range(5)]
    alone = [jaxllm.compile(lm, max_len=64).generate(p, max_new_tokens=12)[0].tokens for p in prompts]
    assert [r.tokens for r in jaxllm.compile(lm, batch=5, max_len=64).generate(prompts, max_new_tokens=12)] == alone


def test_engines_in_several_threads_do_not_disturb_each_other():
    engines = [jaxllm.compile(model(name), max_len=128) for name in ("float32", *FORMATS)] * 2
    answer = functools.partial(jaxllm.Engine.generate, prompts=PROMPT, max_new_tokens=60, stop_tokens=())
    alone = [answer(engine)[0].tokens for engine in engines]
    with ThreadPoolExecutor(len(engines)) as pool:
        for _ in range(5):
            assert [results[0].tokens for results in pool.map(answer, engines)] == alone


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_programs_with_kernels_keep_to_the_contracts(kv_dtype):
    """Weights are read as they are packed, and the cache is updated in place: by a step, a loop of steps, prefill."""
    lm = model("int4-g32")
    cfg = dataclasses.replace(lm.cfg, kv_dtype=kv_dtype)
    shapes = jax.eval_shape(lambda params: params, storable(lm.params, None))
    lower = Lowering(cfg, shapes, 2, 4096, None)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lower.state))
    for program in (lower.step(), lower.decode(8), lower.prefill(16)):
        compiled = program.compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert len(set(re.findall(r'custom_call_target="(jaxllm_\w+)"', text))) == 4
        assert memory.alias_size_in_bytes >= state
        assert memory.temp_size_in_bytes < state / 20
        assert not [
            breach
            for breach in contracts.check(compiled, shapes, lower.state, cfg.num_layers, contracts.Contract())
            if "copied" in breach.rule
        ]


def test_what_the_kernels_do_not_take_is_left_to_xla():
    lm = jaxllm.quantize({r".*/attn/.*": "fp8", r".*/down/w": "int8", r".*": "int4-g16"})(jaxllm.init(CONFIG))
    packed = flatten(storable(lm.params, None))
    chosen = kernels.choose(storable(lm.params, None), "cpu")
    assert all(
        isinstance(w, QArray)
        for path, w in packed.items()
        if "/attn/" in path and path.endswith("/w") and "norm" not in path
    )
    assert set(chosen) == {path for path in packed if path.endswith("/down/w")}
    tokens = jaxllm.compile(lm, max_len=32).generate(PROMPT, max_new_tokens=8, stop_tokens=())[0].tokens
    logits = np.asarray(jaxllm.logits(lm, [PROMPT + tokens])[0])[len(PROMPT) - 1 : -1]
    assert (logits.max(-1) - logits[np.arange(8), tokens]).max() < 1e-2


def test_every_weight_is_prepared_in_its_own_place():
    """Also those of layers 10 and on, whose names come before that of layer 2."""
    int8 = formats.parse("int8")
    matrices = {f"layers_{i}": {"w": formats.quantize(normal((40, 64), i), 1, int8)} for i in range(12)}
    prepared = storable(matrices, None)
    for name, group in matrices.items():
        back = prepared[name]["w"].unpack()
        np.testing.assert_array_equal(back.values, group["w"].values, err_msg=name)
        np.testing.assert_array_equal(back.scale, group["w"].scale, err_msg=name)


def test_weights_for_another_platform_stay_as_they_are():
    lm = model("int8")
    assert storable(lm.params, None, "tpu") is lm.params
    assert isinstance(flatten(storable(lm.params, None, "cpu"))["embed/w"], arrays.Packed)


def test_without_them_one_line_says_so_and_answers_are_the_same(monkeypatch):
    script = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
import jaxllm
from tests.test_cpu_kernels import CONFIG, PROMPT
lm = jaxllm.quantize("int8")(jaxllm.init(CONFIG))
print(jaxllm.compile(lm, max_len=64).generate(PROMPT, max_new_tokens=24, stop_tokens=())[0].tokens)
"""
    monkeypatch.setenv("JAXLLM_CPU_KERNELS", "0")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr.count("CPU kernels: switched off") == 1
    tokens = jaxllm.compile(model("int8"), max_len=64).generate(PROMPT, max_new_tokens=24, stop_tokens=())[0].tokens
    assert run.stdout.strip() == str(tokens)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """The tests of this file, with address and undefined behaviour watched."""
    source = Path(cpu.__file__).parent
    compiler = shutil.which("g++")
    assert compiler is not None, "GCC is needed for its sanitizers"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    settings = ["-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, *settings], check=True)
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True)
    runtimes = (
        subprocess.check_output([compiler, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    )
    environment = {
        "JAXLLM_CPU_KERNELS": str(tmp_path / "_kernels.so"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-m", "pytest", "-n0", "-k", "not without_them", __file__]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
