"""Structured pruning: shapes shrink, what stays is what matters, and least squares makes up for what went."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.calibrate import Walk
from jaxllm.params import flatten, unflatten
from jaxllm.transforms.compact import kept_counts
from tests.conftest import FAMILIES, TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)


def silenced(lm, kept):
    """The model with the axes outside `kept` zeroed in place: {axis: {layer: indices}}."""
    flat = {}
    for path, leaf in flatten(lm.params).items():
        layer = path.split("/")[0]
        for axis, name in enumerate(lm.info[path].axes):
            if layer.startswith("layers_") and name in kept:
                gone = np.setdiff1d(np.arange(leaf.shape[axis]), kept[name][layer])
                leaf = leaf.at[(slice(None),) * axis + (gone,)].set(0)
        flat[path] = leaf
    return dataclasses.replace(lm, params=unflatten(flat))


def kept_rows(lm, small, i, name):
    """Which rows of a weight of layer i stayed."""
    before, after = (flatten(model.params)[f"layers_{i}/{name}/w"] for model in (lm, small))
    rows = {np.asarray(row).tobytes(): n for n, row in enumerate(before)}
    return np.asarray([rows[np.asarray(row).tobytes()] for row in after])


def test_a_compacted_model_equals_the_masked_one(family):
    lm = family
    small = jaxllm.compact(ffn=40, kv_heads=3, correct=False, calibration=TOKENS)(lm)
    assert (small.cfg.ffw_dim, small.cfg.num_kv_heads, small.cfg.num_heads) == (40, 3, 6)
    kept = {"ffw": {}, "heads": {}}
    for i in range(lm.cfg.num_layers):
        kept["ffw"][f"layers_{i}"] = kept_rows(lm, small, i, "mlp/up")
        heads = kept["heads"][f"layers_{i}"] = kept_rows(lm, small, i, "attn/q")
        # Query heads leave in whole groups of the KV head that they share.
        assert {h // 2 for h in heads} == {h // 2 for h in heads[::2]}
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(silenced(lm, kept), TOKENS), atol=2e-5)
    assert small.num_params < lm.num_params


def test_layers_may_keep_different_numbers(tiny):
    small = jaxllm.compact(ffn=(64, 40, 24), kv_heads=[1, 4, 2], calibration=TOKENS)(tiny)
    assert small.cfg.widths("ffw_dim") == (64, 40, 24)
    assert (small.cfg.num_kv_heads, small.cfg.num_heads) == ((1, 4, 2), (2, 8, 4))
    for path, leaf in flatten(small.params).items():
        assert leaf.shape == small.info[path].shape
    (result,) = jaxllm.compile(small, max_len=32).generate([[3, 1, 2]], max_new_tokens=3)
    tokens = np.asarray([[3, 1, 2, *result.tokens]])
    assert np.asarray(jaxllm.logits(small, tokens))[0, 2:-1].argmax(-1).tolist() == result.tokens


def test_layers_can_be_named(tiny):
    small = jaxllm.compact(layers=[0, 2], calibration=TOKENS)(tiny)
    assert small.cfg.num_layers == 2
    for path, leaf in flatten(small.params).items():
        np.testing.assert_array_equal(leaf, flatten(tiny.params)[path.replace("layers_1", "layers_2")])
    both = jaxllm.compact(ffn=[40, 24], layers=[0, 2], correct=False, calibration=TOKENS)(tiny)
    apart = jaxllm.compact(ffn=[40, 24], correct=False, calibration=TOKENS)(small)
    assert both.cfg == apart.cfg
    np.testing.assert_array_equal(jaxllm.logits(both, TOKENS), jaxllm.logits(apart, TOKENS))


def test_the_channels_that_stay_are_those_that_matter(tiny):
    """Channels 0 to 15 are made silent by their activations alone: their weights are the largest there are."""
    flat = flatten(tiny.params)
    for i in range(tiny.cfg.num_layers):
        flat[f"layers_{i}/mlp/up/w"] = flat[f"layers_{i}/mlp/up/w"].at[:16].set(1e-9)
        flat[f"layers_{i}/mlp/down/w"] = flat[f"layers_{i}/mlp/down/w"].at[:, :16].multiply(100.0)
    lm = dataclasses.replace(tiny, params=unflatten(flat))
    for correct in (True, False):
        small = jaxllm.compact(ffn=48, correct=correct, calibration=TOKENS)(lm)
        np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(lm, TOKENS), atol=1e-3)


@pytest.mark.parametrize("correct", [True, False])
def test_scaling_a_channel_between_up_and_down_changes_nothing_that_is_kept(tiny, correct):
    scale = jnp.asarray(10.0 ** np.random.default_rng(0).uniform(-2, 2, 64), jnp.float32)
    flat = flatten(tiny.params)
    flat["layers_0/mlp/up/w"] = flat["layers_0/mlp/up/w"] * scale[:, None]
    flat["layers_0/mlp/down/w"] = flat["layers_0/mlp/down/w"] / scale[None]
    same = dataclasses.replace(tiny, params=unflatten(flat))
    transform = jaxllm.compact(ffn=[40, 64, 64], correct=correct, calibration=TOKENS)
    np.testing.assert_allclose(
        jaxllm.logits(transform(same), TOKENS), jaxllm.logits(transform(tiny), TOKENS), atol=1e-3
    )


def test_a_channel_that_is_always_zero_goes_first(tiny):
    flat = flatten(tiny.params)
    dead = [3, 17, 40]
    flat["layers_0/mlp/up/w"] = flat["layers_0/mlp/up/w"].at[jnp.asarray(dead)].set(0.0)
    lm = dataclasses.replace(tiny, params=unflatten(flat))
    small = jaxllm.compact(ffn=[61, 64, 64], calibration=TOKENS)(lm)
    assert kept_rows(lm, small, 0, "mlp/gate").tolist() == [n for n in range(64) if n not in dead]
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(lm, TOKENS), atol=1e-3)


@pytest.mark.parametrize(
    ("keep", "reader", "site"),
    [({"ffn": [32, 64, 64]}, "mlp/down/w", "mlp/up"), ({"kv_heads": [2, 4, 4]}, "attn/o/w", "attn/v")],
)
def test_least_squares_makes_up_for_what_went(tiny, keep, reader, site):
    """The layer's output error, tr d H dᵀ over all channels, is lower than without, and near the least there is."""
    tokens = np.random.default_rng(1).integers(0, 256, (8, 64)).astype(np.int32)
    walk = Walk(tokens)
    walk.embed(tiny.cfg, tiny.params["embed"])
    found = walk.inputs(tiny.cfg.layer(0), tiny.params["layers_0"], ["hessian"], [site])[site]
    hessian = np.asarray(found.hessian, np.float64)
    full = np.asarray(flatten(tiny.params)[f"layers_0/{reader}"], np.float64).reshape(32, -1)
    error, columns = {}, {}
    for correct in (False, True):
        small = jaxllm.compact(**keep, correct=correct, calibration=tokens)(tiny)
        if site == "mlp/up":
            columns[correct] = kept_rows(tiny, small, 0, "mlp/up")
        else:
            columns[correct] = (kept_rows(tiny, small, 0, "attn/q")[:, None] * 8 + np.arange(8)).reshape(-1)
        d = -full
        new = np.asarray(flatten(small.params)[f"layers_0/{reader}"], np.float64).reshape(32, -1)
        d[:, columns[correct]] += new
        error[correct] = np.einsum("nk,kj,nj->", d, hessian, d)
    assert error[True] < 0.9 * error[False]
    S = columns[True]
    best = full @ hessian[:, S] @ np.linalg.pinv(hessian[np.ix_(S, S)])
    d = -full
    d[:, S] += best
    assert error[True] <= 1.05 * np.einsum("nk,kj,nj->", d, hessian, d) + 1e-9


