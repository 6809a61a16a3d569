"""The KV cache in int8: what rounding may cost, and that how a text is cut into calls does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import cache as kv
from jaxllm import shard
from jaxllm.cache import LayerCache, Rounded, init_cache, round_int8
from jaxllm.compile import _Shardings
from jaxllm.models.decoder import Decoder
from tests.conftest import FAMILIES, TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)

slow = pytest.mark.slow


@slow
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
@slow
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


@slow
def test_the_cache_takes_a_byte_a_value_and_a_scale_a_head():
    cfg = dataclasses.replace(TINY, kv_dtype="int8", head_dim=16)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(cfg, 2, 40)))
    assert nbytes == 2 * cfg.num_layers * 2 * 40 * cfg.num_kv_heads * (16 + 4)


@slow
def test_rounding_the_cache_costs_little(family):
    quality = jaxllm.compare(jaxllm.quantize_kv()(family), family, TOKENS)
    assert 0 < quality.kl < 1e-3


@slow
def test_uneven_layers_have_caches_of_their_own_size():
    cfg = dataclasses.replace(TINY, num_kv_heads=(4, 2, 1), num_heads=(8, 4, 4), kv_dtype="int8")
    cache = init_cache(cfg, 2, 16)
    assert [k.values.shape for k in cache.k] == [(2, 4, 8, 16), (2, 2, 8, 16), (2, 1, 8, 16)]
    assert [v.scale.shape for v in cache.v] == [(2, 4, 16, 1), (2, 2, 16, 1), (2, 1, 16, 1)]


@slow
def test_generation_equals_the_forward(tiny):
    lm = jaxllm.quantize_kv()(tiny)
    prompts = [list(range(5, 25)), [7]]
    engine = jaxllm.compile(lm, batch=2, max_len=48)
    for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=6), strict=True):
        tokens = np.asarray([[*prompt, *result.tokens]])
        expected = np.asarray(jaxllm.logits(lm, tokens))[0, len(prompt) - 1 : -1].argmax(-1)
        assert result.tokens == expected.tolist()


@slow
def test_it_is_done_once_and_at_any_time(tiny):
    with pytest.raises(ValueError, match="KV cache is int8 already"):
        jaxllm.chain(jaxllm.quantize_kv(), jaxllm.quantize_kv())(tiny)
    one = jaxllm.chain(jaxllm.quantize_kv(), jaxllm.prune(0.5), jaxllm.quantize("int8"))(tiny)
    other = jaxllm.chain(jaxllm.prune(0.5), jaxllm.quantize("int8"), jaxllm.quantize_kv())(tiny)
    assert one.cfg == other.cfg
    np.testing.assert_array_equal(jaxllm.logits(one, TOKENS), jaxllm.logits(other, TOKENS))


SHAPE = (4, 2, 8, 4)  # [B, K, S, H] of a cache that is not split


def a_write(kind, length):
    """A cache full of random numbers, and keys and values for it, [B, T, K, H]."""
    random = np.random.default_rng(0)

    def made(*shape):
        x = jnp.asarray(random.standard_normal(shape), jnp.float32)
        if kind == "float":
            return x
        rounded = round_int8(x)
        return rounded if shape != SHAPE else Rounded(rounded.values, rounded.scale[..., 0])

    B, K, _, H = SHAPE
    return LayerCache(made(*SHAPE), made(*SHAPE), False), made(B, length, K, H), made(B, length, K, H)


def expected(old, new, at_BT):
    """The same by a loop over all that is written."""

    def put(old, new):  # [B, K, S, ...] and [B, T, K, ...]
        old, new = np.array(old), np.asarray(new).reshape(*new.shape[:3], *old.shape[3:])
        for b, t in np.ndindex(*at_BT.shape):
            old[b, :, at_BT[b, t]] = new[b, t]
        return old

    return jax.tree.map(put, old, new)


WRITES = [[[3], [0], [7], [3]], [[2, 3, 4]] * 4]  # each row elsewhere, one of them last; a chunk


@pytest.mark.parametrize("at_BT", WRITES)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_is_written_lies_in_its_slots_and_nowhere_else(kind, at_BT):
    at_BT = np.array(at_BT)
    past, k, v = a_write(kind, at_BT.shape[1])
    written = kv.write(past, k, v, jnp.asarray(at_BT))
    jax.tree.map(np.testing.assert_array_equal, written.k, expected(past.k, k, at_BT))
    jax.tree.map(np.testing.assert_array_equal, written.v, expected(past.v, v, at_BT))


def test_a_scatter_writes_the_same_as_row_by_row():
    """On GPUs, and where devices have parts of the slots: what lies outside is left out there."""
    old_BKSH = jnp.arange(4.0 * 2 * 8 * 4).reshape(SHAPE)
    new_BK1H, at_B = -old_BKSH[:, :, :1], jnp.array([3, 0, 7, 3])
    by_row = kv._update_rows(old_BKSH, new_BK1H, at_B)
    np.testing.assert_array_equal(kv._scatter_rows(old_BKSH, new_BK1H, at_B), by_row)
    np.testing.assert_array_equal(kv._scatter_rows(old_BKSH, new_BK1H, jnp.array([-1, 8, -8, 80])), old_BKSH)


@pytest.mark.parametrize("rules", [shard.RULES, shard.SEQUENCE_PARALLEL])
@pytest.mark.parametrize("at_BT", WRITES)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_over_a_mesh_the_same_is_written(kind, at_BT, rules):
    at_BT = jnp.asarray(at_BT)
    past, k, v = a_write(kind, at_BT.shape[1])
    for sizes in ((2, 2, 1), (1, 2, 2)):
        write = _Shardings(TINY, shard.make_mesh(*sizes), rules).write(kv.write)
        written = jax.jit(lambda k, v, *new, write=write: write(LayerCache(k, v, False), *new)[:2])
        jax.tree.map(
            np.testing.assert_array_equal, written(past.k, past.v, k, v, at_BT), kv.write(past, k, v, at_BT)[:2]
        )
