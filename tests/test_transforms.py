import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import calibrate
from jaxllm.arrays import QArray, dequantize
from jaxllm.params import flatten, unflatten
from jaxllm.transforms.mask import below_threshold, global_threshold
from tests.conftest import FAMILIES

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)


def zeros(lm, path):
    return int(jnp.sum(flatten(lm.params)[path] == 0))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
def test_sparsity_is_exact_in_every_layer_and_the_smallest_go(tiny, sparsity):
    pruned = jaxllm.prune(sparsity)(tiny)
    for path, before in flatten(tiny.params).items():
        after = np.asarray(flatten(pruned.params)[path])
        before = np.asarray(before)
        if not path.startswith("layers_") or not tiny.info[path].contracted:
            assert after is before or np.array_equal(after, before)
            continue
        gone = after == 0
        assert gone.sum() == int(sparsity * before.size)
        np.testing.assert_array_equal(after[~gone], before[~gone])
        if gone.sum() > 0:
            assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()


def test_global_sparsity_is_exact_over_all_layers(tiny):
    pruned = jaxllm.prune(0.4, scope="global")(tiny)
    paths = [path for path, info in tiny.info.items() if info.contracted and path.startswith("layers_")]
    total = sum(np.prod(tiny.info[path].shape) for path in paths)
    assert sum(zeros(pruned, path) for path in paths) == int(0.4 * total)
    assert len({zeros(pruned, path) / np.prod(tiny.info[path].shape) for path in paths}) > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_are_broken_in_order_across_leaves(dtype):
    scores = [jnp.abs(jnp.asarray(x, dtype)).astype(jnp.float32) for x in ([[1, -2, 2, 3]], [[2, -1], [2, 5]])]
    threshold, ties = global_threshold([lambda: scores[0], lambda: scores[1]], 4)
    gone = []
    for score in scores:
        marked, used = below_threshold(score, threshold, ties)
        ties -= int(used)
        gone.append(np.asarray(marked).tolist())
    assert gone == [[[True, True, True, False]], [[False, True], [False, False]]]


def test_quantised_model_equals_the_model_of_its_dequantised_weights(family):
    quantised = jaxllm.quantize("int8")(family)
    leaves = flatten(quantised.params)
    assert all(isinstance(leaves[path], QArray) == bool(info.contracted) for path, info in family.info.items())
    params = unflatten({path: dequantize(leaf) for path, leaf in leaves.items()})
    same = dataclasses.replace(family, params=params)
    np.testing.assert_allclose(jaxllm.logits(quantised, TOKENS), jaxllm.logits(same, TOKENS), atol=3e-3)


def test_quantisation_is_selectable_by_path_and_can_be_done_in_steps(tiny):
    some = jaxllm.quantize({r".*/mlp/.*": "int8"})(tiny)
    quantised = {path for path, leaf in flatten(some.params).items() if isinstance(leaf, QArray)}
    assert quantised == {path for path in tiny.info if "/mlp/" in path}
    rest = jaxllm.quantize({r".*/mlp/.*": None, ".*": "int8"})(some)
    full = jaxllm.quantize("int8")(tiny)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), rest.params, full.params))
    with pytest.raises(ValueError, match="quantised already"):
        jaxllm.quantize("int8")(full)


def test_zeros_survive_quantisation(tiny):
    lm = jaxllm.chain(jaxllm.prune(0.5), jaxllm.quantize("int8"))(tiny)
    q = flatten(lm.params)["layers_0/mlp/up/w"]
    assert int(jnp.sum(q.values == 0)) >= q.size // 2


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


def test_a_compacted_model_equals_the_masked_one(family):
    lm = family
    small = jaxllm.compact(ffn=40, kv_heads=3, correct=False, calibration=TOKENS)(lm)
    assert (small.cfg.ffw_dim, small.cfg.num_kv_heads, small.cfg.num_heads) == (40, 3, 6)
    before, after = flatten(lm.params), flatten(small.params)
    kept = {"ffw": {}, "heads": {}}
    for i in range(lm.cfg.num_layers):
        layer = f"layers_{i}"
        for axis, path in {"ffw": f"{layer}/mlp/up/w", "heads": f"{layer}/attn/q/w"}.items():
            rows = {np.asarray(row).tobytes(): n for n, row in enumerate(before[path])}
            kept[axis][layer] = np.asarray([rows[np.asarray(row).tobytes()] for row in after[path]])
        # Query heads leave in whole groups of the KV head that they share.
        assert {h // 2 for h in kept["heads"][layer]} == {h // 2 for h in kept["heads"][layer][::2]}
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(silenced(lm, kept), TOKENS), atol=2e-5)
    assert small.num_params < lm.num_params


