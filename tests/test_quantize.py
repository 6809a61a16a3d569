"""Quantising a model: rules, methods and clips, what is promised of all of them, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import formats
from jaxllm.arrays import INT8_MAX, QArray, dequantize
from jaxllm.calibrate import SITE_OF, Walk
from jaxllm.params import flatten, unflatten
from jaxllm.transforms import quantize as module
from jaxllm.transforms.quantize import best_shrink
from tests.conftest import FAMILIES, TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
METHODS = ["rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq"]


@functools.cache
def small():
    return jaxllm.init(dataclasses.replace(TINY, num_layers=1))


def quantised(lm):
    return {path: leaf for path, leaf in flatten(lm.params).items() if isinstance(leaf, QArray)}


def floats(lm):
    """The model with each quantised weight as the float one that it stands for."""
    params = unflatten({path: dequantize(leaf) for path, leaf in flatten(lm.params).items()})
    return dataclasses.replace(lm, params=params)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("qwen3", "int8"),
        ("llama3", "int4-g16"),
        ("qwen2", "int8-g32-affine"),
        ("mistral", "int4-affine"),
        ("qwen2", "fp8"),
    ],
)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(family, format):
    lm = jaxllm.quantize(format)(jaxllm.init(FAMILIES[family]))
    leaves = flatten(lm.params)
    assert all(isinstance(leaves[path], QArray) == bool(info.contracted) for path, info in lm.info.items())
    # 16 bits of each activation: see test_arrays.
    np.testing.assert_allclose(jaxllm.logits(lm, TOKENS), jaxllm.logits(floats(lm), TOKENS), atol=3e-3)


@pytest.mark.parametrize(
    ("format", "method"),
    [*(("int4-g16-affine", method) for method in METHODS), ("w8a8-static", "rtn"), ("w8a8-static", "smoothquant+gptq")],
)
def test_zeros_stay_zeros_through_every_method(format, method):
    lm = jaxllm.prune(0.5)(small())
    done = jaxllm.quantize(format, method, calibration=TOKENS)(lm)
    for path, q in quantised(done).items():
        zero = np.asarray(flatten(lm.params)[path]) == 0
        assert np.all(np.asarray(dequantize(q))[zero] == 0), path
        assert zero.any() == path.startswith("layers_")


def test_gptq_moves_the_model_less_than_rounding(tiny):
    tokens = np.random.default_rng(1).integers(0, 256, (8, 48)).astype(np.int32)
    kl = {}
    for method in ("rtn", "gptq", "awq+gptq"):
        rules = {".*mlp.*": "int4-g16"}
        done = jaxllm.quantize(rules, method, calibration=tokens)(tiny)
        kl[method] = jaxllm.compare(done, tiny, tokens).kl
    assert kl["gptq"] < 0.8 * kl["rtn"]
    assert kl["awq+gptq"] < 0.8 * kl["rtn"]


def test_a_layer_is_quantised_on_what_the_quantised_ones_before_it_put_out(tiny):
    rules, alone = {"layers_0/.*": "int4", "layers_1/mlp/down/w": "int4"}, {"layers_1/mlp/down/w": "int4"}
    quantize = functools.partial(jaxllm.quantize, method="gptq", calibration=TOKENS)
    whole = quantised(quantize(rules)(tiny))["layers_1/mlp/down/w"]
    then = jaxllm.chain(quantize({"layers_0/.*": "int4"}), quantize(alone))(tiny)
    np.testing.assert_array_equal(whole.values, quantised(then)["layers_1/mlp/down/w"].values)
    assert not np.array_equal(whole.values, quantised(quantize(alone)(tiny))["layers_1/mlp/down/w"].values)


def test_static_steps_are_those_of_the_activations_that_come():
    lm = jaxllm.quantize("w8a8-static", calibration=TOKENS)(small())
    walk = Walk(TOKENS)
    walk.embed(lm.cfg, lm.params["embed"])
    found = walk.inputs(lm.cfg.layer(0), small().params["layers_0"], ["absmax"])
    for path, q in quantised(lm).items():
        if path.startswith("layers_0/"):
            largest = float(jnp.max(found[SITE_OF[path.removeprefix("layers_0/")]].absmax))
            assert float(q.x_scale) == pytest.approx(largest / INT8_MAX, rel=1e-4)
            assert q.int8_inputs
    dynamic = jaxllm.quantize("w8a8")(small())
    assert all(q.x_scale is None for q in quantised(dynamic).values())
    assert [q.int8_inputs for path, q in quantised(dynamic).items()] == [
        not path.startswith("embed") for path in quantised(lm)
    ]


@pytest.mark.parametrize("name", ["int4", "int4-affine", "int4-g16", "int8-g16-affine"])
def test_the_clip_of_least_error_is_that_of_all_that_are_tried(name):
    fmt = formats.parse(name)
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, (24, 64)), jnp.float32).at[0].set(0.0).at[1].set(2.5)
    shrink = best_shrink(formats.as_groups(w, fmt, 1), fmt)
    assert bool(jnp.all((shrink >= 0.39) & (shrink <= 1)))

    def error(shrink):
        moved = np.asarray(dequantize(formats.quantize(w, 1, fmt, shrink))) - np.asarray(w)
        return (moved**2).reshape(*shrink.shape, -1).sum(-1)

    best = error(shrink)
    tried = np.stack([error(jnp.full(shrink.shape, 1 - step / 40)) for step in range(25)])
    np.testing.assert_allclose(best, tried.min(0), rtol=1e-5, atol=1e-9)
    assert best.sum() < tried[0].sum() or fmt.bits == 8  # of so few values, nothing is worth clipping at 8 bits


def test_the_percentile_covers_all_but_a_thousandth():
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, (4, 8000)), jnp.float32)
    q = module._round(w, 1, formats.parse("int8"), "percentile")
    inside = np.abs(np.asarray(w)) <= np.asarray(q.scale) * 127.5 * (1 + 1e-6)
    np.testing.assert_allclose(inside.mean(1), 0.999, atol=2 / 8000)
    short = module._round(w[:, :64], 1, formats.parse("int8"), "percentile")
    whole = module._round(w[:, :64], 1, formats.parse("int8"), "absmax")
    np.testing.assert_array_equal(short.values, whole.values)  # of 64 values it is the largest


def test_a_large_weight_is_rounded_in_parts(monkeypatch):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((10, 3, 16)), jnp.float32)
    for name in ("int4-g16-affine", "int8"):
        whole = module._round(w, 1, formats.parse(name), "mse")
        monkeypatch.setattr(module, "_CHUNK", 3 * 16 * 4)
        parts = module._round(w, 1, formats.parse(name), "mse")
        monkeypatch.undo()
        jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_the_first_rule_that_matches_holds(tiny):
    rules = {"layers_0/.*": None, r".*/mlp/down/w": "int8-g32", r".*/mlp/.*": "int4", "embed/w": "int8"}
    lm = jaxllm.quantize(rules)(tiny)
    found = {path: (str(q.values.dtype), q.groups) for path, q in quantised(lm).items()}
    expected = {"embed/w": ("int8", 1)}
    for i in (1, 2):
        expected |= {f"layers_{i}/mlp/{name}/w": ("int4", 1) for name in ("gate", "up")}
        expected |= {f"layers_{i}/mlp/down/w": ("int8", 2)}
    assert found == expected


@pytest.mark.parametrize(("format", "ends"), [("int4-g16", "int8"), ("w8a8", "int8"), ("fp8", "float8_e4m3fn")])
def test_embedding_and_head_are_int8_unless_all_is_fp8(family, format, ends):
    found = quantised(jaxllm.quantize(format)(family))
    assert {str(q.values.dtype) for path, q in found.items() if not path.startswith("layers_")} == {ends}


def test_it_can_be_done_in_steps_and_once(tiny):
    some = jaxllm.quantize({r".*/mlp/.*": "int8"})(tiny)
    assert set(quantised(some)) == {path for path in tiny.info if "/mlp/" in path}
    rest = jaxllm.quantize({r".*/mlp/.*": None, ".*": "int8"})(some)
    full = jaxllm.quantize("int8")(tiny)
    jax.tree.map(np.testing.assert_array_equal, rest.params, full.params)
    with pytest.raises(ValueError, match="is quantised already; start from the original checkpoint"):
        jaxllm.quantize("int8")(full)


def test_bfloat16_models_are_quantised_and_stay_bfloat16():
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=1, dtype="bfloat16"))
    done = jaxllm.quantize({".*mlp.*": "int8-g16"}, "awq+gptq", calibration=TOKENS)(lm)
    rest = [leaf for leaf in flatten(done.params).values() if not isinstance(leaf, QArray)]
    assert {leaf.dtype for leaf in rest} == {jnp.dtype(jnp.bfloat16)}
    assert jaxllm.compare(done, lm, TOKENS).kl < 0.01


def test_the_ledger_says_what_was_done(tiny):
    entry = jaxllm.quantize({"layers_.*": "int4-g16"}, "smoothquant", alpha=0.7, calibration=TOKENS)(tiny).ledger[-1]
    assert (entry.name, entry.touched["layers_N/mlp/up/w"]) == ("quantize", 3)
    args = json.loads(json.dumps(entry.args))
    assert args["calibration"]["windows"] == [2, 24]
    assert {key: args[key] for key in ("format", "method", "alpha")} == {
        "format": {"layers_.*": "int4-g16"},
        "method": "smoothquant",
        "alpha": 0.7,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int3"}, "'int3' is no format of weights. There are int8"),
        ({"format": {".*": "int2"}}, "'int2' is no format"),
        ({"format": "int4-g24"}, r"int4-g24: layers_0/\w+/\w+/w contracts \d+ .* Groups of \[16, 32"),
        ({"format": {"nothing": "int8"}}, "No weight path matches 'nothing'"),
        ({"format": {".*norm.*": "int8"}}, "No weight path matches"),
        ({"format": {".*": "int8", "embed/w": "int4"}}, "rule 'embed/w' is never used"),
        ({"format": {".*": None}}, "leave every weight alone"),
        ({"format": {"embed/w": "w8a8"}}, "w8a8 does not reach embed/w"),
        ({"method": "hqq"}, "method is 'hqq'; expected one of rtn, gptq, awq"),
        ({"clip": "max"}, "clip is 'max'; expected one of absmax, mse, percentile"),
        ({"format": "fp8", "clip": "mse"}, 'clip="mse" goes with integer formats'),
        ({"method": "smoothquant", "alpha": 1.5}, "alpha is 1.5; expected a number from 0 to 1"),
        ({"method": "gptq"}, "no tokenizer"),
        ({"method": "awq", "calibration": TOKENS[:, :1]}, "at least two a window"),
        ({"format": "w8a8-static", "calibration": TOKENS + 240}, "token ids run from"),
    ],
)
def test_nonsense_is_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.quantize(**arguments)(tiny)
