import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compile import _Shardings
from jaxllm.sample import Sampling, as_arrays, keep_likely, next_token
from jaxllm.shard import RULES, make_mesh
from tests.conftest import TINY


def kept(logits, **how):
    """Indices that the filters keep, by the device's code and by sorting in NumPy."""
    how = Sampling(temperature=1.0, **how)
    arrays = as_arrays(how, frozenset())
    out = jax.jit(keep_likely)(jnp.asarray(logits)[None], arrays.top_k, arrays.top_p, arrays.min_p)[0]

    probs = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    probs /= probs.sum()
    if how.top_k:
        probs[probs < np.sort(probs)[-min(how.top_k, len(probs))]] = 0
        probs /= probs.sum()
    if how.top_p < 1:
        ordered = np.sort(probs)[::-1]
        probs[probs < ordered[np.searchsorted(np.cumsum(ordered), how.top_p)]] = 0
    expected = (probs > 0) & (probs >= how.min_p * probs.max())
    return np.flatnonzero(np.isfinite(out)).tolist(), np.flatnonzero(expected).tolist()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_filters_keep_what_sorting_would(how, scale):
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32) * scale
    ours, sorted_ones = kept(logits, **how)
    assert ours == sorted_ones


def test_ties_at_the_border_stay():
    ours, expected = kept(np.asarray([1.0, 3.0, 3.0, 3.0, 0.0], np.float32), top_k=2)
    assert ours == expected == [1, 2, 3]


def test_draws_follow_the_distribution():
    probs = np.asarray([0.5, 0.25, 0.125, 0.125])
    rows = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (rows, 4))
    how = as_arrays(Sampling(temperature=1.0, seed=5), frozenset())
    tokens = next_token(logits, jnp.zeros((rows, 4), bool), jnp.arange(rows), jnp.zeros(rows, jnp.int32), how)
    counts = np.bincount(tokens, minlength=4) / rows
    np.testing.assert_allclose(counts, probs, atol=4 * np.sqrt(0.25 / rows))


def test_temperature_zero_is_greedy_and_the_penalty_comes_first():
    logits = jnp.asarray([[2.0, 1.9, -1.0]])
    seen = jnp.asarray([[True, False, False]])
    for penalty, expected in [(1.0, 0), (1.2, 1)]:
        how = as_arrays(Sampling(repetition_penalty=penalty), frozenset())
        assert int(next_token(logits, seen, *[jnp.zeros(1, jnp.int32)] * 2, how)[0]) == expected


def test_a_tiny_temperature_is_nearly_greedy():
    logits = jnp.asarray([[1.0, 5.0, 4.9]])
    how = as_arrays(Sampling(temperature=1e-38), frozenset())
    assert int(next_token(logits, jnp.zeros((1, 3), bool), *[jnp.zeros(1, jnp.int32)] * 2, how)[0]) == 1


def test_the_likeliest_token_over_a_mesh_is_the_first_of_the_highest():
    logits = np.random.default_rng(0).integers(0, 6, (4, 32)).astype(np.float32)  # many are equal
    logits[1, 20], logits[2, :] = np.nan, -np.inf
    for sizes in ((1, 4, 1), (2, 1, 2)):
        sharded = _Shardings(TINY, make_mesh(*sizes), RULES)
        tokens = jax.jit(sharded.likeliest)(jax.device_put(logits, sharded.of("batch", "vocab")))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
