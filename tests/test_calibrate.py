"""Statistics of activations, gathered a layer at a time, against those of one forward pass in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.arrays import INT8_MAX, Tap
from jaxllm.calibrate import BIN_EDGES, SITES, Inputs, Walk
from jaxllm.config import Llama3Rope
from jaxllm.lm import forward
from jaxllm.params import flatten, unflatten
from jaxllm.transforms.quantize import static_range
from tests.conftest import FAMILIES, TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 12)).astype(np.int32)
KINDS = ("absmax", "mean_abs", "mean_square", "hessian", "histogram")


def met(lm):
    """{weight path: what it is contracted with, float64 [tokens, K]} in one pass over all layers and windows."""

    @jax.jit
    def run(params):
        seen, flat = {}, flatten(params)
        for path in flat:
            if path.startswith("layers_") and lm.info[path].contracted:
                flat[path] = Tap(flat[path], functools.partial(lambda path, x, y: seen.update({path: x}), path))
        forward(lm.cfg, unflatten(flat), jnp.asarray(TOKENS))
        return seen

    return {path: np.asarray(x, np.float64).reshape(TOKENS.size, -1) for path, x in run(lm.params).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_statistics_are_those_of_one_forward(name):
    family = jaxllm.init(dataclasses.replace(FAMILIES[name], num_layers=2))
    seen, walk = met(family), Walk(TOKENS)
    walk.embed(family.cfg, family.params["embed"])
    for i in range(family.cfg.num_layers):
        cfg, layer = family.cfg.layer(i), family.params[f"layers_{i}"]
        found = walk.inputs(cfg, layer, KINDS)
        assert set(found) == set(SITES)
        for site, inputs in found.items():
            for reader in SITES[site]:  # all of a site's readers meet the same
                x = seen[f"layers_{i}/{reader}"]
                np.testing.assert_allclose(inputs.absmax, np.abs(x).max(0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(inputs.mean_abs, np.abs(x).mean(0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(inputs.mean_square, (x**2).mean(0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(inputs.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
                counts, _ = np.histogram(np.abs(x), np.concatenate([[0], BIN_EDGES, [np.inf]]))
                moved = np.abs(np.asarray(inputs.histogram) - counts).sum() / 2  # over an edge, in float32
                assert moved <= 1e-3 * x.size
                assert float(np.asarray(inputs.histogram).sum()) == x.size
        walk.advance(cfg, layer)


def test_only_what_is_asked_for_is_gathered(tiny):
    walk = Walk(TOKENS)
    walk.embed(tiny.cfg, tiny.params["embed"])
    found = walk.inputs(tiny.cfg.layer(0), tiny.params["layers_0"], ["absmax"], ["mlp/up"])
    assert list(found) == ["mlp/up"]
    assert [name for name, part in vars(found["mlp/up"]).items() if part is not None] == ["absmax"]


def test_the_first_statistics_are_numpys(tiny):
    """Without any code of the model's: the embedding's rows, normalised."""
    walk = Walk(TOKENS)
    walk.embed(tiny.cfg, tiny.params["embed"])
    found = walk.inputs(tiny.cfg.layer(0), tiny.params["layers_0"], ["mean_square"])["attn_norm"].mean_square
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tiny.params).items()}
    x = flat["embed/w"][TOKENS]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + tiny.cfg.norm_eps) * flat["layers_0/attn_norm/w"]
    np.testing.assert_allclose(found, np.mean(x**2, axis=(0, 1)), rtol=1e-5)


def test_divided_inputs_are_the_statistics_of_divided_activations():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((50, 6)), rng.uniform(0.1, 5, 6)

    def of(x):
        parts = np.abs(x).max(0), np.abs(x).mean(0), (x**2).mean(0), x.T @ x / len(x)
        return Inputs(*(jnp.asarray(part, jnp.float32) for part in parts))

    got, expected = of(x).divided(jnp.asarray(scale, jnp.float32)), of(x / scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), vars(got), vars(expected))
    assert got.histogram is None


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_static_range_of_the_percentile_is_within_a_bin_of_the_exact_one(spread):
    x = np.abs(np.random.default_rng(0).standard_normal(40000)) ** spread * 3
    counts, _ = np.histogram(x, np.concatenate([[0], BIN_EDGES, [np.inf]]))
    inputs = Inputs(absmax=jnp.asarray([x.max()], jnp.float32), histogram=jnp.asarray(counts, jnp.float32))
    exact = np.percentile(x, 99.9)
    assert exact / 2**0.125 <= static_range(inputs, "percentile") <= exact * 2**0.125
    assert static_range(inputs, "absmax") == pytest.approx(x.max())


def test_the_static_range_of_the_least_error_is_that_of_the_least_error():
    rng = np.random.default_rng(0)
    x = np.abs(np.concatenate([rng.standard_normal(20000), [25.0, 30.0]]))
    counts, _ = np.histogram(x, np.concatenate([[0], BIN_EDGES, [np.inf]]))
    inputs = Inputs(absmax=jnp.asarray([x.max()], jnp.float32), histogram=jnp.asarray(counts, jnp.float32))

    def error(range_):
        step = range_ / INT8_MAX
        return np.mean((np.clip(np.round(x / step), -INT8_MAX, INT8_MAX) * step - x) ** 2)

    chosen = static_range(inputs, "mse")
    least = min(error(x.max() * (1 - i / 40)) for i in range(25))
    assert error(chosen) <= 1.1 * least
    assert chosen < x.max()


def test_a_site_that_is_always_silent_has_a_range():
    silent = Inputs(absmax=jnp.zeros(4), histogram=jnp.zeros(len(BIN_EDGES) + 1).at[0].set(40.0))
    assert {static_range(silent, clip) for clip in ("absmax", "mse", "percentile")} == {1.0}


def test_layers_of_different_widths_are_walked():
    cfg = dataclasses.replace(
        TINY, ffw_dim=(64, 40, 24), num_kv_heads=(4, 2, 1), num_heads=(8, 4, 4), rope_scaling=Llama3Rope(8, 1, 4, 64)
    )
    lm = jaxllm.init(cfg)
    seen, walk = met(lm), Walk(TOKENS)
    walk.embed(cfg, lm.params["embed"])
    for i in range(3):
        found = walk.inputs(cfg.layer(i), lm.params[f"layers_{i}"], ["mean_square"])
        x = seen[f"layers_{i}/mlp/down/w"]
        np.testing.assert_allclose(found["mlp/up"].mean_square, (x**2).mean(0), rtol=1e-4, atol=1e-6)
        walk.advance(cfg.layer(i), lm.params[f"layers_{i}"])
