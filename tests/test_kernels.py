"""Kernels against their plain-XLA twins: interpreted on CPU, and compiled for TPUs that nobody has at hand."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import arrays, contracts, formats, hlo, hlo_cost, kernels, prediction, shard, targets
from jaxllm.compile import Lowering
from jaxllm.kernels.tpu import int4_matmul
from jaxllm.kernels.tpu import ragged_paged_attention as paged
from tests.conftest import TINY

aot = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the tpu extra is not installed")
CHIPS = ["v5e", "v5p", "v6e"]


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on CPU, by jax's interpreter of them."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    # Of a plain number as an index of a store, the interpreter asks a shape that it has not.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    jax.clear_caches()  # of what was traced as a kernel
    yield
    jax.clear_caches()


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def quantised(shape, contracted, name):
    return formats.quantize(normal(shape), contracted, formats.parse(name))


# Kept and contracted axes, and what is particular about them.
SHAPES = {
    "rows of scales": ((128, 4096), 1),  # 128 groups of 32
    "a step of the grid": ((2, 128, 512), 1),
    "steps of the grid": ((128, 3072), 1),  # of groups of 64: 6 blocks
    "odd groups": ((128, 1792), 1),  # 14 groups of 128
    "heads": ((128, 16, 128), 2),
}


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("int4-g32", "rows of scales", 8),
        ("int4-g32", "rows of scales", 40),
        ("int4-g32-affine", "a step of the grid", 3),
        ("int4-g64-affine", "steps of the grid", 100),
        ("int4-g128", "odd groups", 1),
        ("int4-g128", "odd groups", 600),  # more than are taken at a time, and no multiple of that
        ("int4-g128", "heads", 200),
        ("int4-g256", "heads", 5),
    ],
)
def test_the_int4_kernel_equals_its_twin(interpreted, name, shape, rows):
    shape, contracted = SHAPES[shape]
    w = quantised(shape, contracted, name)
    x = normal((1, rows, *shape[len(shape) - contracted :]), seed=1)
    y = int4_matmul.contract(contracted, x, w, jnp.float32)
    twin = arrays._contract(contracted, x, w)
    assert (y.shape, y.dtype) == (twin.shape, twin.dtype)
    np.testing.assert_allclose(y, twin, atol=2e-5 * float(jnp.std(twin)), rtol=1e-5)


@pytest.mark.parametrize(("rows", "tolerance"), [(8, 1e-5), (300, 2e-2)])
def test_in_bfloat16_only_scaled_values_are_rounded(interpreted, rows, tolerance):
    """Few rows: products of bfloat16 with int4 are exact, so the sums are the twin's. Many: 8 bits of each weight."""
    w, x = quantised((128, 512), 1, "int4-g128"), normal((rows, 512), seed=1).astype(jnp.bfloat16)
    twin = arrays._contract(1, x, w)
    error = jnp.abs(int4_matmul.contract(1, x, w, jnp.float32) - twin) / jnp.std(twin)
    assert float(jnp.max(error)) < tolerance
    assert float(jnp.sqrt(jnp.mean(error**2))) < tolerance / 5


@pytest.mark.parametrize(
    ("shape", "contracted", "name", "reason"),
    [
        ((128, 256), 1, "int8-g32", "int8 in 8 group"),
        ((128, 256), 1, "int4", "in 1 group"),
        ((128, 256), 1, "int4-g16", "groups of 16; expected 32, 64 or a multiple of 128"),
        ((64, 256), 1, "int4-g32", r"\[64, 256\] is not a multiple of 128 both ways"),
        ((128, 4, 128), 2, "int4-g32", r"contracts \[4, 128\]; expected one axis, or \[multiple of 8, 128\]"),
        ((128, 172 * 128), 1, "int4-g128", "are no multiple of 8 groups"),
    ],
)
def test_what_the_int4_kernel_does_not_take_is_said(shape, contracted, name, reason):
    w = jax.eval_shape(
        lambda w: formats.quantize(w, contracted, formats.parse(name)), jax.ShapeDtypeStruct(shape, "float32")
    )
    x = jnp.ones((1, *shape[len(shape) - contracted :]))
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda w: int4_matmul.contract(contracted, x, w, jnp.float32), w)
    assert kernels.choose({"w": w}, "tpu") == {}


