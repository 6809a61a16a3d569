"""The KV cache in int8: what rounding may cost, and that how a text is cut into calls does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.cache import Rounded, init_cache, round_int8
from jaxllm.models.decoder import Decoder
from tests.conftest import FAMILIES, TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)

pytestmark = pytest.mark.slow


def test_a_head_is_rounded_by_at_most_half_a_step():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 8)) * 10.0, jnp.float32).at[0, 0].set(0.0)
    rounded = round_int8(x)
    assert (rounded.values.dtype, rounded.scale.shape) == (jnp.int8, (2, 5, 3, 1))
    error = np.abs(np.asarray(rounded.values, np.float64) * np.asarray(rounded.scale, np.float64) - np.asarray(x))
    assert np.all(error <= np.asarray(rounded.scale) / 2 * (1 + 1e-5))
    np.testing.assert_array_equal(rounded.values[0, 0], 0)
    largest = np.abs(np.asarray(rounded.values, np.int32)).max(-1)
    assert (largest.reshape(-1)[3:] == 127).all()


@pytest.mark.parametrize(
    ("name", "batch", "split"),
    [
        ("mistral", 1, True),
        ("mistral", 3, True),
        ("qwen2", 3, True),
        ("qwen3", 3, True),
        ("mistral", 1, False),
        ("mistral", 3, False),
    ],
)
def test_prefill_then_decode_equals_one_forward(name, batch, split):
    """Each row of a batch of decode steps is written by a scatter of its own, all else as one slice."""
    lm = jaxllm.init(dataclasses.replace(FAMILIES[name], num_layers=2))
    lm = jaxllm.quantize_kv()(lm)
    tokens = TOKENS[:batch]
    full = jaxllm.logits(lm, tokens)
    decoder, cache, steps = Decoder(lm.cfg), init_cache(lm.cfg, batch, 32, split), []
    run = jax.jit(lambda tokens, positions, cache: decoder.apply({"params": lm.params}, tokens, positions, cache))
    for start, length in [(0, 8), (8, 8), *((t, 1) for t in range(16, 24))]:
        positions = np.broadcast_to(np.arange(start, start + length), (batch, length))
        logits, cache = run(tokens[:, start : start + length], positions, cache)
        steps.append(logits)
    # A key that float32 puts on the other side of a tie would move a logit by more: there is none in this text.
    np.testing.assert_allclose(np.concatenate(steps, axis=1), full, atol=2e-5)
    assert all(isinstance(part, Rounded) and part.values.dtype == jnp.int8 for part in (*cache.k, *cache.v))


def test_the_cache_takes_a_byte_a_value_and_a_scale_a_head():
    cfg = dataclasses.replace(TINY, kv_dtype="int8", head_dim=16)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(cfg, 2, 40)))
    assert nbytes == 2 * cfg.num_layers * 2 * 40 * cfg.num_kv_heads * (16 + 4)


def test_rounding_the_cache_costs_little(family):
    quality = jaxllm.compare(jaxllm.quantize_kv()(family), family, TOKENS)
    assert 0 < quality.kl < 1e-3


def test_uneven_layers_have_caches_of_their_own_size():
    cfg = dataclasses.replace(TINY, num_kv_heads=(4, 2, 1), num_heads=(8, 4, 4), kv_dtype="int8")
    cache = init_cache(cfg, 2, 16)
    assert [k.values.shape for k in cache.k] == [(2, 4, 8, 16), (2, 2, 8, 16), (2, 1, 8, 16)]
    assert [v.scale.shape for v in cache.v] == [(2, 4, 16, 1), (2, 2, 16, 1), (2, 1, 16, 1)]


def test_generation_equals_the_forward(tiny):
    lm = jaxllm.quantize_kv()(tiny)
    prompts = [list(range(5, 25)), [7]]
    engine = jaxllm.compile(lm, batch=2, max_len=48)
    for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=6), strict=True):
        tokens = np.asarray([[*prompt, *result.tokens]])
        expected = np.asarray(jaxllm.logits(lm, tokens))[0, len(prompt) - 1 : -1].argmax(-1)
        assert result.tokens == expected.tolist()


def test_it_is_done_once_and_at_any_time(tiny):
    with pytest.raises(ValueError, match="KV cache is int8 already"):
        jaxllm.chain(jaxllm.quantize_kv(), jaxllm.quantize_kv())(tiny)
    one = jaxllm.chain(jaxllm.quantize_kv(), jaxllm.prune(0.5), jaxllm.quantize("int8"))(tiny)
    other = jaxllm.chain(jaxllm.prune(0.5), jaxllm.quantize("int8"), jaxllm.quantize_kv())(tiny)
    assert one.cfg == other.cfg
    np.testing.assert_array_equal(jaxllm.logits(one, TOKENS), jaxllm.logits(other, TOKENS))