def test_the_channels_that_stay_are_those_that_matter(tiny):
    """Channels 0 to 15 are made silent by their activations alone: their weights are the largest there are."""
    flat = flatten(tiny.params)
    for i in range(tiny.cfg.num_layers):
        flat[f"layers_{i}/mlp/up/w"] = flat[f"layers_{i}/mlp/up/w"].at[:16].set(1e-9)
        flat[f"layers_{i}/mlp/down/w"] = flat[f"layers_{i}/mlp/down/w"].at[:, :16].multiply(100.0)
    lm = dataclasses.replace(tiny, params=unflatten(flat))
    small = jaxllm.compact(ffn=48, calibration=TOKENS)(lm)
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(lm, TOKENS), atol=1e-3)


def test_the_layers_that_stay_are_those_that_matter(tiny):
    flat = flatten(tiny.params)
    for out in ("attn/o", "mlp/down"):
        flat[f"layers_1/{out}/w"] = flat[f"layers_1/{out}/w"] * 1e-4
    lm = dataclasses.replace(tiny, params=unflatten(flat))
    small = jaxllm.compact(layers=2, calibration=TOKENS)(lm)
    assert small.ledger[-1].args["layers"] == [0, 2]
    np.testing.assert_allclose(jaxllm.logits(small, TOKENS), jaxllm.logits(lm, TOKENS), atol=2e-2)
    assert jaxllm.compile(small, max_len=32).generate([[1, 2]], max_new_tokens=4)


@pytest.mark.parametrize(
    ("keep", "have", "count"),
    [(0.75, 1536, 1152), (0.84, 1536, 1280), (0.01, 1536, 128), (0.5, 64, 32), (1.0, 200, 200)],
)
def test_fractions_of_the_ffn_are_whole_tiles(keep, have, count):
    lm = jaxllm.init(dataclasses.replace(FAMILIES["qwen2"], ffw_dim=have))
    assert jaxllm.compact(ffn=keep, calibration=TOKENS)(lm).cfg.ffw_dim == count


def test_statistics_equal_numpys(tiny):
    walk = calibrate.Walk(TOKENS)
    walk.embed(tiny.cfg, tiny.params["embed"])
    found = walk.inputs(tiny.cfg.layer(0), tiny.params["layers_0"], ["mean_square"])["attn_norm"].mean_square
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tiny.params).items()}
    x = flat["embed/w"][TOKENS]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + tiny.cfg.norm_eps) * flat["layers_0/attn_norm/w"]
    np.testing.assert_allclose(found, np.mean(x**2, axis=(0, 1)), rtol=1e-5)


def test_the_ledger_tells_what_was_done(tiny):
    lm = jaxllm.chain(jaxllm.compact(ffn=32, calibration=TOKENS), jaxllm.prune(0.5), jaxllm.quantize("int8"))(tiny)
    assert [entry.name for entry in lm.ledger] == ["init", "compact", "prune", "quantize"]
    assert lm.ledger[2].args == {
        "sparsity": 0.5,
        "method": "magnitude",
        "pattern": "unstructured",
        "scope": "layer",
        "match": r"layers_\d+/.*",
    }
    assert lm.ledger[2].touched["layers_N/mlp/gate/w"] == 3
    assert len({entry.parent for entry in lm.ledger}) == 4
    assert tiny.ledger == lm.ledger[:1]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda: jaxllm.prune(1.0), r"sparsity is 1.0; expected .* \[0, 1\)"),
        (lambda: jaxllm.prune(-0.1), "sparsity is -0.1"),
        (lambda: jaxllm.prune(0.5, scope="world"), 'scope is .*"global" or "sensitivity"'),
        (lambda: jaxllm.prune(0.5, match="mlp"), r"No weight path matches 'mlp'.*layers_N/mlp/gate/w"),
        (lambda: jaxllm.prune(0.5, match="("), "not a regular expression"),
        (lambda: jaxllm.quantize({"nothing": "int8"}), "No weight path matches"),
        (lambda: jaxllm.quantize({".*norm.*": "int8"}), "No weight path matches"),
        (lambda: jaxllm.compact(), "asked for nothing"),
        (lambda: jaxllm.compact(ffn=0.0, calibration=TOKENS), "ffn=0.0 keeps a fraction"),
        (lambda: jaxllm.compact(ffn=65, calibration=TOKENS), "ffn=65: the model has 64"),
        (lambda: jaxllm.compact(kv_heads=0, calibration=TOKENS), "kv_heads=0: the model has 4"),
        (lambda: jaxllm.compact(layers=1.5, calibration=TOKENS), "layers=1.5 keeps a fraction"),
        (lambda: jaxllm.compact(layers=2, calibration=TOKENS + 200), "token ids run from"),
        (lambda: jaxllm.compact(layers=2), "no tokenizer"),
        (lambda: jaxllm.compact(layers=2, calibration=TOKENS[:, :1]), "at least two a window"),
        (lambda: jaxllm.chain(jaxllm.quantize("int8"), jaxllm.prune(0.5)), "cannot follow quantize"),
        (lambda: jaxllm.chain(jaxllm.quantize("int8"), jaxllm.compact(ffn=32)), "cannot follow quantize"),
    ],
)
def test_nonsense_is_refused(tiny, transform, message):
    with pytest.raises(ValueError, match=message):
        transform()(tiny)