def test_other_platforms_use_the_twin():
    w, x = quantised((128, 256), 1, "int4-g32"), normal((3, 256), seed=1)
    assert kernels.choose({"w": w}, "cpu") == {}
    (contract,) = kernels.choose({"w": w}, "tpu").values()
    fast = arrays.Fast(w, contract, "tpu")
    np.testing.assert_array_equal(arrays.einsum("BK,NK->BN", x, fast), arrays.einsum("BK,NK->BN", x, w))
    rows = jnp.asarray([5, 0])
    np.testing.assert_array_equal(arrays.take(fast, rows, "float32"), arrays.take(w, rows, "float32"))


@pytest.mark.parametrize(
    ("shape", "contracted", "kept_axes", "contracted_axes"),
    [
        ((128, 1024), 1, (None,), ("model",)),
        ((4, 128, 256), 1, (("model", "share"), None), (None,)),
        ((128, 16, 128), 2, (None,), ("model", None)),
        ((256, 256), 1, ("data",), ("model",)),  # as where weights are split over the batch's devices too
    ],
)
def test_on_a_mesh_each_device_contracts_its_part(interpreted, shape, contracted, kept_axes, contracted_axes):
    mesh = shard.make_mesh(2, 2, devices=jax.devices()[:4])
    w, x = quantised(shape, contracted, "int4-g32"), normal((2, 3, *shape[len(shape) - contracted :]), seed=1)
    values = NamedSharding(mesh, P(*kept_axes, *contracted_axes))
    scale = NamedSharding(mesh, P(*kept_axes, contracted_axes[0]))
    placed = dataclasses.replace(w, values=jax.device_put(w.values, values), scale=jax.device_put(w.scale, scale))
    (contract,) = kernels.choose({"w": placed}, "tpu", batch=("data",)).values()
    (y,) = jax.jit(functools.partial(contract, contracted, out=jnp.float32))(x, [placed], None)
    twin = arrays._contract(contracted, x, w)
    np.testing.assert_allclose(y, twin, atol=2e-5 * float(jnp.std(twin)), rtol=1e-5)
    batch, last = y.sharding.spec[0], y.sharding.spec[2:3]
    assert batch in ("data", ("data",))
    assert not any("data" in (entry or ()) for entry in last)


def test_groups_that_devices_would_share_are_left_to_xla():
    mesh = shard.make_mesh(model=4)
    w = quantised((128, 768), 1, "int4-g128")  # 6 groups
    values, scale = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
    placed = dataclasses.replace(w, values=jax.device_put(w.values, values), scale=jax.device_put(w.scale, scale))
    assert kernels.choose({"w": placed}, "tpu") == {}


# Every weight of it is one that the kernel takes, whole and halved.
CONFIG = dataclasses.replace(
    TINY,
    vocab_size=1024,
    embed_dim=2048,
    num_layers=1,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    ffw_dim=4096,
    tie_embeddings=False,
    dtype="bfloat16",
)


def kernels_in(compiled):
    module = hlo.parse(compiled.as_text())
    return [i for _, i in module.executed() if i.op == "custom-call" and "cost_estimate" in i.rest]


@aot
@pytest.mark.parametrize(
    ("target", "sizes", "format", "program"),
    [
        ("v5e:1x1", (1, 1, 1), "int4-g128", "step"),
        ("v5e:2x2", (2, 2, 1), "int4-g32", "prefill"),
        ("v5p:2x2x1", (2, 2, 1), "int4-g64-affine", "step"),
        ("v6e:2x2", (1, 2, 1), "int4-g128", "step"),
    ],
)
def test_programs_for_tpus_contract_int4_by_the_kernel_and_copy_no_weight(target, sizes, format, program):
    mesh = shard.make_mesh(*sizes, devices=targets.parse(target).devices())
    lower = Lowering(CONFIG, prediction.abstract_params(CONFIG, format), 8, 256, mesh)
    with targets.uncached():
        compiled = (lower.step() if program == "step" else lower.prefill(16)).compile()
    found = kernels_in(compiled)
    assert len(found) == 7
    assert contracts.check(compiled, lower.params, lower.state, 1, contracts.Contract(temp_share=0.5)) == []
    # Nor is there an int4 value in memory besides the arguments, laid out anew or not.
    module = hlo.parse(compiled.as_text())
    for _, i in module.executed():
        if i.op in ("parameter", "get-tuple-element", "tuple", "bitcast") or i.op.endswith(("-start", "-done")):
            continue
        assert not [s for s in i.shapes if s.dtype == "s4" and s.space == 0 and s.nbytes > 1 << 16], i
    rows = 8 if program == "step" else 8 * 16
    flops = 2 * rows * sum(leaf.size for leaf in _int4(lower.params)) / len(mesh.devices.flat)
    low, _ = hlo_cost.cost(module)
    assert low.kernel_flops == pytest.approx(flops)
    assert low.kernel_bytes > sum(leaf.size for leaf in _int4(lower.params)) / 2 / (sizes[1] * sizes[2])


