"""Pruning in place: exact counts whatever the ties, the patterns, and the papers' choices in plain float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import calibrate
from jaxllm.params import flatten, unflatten
from jaxllm.transforms.mask import below_threshold, choose, global_threshold, least_of_group, parse_pattern, smallest
from tests.conftest import TINY

SOME = r"layers_0/(attn/k|attn/o|mlp/down)/w"  # narrow, with two contracted axes, and wide
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


@functools.cache
def model(kind):
    """One layer, in bfloat16 but for "float32", whose weights are hard to tell apart."""
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=1, dtype="float32" if kind == "float32" else "bfloat16"))
    rng, flat = np.random.default_rng(1), flatten(lm.params)
    for path in matrices(lm):
        w = flat[path]
        if kind == "ties":
            flat[path] = jnp.asarray(rng.integers(1, 4, w.shape) * rng.choice([-0.1, 0.1], w.shape), w.dtype)
        elif kind == "equal":
            flat[path] = jnp.full(w.shape, 0.25, w.dtype)
        elif kind == "zeros":  # a third, anywhere
            flat[path] = jnp.where(jnp.asarray(rng.random(w.shape) < 0.33), jnp.zeros((), w.dtype), w)
    return dataclasses.replace(lm, params=unflatten(flat))


def matrices(lm):
    return [path for path, info in lm.info.items() if info.contracted and path.startswith("layers_")]


def as_matrix(lm, path):
    w, contracted = flatten(lm.params)[path], lm.info[path].contracted
    return np.asarray(w, np.float64).reshape(int(np.prod(w.shape[:-contracted])), -1)


def statistics(lm, layer=0, kinds=("mean_square",)):
    walk = calibrate.Walk(TOKENS)
    walk.embed(lm.cfg, lm.params["embed"])
    for i in range(layer):
        walk.advance(lm.cfg.layer(i), lm.params[f"layers_{i}"])
    return walk.inputs(lm.cfg.layer(layer), lm.params[f"layers_{layer}"], kinds)


def test_the_smallest_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = [rng.random((5, 40)), rng.integers(0, 3, (5, 40)) * 0.5, np.zeros((5, 40)), np.full((5, 40), 7.0)]
    mark = jax.jit(smallest)
    for score in scores:
        for count in (0, 1, 17, 39, 40):
            gone = np.asarray(mark(jnp.asarray(score, jnp.float32), jnp.int32(count)))
            expected = np.zeros_like(gone)
            first = np.argsort(score.astype(np.float32), axis=1, kind="stable")[:, :count]
            np.put_along_axis(expected, first, True, axis=1)
            np.testing.assert_array_equal(gone, expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros"])
@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "4x8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_pattern_is_exact(method, pattern, kind):
    lm, shape = model(kind), parse_pattern(pattern)
    chosen = [path for path in matrices(lm) if re.fullmatch(SOME, path)]
    sparsity = shape.sparsity or 0.45
    pruned = jaxllm.prune(None if shape.of else sparsity, method, pattern, match=SOME, calibration=TOKENS)(lm)
    for path in chosen:
        before, after = as_matrix(lm, path), as_matrix(pruned, path)
        gone = after == 0
        assert gone[before == 0].all()
        N, K = after.shape
        if shape.of:
            fewest = gone.reshape(N, -1, shape.of).sum(-1)
            assert (fewest >= shape.of - shape.keep).all()
            if kind != "zeros":
                assert (fewest == shape.of - shape.keep).all()
        elif shape.block != (1, 1):
            R, C = shape.block
            blocks = gone.reshape(N // R, R, K // C, C).sum((1, 3))
            count = int(sparsity * (N // R) * (K // C))
            assert (blocks == R * C).sum() == count
            if kind != "zeros":
                assert set(np.unique(blocks)) <= {0, R * C}
        elif method == "wanda":  # by channel, of which some have more zeros already
            ends = [int(sparsity * K * r) for r in range(N + 1)]
            np.testing.assert_array_equal(gone.sum(1), np.maximum(np.diff(ends), (before == 0).sum(1)))
        else:
            assert gone.sum() == int(sparsity * N * K)
        if method != "sparsegpt":
            np.testing.assert_array_equal(after[~gone], before[~gone])


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_one_threshold_for_all_layers_is_exact(method, kind):
    lm = model(kind)
    pruned = jaxllm.prune(0.45, method, scope="global", calibration=TOKENS)(lm)
    found = {path: as_matrix(pruned, path) == 0 for path in matrices(lm)}
    assert sum(gone.sum() for gone in found.values()) == int(0.45 * sum(gone.size for gone in found.values()))
    if kind == "normal":
        assert len({gone.mean() for gone in found.values()}) > 1


def test_ties_over_several_arrays_are_broken_in_order():
    scores = [jnp.asarray(x, jnp.float32) for x in ([[1, 2, 2, 3]], [[2, 1], [2, 5]])]
    threshold, ties = global_threshold([lambda: scores[0], lambda: scores[1]], 4)
    gone = []
    for score in scores:
        marked, used = below_threshold(score, threshold, ties)
        ties -= int(used)
        gone.append(np.asarray(marked).tolist())
    assert gone == [[[True, True, True, False]], [[False, True], [False, False]]]


def test_global_wanda_compares_the_scores_of_all_layers(tiny):
    pruned = jaxllm.prune(0.3, "wanda", scope="global", calibration=TOKENS)(tiny)
    kept, gone = [], []
    for path in matrices(tiny):
        layer, _, name = path.partition("/")
        found = statistics(tiny, int(layer.removeprefix("layers_")))[calibrate.SITE_OF[name]]
        score = np.abs(as_matrix(tiny, path)) * np.sqrt(np.asarray(found.mean_square, np.float64))
        zero = as_matrix(pruned, path) == 0
        gone.append(score[zero].max())
        kept.append(score[~zero].min())
    assert max(gone) <= min(kept) * (1 + 1e-5)


def test_magnitude_takes_the_smallest_and_leaves_the_rest_of_the_model_alone(tiny):
    pruned = jaxllm.prune(0.3)(tiny)
    for path, before in flatten(tiny.params).items():
        before, after = np.asarray(before), np.asarray(flatten(pruned.params)[path])
        if path not in matrices(tiny):
            np.testing.assert_array_equal(after, before)
            continue
        gone = after == 0
        assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()


def test_wanda_compares_within_an_output_channel():
    lm = model("float32")
    pruned = jaxllm.prune(0.45, "wanda", calibration=TOKENS)(lm)
    for site, found in statistics(lm).items():
        norm = np.sqrt(np.asarray(found.mean_square, np.float64))
        for name in calibrate.SITES[site]:
            before, after = (as_matrix(model, f"layers_0/{name}") for model in (lm, pruned))
            total = 0
            for row, left in zip(before, after, strict=True):
                count = int((left == 0).sum())
                assert abs(count - 0.45 * len(row)) < 1
                total += count
                gone = {int(k) for k in np.argsort([abs(w) * n for w, n in zip(row, norm, strict=True)])[:count]}
                assert gone == set(np.flatnonzero(left == 0))
            assert total == int(0.45 * before.size)


def test_wanda_with_2_of_4_keeps_the_two_best_of_each_group():
    lm = model("float32")
    pruned = jaxllm.prune(None, "wanda", "2:4", calibration=TOKENS)(lm)
    norm = np.sqrt(np.asarray(statistics(lm)["mlp/up"].mean_square, np.float64))
    before, after = (as_matrix(model, "layers_0/mlp/down/w") for model in (lm, pruned))
    for row, left in zip(before, after, strict=True):
        for start in range(0, len(row), 4):
            score = np.abs(row[start : start + 4]) * norm[start : start + 4]
            assert set(np.flatnonzero(left[start : start + 4])) == set(np.argsort(score)[2:])


@pytest.mark.peer
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
def test_groups_of_neighbours_equal_qwix(keep, of):
    theirs = pytest.importorskip("qwix._src.core.sparsity", reason="the peer extra is not installed")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 64)), jnp.float32)
    mask = theirs.get_sparsity_mask(w, n_sparsity=keep, m_sparsity=of, order="R")
    np.testing.assert_array_equal(~np.asarray(mask, bool), least_of_group(jnp.abs(w), of - keep, of))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_is_pruned_on_what_the_pruned_ones_before_it_put_out(method, tiny):
    """Layer 1 of the whole run is that of a model whose layer 0 was pruned before, and not that of the dense one."""
    prune = functools.partial(jaxllm.prune, 0.5, method, calibration=TOKENS)
    whole, alone = prune(match=r"layers_[01]/mlp/.*")(tiny), prune(match=r"layers_1/mlp/.*")(tiny)
    then = jaxllm.chain(prune(match=r"layers_0/mlp/.*"), prune(match=r"layers_1/mlp/.*"))(tiny)
    path = "layers_1/mlp/down/w"
    np.testing.assert_array_equal(flatten(whole.params)[path], flatten(then.params)[path])
    assert not np.array_equal(flatten(whole.params)[path], flatten(alone.params)[path])


def test_rules_give_each_weight_the_first_fraction_that_matches(tiny):
    pruned = jaxllm.prune({r".*/mlp/down/w": 0.5, r".*/mlp/.*": 0.25, r"layers_0/attn/.*": 0.0})(tiny)
    for path in matrices(tiny):
        expected = 0.5 if "down" in path else 0.25 if "mlp" in path else 0
        assert (as_matrix(pruned, path) == 0).mean() == expected


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_more_can_be_pruned_later_and_zeros_stay(method):
    lm = model("float32")
    prune = functools.partial(jaxllm.prune, method=method, match=".*/down/w", calibration=TOKENS)
    once = as_matrix(prune(0.3)(lm), "layers_0/mlp/down/w") == 0
    twice = as_matrix(jaxllm.chain(prune(0.3), prune(0.6))(lm), "layers_0/mlp/down/w") == 0
    assert twice[once].all()
    assert twice.sum() == int(0.6 * twice.size)


def test_a_block_goes_by_the_sum_of_its_scores():
    score = jnp.arange(32, dtype=jnp.float32).reshape(4, 8)
    gone = np.asarray(choose(score, parse_pattern("2x4"), 2))
    assert gone[:2].all()
    assert not gone[2:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0; expected .* \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({}, "sparsity is missing"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "the pattern 2:4 makes it 0.5"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "'4:2' is no pattern. There are unstructured, N:M"),
        ({"sparsity": 0.5, "pattern": "0x4"}, "'0x4' is no pattern"),
        ({"pattern": "3:5"}, r"layers_0/attn/\w/w is \d+ x 32, which groups of 5 inputs do not"),
        ({"sparsity": 0.5, "pattern": "24x4"}, r"layers_0/attn/\w/w is \d+ x 32, which blocks of 24 x 4"),
        ({"sparsity": 0.5, "method": "movement"}, "method is 'movement'; expected one of magnitude, wanda, sparsegpt"),
        ({"sparsity": 0.5, "scope": "world"}, 'scope is .*"global" or "sensitivity"'),
        ({"sparsity": 0.5, "scope": "global", "method": "sparsegpt"}, 'scope="global" goes with'),
        ({"pattern": "2:4", "scope": "global"}, 'scope="global" goes with'),
        ({"sparsity": 0.5, "match": "mlp"}, r"No weight path matches 'mlp'.*layers_N/mlp/gate/w"),
        ({"sparsity": 0.5, "match": "("}, "not a regular expression"),
        ({"sparsity": {".*": 0.5, r".*/mlp/.*": 0.2}}, r"rule '\.\*/mlp/\.\*' is never used"),
        ({"sparsity": 0.5, "method": "wanda"}, "no tokenizer"),
        ({"sparsity": 0.5, "method": "wanda", "match": ".*"}, "wanda does not reach embed/w"),
        (
            {"sparsity": 0.5, "method": "wanda", "match": ".*", "scope": "global", "calibration": TOKENS},
            "wanda does not reach embed/w",
        ),
        ({"sparsity": 0.5, "method": "wanda", "calibration": TOKENS[:, :1]}, "at least two a window"),
    ],
)
def test_nonsense_is_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.prune(**arguments)(tiny)


def test_an_integer_is_a_fraction_too(tiny):
    for scope in ("layer", "global"):
        same = jaxllm.prune(0, scope=scope)(tiny)
        assert (as_matrix(same, "layers_0/mlp/up/w") != 0).all()


def test_the_cubic_schedule_is_zhu_and_guptas():
    at = jax.jit(jaxllm.cubic_schedule(0.8, begin=10, end=50, initial=0.2))
    steps = np.arange(70)
    expected = 0.8 + (0.2 - 0.8) * (1 - np.clip((steps - 10) / 40, 0, 1)) ** 3
    np.testing.assert_allclose([at(step) for step in steps], expected, atol=1e-6)


@pytest.mark.parametrize("given", [(1.0, 0, 5), (0.5, 5, 5), (0.5, -1, 5), (0.5, 0, 5, 0.6), (float("nan"), 0, 5)])
def test_a_schedule_that_cannot_be_is_refused(given):
    with pytest.raises(ValueError, match="expected 0 <="):
        jaxllm.cubic_schedule(*given)