def test_keeping_all_is_keeping_the_model(tiny):
    same = jaxllm.compact(ffn=64, kv_heads=1.0, layers=3, calibration=TOKENS)(tiny)
    assert same.cfg == tiny.cfg
    for path, leaf in flatten(same.params).items():
        np.testing.assert_array_equal(leaf, flatten(tiny.params)[path])


def test_the_layers_that_stay_are_those_that_matter(tiny):
    flat = flatten(tiny.params)
    for out in ("attn/o", "mlp/down"):
        flat[f"layers_1/{out}/w"] = flat[f"layers_1/{out}/w"] * 1e-4
    lm = dataclasses.replace(tiny, params=unflatten(flat))
    small = jaxllm.compact(layers=2, calibration=TOKENS)(lm)
    assert small.ledger[-1].args["layers"] == [0, 2]
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(lm, TOKENS), atol=2e-2)


@pytest.mark.parametrize(
    ("keep", "have", "count"),
    [(0.75, 1536, 1152), (0.84, 1536, 1280), (0.01, 1536, 128), (0.5, 64, 32), (1.0, 200, 200)],
)
def test_fractions_of_the_ffn_are_whole_tiles(keep, have, count):
    cfg = dataclasses.replace(FAMILIES["qwen2"], ffw_dim=have)
    assert kept_counts(cfg, ffn=keep)["ffn"] == (count,) * cfg.num_layers


def test_bfloat16_weights_stay_bfloat16():
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=1, dtype="bfloat16"))
    small = jaxllm.compact(ffn=40, kv_heads=2, calibration=TOKENS)(lm)
    assert {leaf.dtype for leaf in flatten(small.params).values()} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(np.asarray(jaxllm.logits(small, TOKENS))).all()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, "asked for nothing"),
        ({"ffn": 0.0}, "ffn=0.0 keeps a fraction"),
        ({"ffn": 65}, "ffn=65: the model has 64"),
        ({"ffn": [32, 32]}, "ffn has 2 counts; there are 3 layers"),
        ({"ffn": [32, 65, 32]}, "ffn=65: the model has 64"),
        ({"kv_heads": 0}, "kv_heads=0: the model has 4"),
        ({"layers": 1.5}, "layers=1.5 keeps a fraction"),
        ({"layers": [2, 1]}, r"layers=\[2, 1\]: expected rising numbers from 0 to 2"),
        ({"layers": [0, 3]}, "expected rising numbers from 0 to 2"),
        ({"layers": []}, "expected rising numbers"),
        ({"layers": [0, 1], "ffn": [32, 32, 32]}, "ffn has 3 counts; there are 2 layers"),
        ({"layers": 2, "calibration": TOKENS + 200}, "token ids run from"),
        ({"layers": 2, "calibration": None}, "no tokenizer"),
        ({"ffn": 32, "calibration": TOKENS[:, :1]}, "at least two a window"),
    ],
)
def test_nonsense_is_refused(tiny, keep, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.compact(**{"calibration": TOKENS} | keep)(tiny)