def _int4(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, arrays.QArray))
    return [leaf for leaf in leaves if isinstance(leaf, arrays.QArray) and leaf.values.dtype == jnp.int4]


@aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("rows", "shape", "name"),
    [(8, (1024, 8192), "int4-g64"), (2048, (512, 3584), "int4-g128"), (8, (1024, 8, 128), "int4-g128")],
)
def test_the_int4_kernel_compiles_for_parts_of_large_models(chip, rows, shape, name):
    contracted = 2 if shape[-1] == 128 else 1
    w = jax.eval_shape(
        lambda w: formats.quantize(w, contracted, formats.parse(name)), jax.ShapeDtypeStruct(shape, "float32")
    )
    x = jax.ShapeDtypeStruct((rows, *shape[len(shape) - contracted :]), jnp.bfloat16)
    compiled = compile_for(chip, lambda x, w: int4_matmul.contract(contracted, x, w, jnp.bfloat16), x, w)
    assert len(kernels_in(compiled)) == 1
    low, _ = hlo_cost.cost(hlo.parse(compiled.as_text()))
    assert low.copied_bytes < 0.05 * w.size


def compile_for(chip, function, *args):
    mesh = shard.make_mesh(devices=targets.parse(chip).devices())
    whole = NamedSharding(mesh, P())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with targets.uncached(), jax.set_mesh(mesh):  # what a kernel asks of the chip is asked of the mesh
        return jax.jit(function, out_shardings=whole).lower(*args).compile()


