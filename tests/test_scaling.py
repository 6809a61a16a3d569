"""SmoothQuant and AWQ: their formulas in plain float64, Qwix's, and that the float model stays what it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.arrays import dequantize
from jaxllm.calibrate import SITES, Walk
from jaxllm.formats import parse
from jaxllm.params import flatten, unflatten
from jaxllm.transforms import scaling
from tests.conftest import FAMILIES

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


def activations(tokens=200, width=64, seed=0):
    """With a few loud channels, as language models have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width)) * width**-0.5
    return x * np.where(rng.random(width) < 0.1, 30.0, rng.uniform(0.3, 1.5, width))


def weight(rows=24, width=64, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, width)) * width**-0.5


def as32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquants_scale_is_equation_4(alpha):
    x, w = activations(), weight()
    got = scaling.smoothquant_scale(as32(np.abs(x).max(0)), as32(np.abs(w).max(0)), alpha)
    expected = [max(abs(x[:, j])) ** alpha / max(abs(w[:, j])) ** (1 - alpha) for j in range(64)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_channels_that_are_silent_or_unread_keep_their_scale():
    got = scaling.smoothquant_scale(jnp.asarray([0.0, 2.0, 0.0]), jnp.asarray([1.0, 0.0, 0.0]), 0.5)
    np.testing.assert_array_equal(got, [1, 1, 1])


@pytest.mark.peer
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_smoothquants_scale_is_qwixs(alpha):
    smooth_quant = pytest.importorskip("qwix.contrib.smooth_quant", reason="the peer extra is not installed")
    x, w = np.abs(activations()).max(0), np.abs(weight()).max(0)
    theirs = smooth_quant.compute_scales_ratio(as32(x), as32(w), alpha)
    np.testing.assert_allclose(scaling.smoothquant_scale(as32(x), as32(w), alpha), theirs, rtol=1e-4)


@pytest.mark.parametrize("name", ["int4", "int4-g16", "int8-g32-affine"])
def test_the_loss_that_awq_searches_by_is_that_of_the_outputs(name):
    """tr d H dᵀ against the outputs themselves, in float64."""
    x, w, fmt = activations(), weight(), parse(name)
    hessian = as32(x.T @ x / len(x))
    for scale in scaling.awq_scales(as32(np.abs(x).mean(0)))[::6]:
        q = dequantize(scaling.quantize(as32(w) * scale[None], 1, fmt))
        moved = np.asarray(q, np.float64) / np.asarray(scale, np.float64) - w
        expected = np.mean(np.sum((x @ moved.T) ** 2, axis=1))
        got = scaling.output_error(as32(w), scale, hessian, 1, fmt)
        np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_awqs_scales_are_powers_of_the_loudness():
    loud = np.abs(activations()).mean(0)
    tried = scaling.awq_scales(as32(loud))
    assert len(tried) == 20
    for step, scale in enumerate(tried):
        power = loud ** (step / 20)
        np.testing.assert_allclose(scale, power / np.sqrt(power.max() * power.min()), rtol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["int4", "int4-g16"])
def test_awqs_loss_and_scales_are_qwixs(name):
    """Qwix leaves out how channels go together: with H = diag(mean|x|)² the losses are the same, up to the mean."""
    core = pytest.importorskip("qwix.contrib.awq_core", reason="the peer extra is not installed")
    qarray = pytest.importorskip("qwix._src.core.qarray")
    x, w, fmt = activations(), weight(), dataclasses.replace(parse(name), scale_dtype="float32")
    loud = as32(np.abs(x).mean(0))
    how = qarray.HowToQuantize(
        qtype="int4", channelwise_axes=(0,), tiled_axes={} if fmt.group is None else {1: fmt.group}
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # Of 21 ratios from 0 to 1 the first 20 are ours.
        theirs = core.search_optimal_scales(as32(w), loud, how, n_grid=21)[0]
    losses = [
        float(scaling.output_error(as32(w), scale, jnp.diag(loud**2), 1, fmt)) for scale in scaling.awq_scales(loud)
    ]
    ours = scaling.awq_scales(loud)[int(np.argmin(losses))]
    assert 0 < int(np.argmin(losses)) < 19
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def biased(lm):
    """Biases and norms that are not nothing and one."""
    keys = jax.random.split(jax.random.key(3), len(lm.info))
    flat = flatten(lm.params)
    for key, (path, info) in zip(keys, lm.info.items(), strict=True):
        if not info.contracted:
            flat[path] = flat[path] + 0.3 * jax.random.normal(key, flat[path].shape)
    return dataclasses.replace(lm, params=unflatten(flat))


@pytest.mark.parametrize(
    ("method", "family"),
    [("smoothquant", "qwen2"), ("smoothquant", "qwen3"), ("awq", "qwen2"), ("awq", "llama3"), ("awq", "mistral")],
)
def test_rescaling_leaves_the_float_model_what_it_was(method, family):
    lm = biased(jaxllm.init(dataclasses.replace(FAMILIES[family], num_layers=2)))
    fmt = parse("int4-g16")
    walk, flat, changed = Walk(TOKENS), dict(flatten(lm.params)), set()
    walk.embed(lm.cfg, lm.params["embed"])
    for i in range(lm.cfg.num_layers):
        cfg, leaves = lm.cfg.layer(i), flatten(lm.params[f"layers_{i}"])
        inputs = walk.inputs(cfg, lm.params[f"layers_{i}"], ("absmax", "mean_abs", "hessian"))
        readers = [name for names in SITES.values() for name in names]
        if method == "smoothquant":
            new, after = scaling.smoothquant(cfg, leaves, inputs, readers, 0.5)
        else:
            contracted = {name: lm.info[f"layers_{i}/{name}"].contracted for name in readers}
            new, after = scaling.awq(cfg, leaves, inputs, dict.fromkeys(readers, fmt), contracted)
        flat |= {f"layers_{i}/{name}": leaf for name, leaf in new.items()}
        changed |= {name for name in leaves if not np.allclose(leaves[name], new[name], rtol=1e-3)}
        # What is said of the new activations is what is met.
        met = walk.inputs(cfg, unflatten(new), ("absmax", "mean_abs"))
        for site in SITES:
            np.testing.assert_allclose(met[site].absmax, after[site].absmax, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(met[site].mean_abs, after[site].mean_abs, rtol=1e-3, atol=1e-6)
        walk.advance(cfg, lm.params[f"layers_{i}"])
    scaled = dataclasses.replace(lm, params=unflatten(flat))
    np.testing.assert_allclose(jaxllm.logits(scaled, TOKENS), jaxllm.logits(lm, TOKENS), atol=1e-4, rtol=1e-4)
    expected = {"attn_norm/w", "mlp_norm/w", "attn/q/w", "mlp/gate/w", "mlp/up/w"}
    if method == "awq":
        expected |= {"mlp/down/w", "attn/v/w", "attn/o/w"} | ({"attn/v/b"} if lm.cfg.qkv_bias else set())
    assert expected <= changed


def test_awq_loses_less_of_the_output_than_rounding():
    """On loud channels, which is what it is for; the search includes no scaling at all, so it is never worse."""
    x, w, fmt = activations(), weight(), parse("int4")
    hessian, loud = as32(x.T @ x / len(x)), as32(np.abs(x).mean(0))
    losses = [float(scaling.output_error(as32(w), scale, hessian, 1, fmt)) for scale in scaling.awq_scales(loud)]
    assert min(losses) < 0.7 * losses[0]