def case(lengths, slots, dtype, page=8, heads=(8, 2), pages=4, rows=None, tokens=None, seed=0):
    """Rows with so many tokens in this call and slots in all, in pages drawn at random; some more rows and tokens."""
    rng = np.random.default_rng(seed)
    n, (N, K), H = len(lengths), heads, 128
    need = [-(-count // page) for count in slots]
    drawn = rng.permutation(sum(need) + 3)
    table = np.zeros((rows or n, pages), np.int32)
    for row, end in enumerate(np.cumsum(need)):
        table[row, : need[row]] = drawn[end - need[row] : end]
    starts = np.full((rows or n) + 1, sum(lengths), np.int32)
    starts[: n + 1] = np.cumsum([0, *lengths])
    lens = np.zeros(rows or n, np.int32)
    lens[:n] = slots
    q = rng.standard_normal((tokens or sum(lengths), N, H))
    kept = rng.standard_normal((len(drawn), page, 2 * K, H))
    kept = jnp.asarray(np.round(kept * 40), jnp.int8) if dtype == "int8" else jnp.asarray(kept, dtype)
    q = jnp.asarray(q, jnp.bfloat16 if dtype == "int8" else dtype)
    return q, kept, jnp.asarray(lens), jnp.asarray(table), jnp.asarray(starts), jnp.asarray(n, jnp.int32)


def naive(q, pages, lens, table, starts, rows, window=None, soft_cap=None):
    """Row by row and head by head, in float64."""
    q, pages = np.asarray(q, np.float64), np.asarray(pages, np.float64)
    y, group = np.zeros(q.shape), q.shape[1] // (pages.shape[2] // 2)
    for row in range(int(rows)):
        cache = pages[table[row]].reshape(-1, *pages.shape[2:])[: lens[row]]
        for token in range(starts[row], starts[row + 1]):
            at = lens[row] - (starts[row + 1] - token)
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(q.shape[1]):
                k, v = cache[first : at + 1, head // group * 2], cache[first : at + 1, head // group * 2 + 1]
                scores = k @ q[token, head] / np.sqrt(q.shape[2])
                scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                y[token, head] = weights @ v / weights.sum()
    return y


RAGGED = [
    # A decode step, a prefill chunk, a row without tokens, one without anything, one that ends where a page does.
    {"lengths": [1, 5, 0, 0, 7], "slots": [9, 5, 16, 0, 24], "rows": 7, "tokens": 20},
    {"lengths": [1, 1, 1], "slots": [1, 8, 32]},
]


@pytest.mark.parametrize("how", [{}, {"window": 3}, {"soft_cap": 2.0}])
@pytest.mark.parametrize("ragged", RAGGED)
def test_the_twin_of_paged_attention_equals_float64(ragged, how):
    args = case(**ragged, dtype="float32")
    expected = naive(*map(np.asarray, args), **how)
    np.testing.assert_allclose(paged.plain(*args, **how), expected, atol=1e-5)
    np.testing.assert_array_equal(paged.ragged_paged_attention(*args, **how), paged.plain(*args, **how))


def test_paged_attention_reads_no_slot_that_was_not_written():
    q, pages, lens, table, starts, rows = case(**RAGGED[0], dtype="float32")
    expected = paged.plain(q, pages, lens, table, starts, rows)
    written = np.zeros(pages.shape[:2], bool)
    for row in range(int(rows)):
        for slot in range(int(lens[row])):
            written[table[row, slot // pages.shape[1]], slot % pages.shape[1]] = True
    spoilt = jnp.where(written[:, :, None, None], pages, jnp.nan)
    np.testing.assert_array_equal(paged.plain(q, spoilt, lens, table, starts, rows), expected)


@pytest.mark.parametrize(
    ("dtype", "ragged", "how", "tolerance"),
    [
        ("float32", RAGGED[0], {"window": 6}, 1e-5),
        ("bfloat16", RAGGED[0], {"soft_cap": 2.0}, 2e-2),
        ("int8", RAGGED[1], {"k_scale": 1 / 40, "v_scale": 1 / 50}, 2e-2),
    ],
)
def test_jaxs_kernel_of_paged_attention_equals_the_twin(interpreted, dtype, ragged, how, tolerance):
    args = case(**ragged, dtype=dtype)
    every = {"window": None, "soft_cap": None, "k_scale": None, "v_scale": None} | how
    y, twin = (f(*args, **every).astype(jnp.float32) for f in (paged._kernel, paged.plain))
    np.testing.assert_allclose(y, twin, atol=tolerance)


def test_keys_and_values_lie_in_turn():
    k, v = normal((3, 2, 4)), normal((3, 2, 4), seed=1)
    both = paged.interleave(k, v)
    np.testing.assert_array_equal(both[:, 0::2], k)
    np.testing.assert_array_equal(both[:, 1::2], v)


def test_what_jaxs_kernel_does_not_take_is_said():
    q, pages = jnp.zeros((4, 8, 64)), jnp.zeros((2, 8, 4, 64))
    assert paged.unfit(q, pages) == "head_dim 64 is not a multiple of 128"
    q, pages = jnp.zeros((4, 9, 128)), jnp.zeros((2, 8, 6, 128), jnp.bfloat16)
    assert paged.unfit(q, pages) == "3 KV heads in bfloat16 do not fill tiles"
    assert paged.unfit(q, jnp.zeros((2, 8, 4, 128), jnp.int8)) == ""


@aot
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("chip", CHIPS)
def test_paged_attention_compiles_for_tpus(chip, dtype):
    R, X, T = 16, 64, 128
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    args = [jax.ShapeDtypeStruct((T, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((512, 32, 4, 128), jnp.dtype(dtype))]
    args += [number((R,)), number((R, X)), number((R + 1,)), number(())]
    how = {"k_scale": 0.1, "v_scale": 0.1} if dtype == "int8" else {"window": 1024}
    compiled = compile_for(chip, functools.partial(paged.ragged_paged_attention, **how), *args)
    (call,) = [i for _, i in hlo.parse(compiled.as_text()).executed() if i.op == "custom-call"]
    assert "ragged_paged_attention" in call.source
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # nothing of the pages' extent
