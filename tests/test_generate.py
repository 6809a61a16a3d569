import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import shard
from jaxllm.cache import init_cache
from jaxllm.generate import plan_prefill
from jaxllm.kernels import cpu
from jaxllm.models.decoder import Decoder
from jaxllm.sample import as_arrays
from tests.conftest import FAMILIES, TINY

MAX_LEN = 128
PROMPTS = [list(range(5, 25)), [7], list(range(100, 3, -1))]  # 20, 1 and 97 tokens


@pytest.fixture(scope="module")
def engines(tiny):
    """By batch size."""
    return functools.cache(lambda batch: jaxllm.compile(tiny, batch=batch, max_len=MAX_LEN))


@pytest.fixture(scope="module")
def engine(engines):
    return engines(1)


def greedy(lm, prompt, count):
    """The slow way: a full forward for every token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(jaxllm.logits(lm, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def check_calls(lm, split):
    """Whatever the calls that a text is cut into, its logits are those of one forward."""
    cfg = lm.cfg
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24)).astype(np.int32)
    full = jaxllm.logits(lm, tokens)
    decoder, cache, steps = Decoder(cfg), init_cache(cfg, 2, 48, split), []
    run = jax.jit(lambda tokens, positions, cache: decoder.apply({"params": lm.params}, tokens, positions, cache))
    for start, length in [(0, 16), *((t, 1) for t in range(16, 24))]:
        positions = np.broadcast_to(np.arange(start, start + length), (2, length))
        logits, cache = run(tokens[:, start : start + length], positions, cache)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), full, atol=2e-5)


def test_prefill_then_decode_equals_one_forward(family):
    check_calls(family, split=True)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_so_it_does_with_the_cache_of_other_platforms(family):
    check_calls(jaxllm.init(FAMILIES[family]), split=False)


@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_of_different_lengths_equal_the_slow_way(tiny, engines, batch):
    for prompt, result in zip(PROMPTS, engines(batch).generate(PROMPTS, max_new_tokens=11), strict=True):
        assert result.tokens == greedy(tiny, prompt, 11)
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))


def test_the_cache_fills_to_its_last_slot(tiny, engine):
    prompt = list(range(MAX_LEN - 2))
    (result,) = engine.generate([prompt], max_new_tokens=99)
    assert result.tokens == greedy(tiny, prompt, 2)


def test_a_stop_token_ends_its_row_only(engines):
    engine = engines(2)
    free = engine.generate(PROMPTS[:2], max_new_tokens=20)
    stop = free[0].tokens[4]
    stopped = engine.generate(PROMPTS[:2], max_new_tokens=20, stop_tokens=[stop])
    assert stopped[0].tokens == free[0].tokens[: free[0].tokens.index(stop) + 1]
    assert stopped[0].finish_reason == "stop_token"
    assert stop not in free[1].tokens
    assert stopped[1].tokens == free[1].tokens


def test_chance_depends_on_seed_row_and_position_only(engines):
    engine = engines(2)
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    first, again = (engine.generate([[1, 2], [1, 2]], seed=3, **options) for _ in range(2))
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert first[0].tokens != first[1].tokens
    assert engine.generate([[1, 2], [9]], seed=3, **options)[0].tokens == first[0].tokens
    assert engine.generate([[1, 2], [1, 2]], seed=4, **options)[0].tokens != first[0].tokens
    one_by_one = engines(1).generate([[1, 2], [1, 2]], seed=3, **options)
    assert [r.tokens for r in one_by_one] == [r.tokens for r in first]


def test_a_generation_leaves_no_trace_in_the_next(engines, tiny):
    asked = {"prompts": [[1, 2, 3], [40, 41]], "max_new_tokens": 20, "repetition_penalty": 1e6}
    engine = jaxllm.compile(tiny, batch=2, max_len=64)
    fresh = engine.generate(**asked)
    engine.generate([list(range(60)), [7]], max_new_tokens=3)
    next(engine.stream([9, 8], max_new_tokens=30), None)  # left in the middle
    assert len(engine._idle) == 1
    assert engine.generate(**asked) == fresh


def test_repetition_penalty_counts_prompt_and_answer(engine):
    (result,) = engine.generate([[1, 2, 3]], max_new_tokens=60, repetition_penalty=1e6)
    # Only positive logits of unseen tokens survive such a penalty.
    assert len({1, 2, 3, *result.tokens}) == 63


@pytest.fixture(scope="module", params=["float", "int8"])
def unsharded(request, tiny):
    """A model, prompts, and what one device makes of them."""
    lm = tiny if request.param == "float" else jaxllm.quantize("int8")(tiny)
    prompts = [list(range(3 + n, 40 - n)) for n in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)  # as over a mesh: its int8 kernels round activations otherwise
        results = jaxllm.compile(lm, batch=4, max_len=64).generate(prompts, max_new_tokens=12)
    return lm, prompts, [result.tokens for result in results]


@pytest.mark.parametrize("mesh", [{"model": 2, "share": 2}, {"data": 2, "model": 2}])
def test_sharded_equals_unsharded(unsharded, mesh):
    lm, prompts, expected = unsharded
    engine = jaxllm.compile(lm, batch=4, max_len=64, mesh=jaxllm.make_mesh(**mesh))
    assert [result.tokens for result in engine.generate(prompts, max_new_tokens=12)] == expected
    for part in jax.tree.leaves(engine.params["layers_0"]["mlp"]["gate"]["w"]):
        assert part.addressable_shards[0].data.shape[0] == TINY.ffw_dim // (mesh["model"] * mesh.get("share", 1))


@pytest.mark.parametrize(
    ("rules", "mesh", "leaf", "shape"),
    [
        (shard.SEQUENCE_PARALLEL, {"share": 4}, "cache", (4, 4, 8, 16)),
        (shard.FULLY_SHARDED, {"data": 4}, "params", (64, 8)),
    ],
)
def test_other_rules_equal_one_device_too(unsharded, rules, mesh, leaf, shape):
    lm, prompts, expected = unsharded
    engine = jaxllm.compile(lm, batch=4, max_len=64, mesh=jaxllm.make_mesh(**mesh), rules=rules)
    assert [result.tokens for result in engine.generate(prompts, max_new_tokens=12)] == expected
    gate = jax.tree.leaves(engine.params["layers_0"]["mlp"]["gate"]["w"])[0]
    state = engine.programs.start()
    part = state.cache.k[0] if leaf == "cache" else gate
    assert part.addressable_shards[0].data.shape == shape
    on_one = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((engine.params, state.cache))]
    assert engine.step_bytes == sum(on_one)


def test_slots_that_do_not_divide_are_refused(tiny):
    with pytest.raises(ValueError, match=r"slots=64 does not divide .* share=3"):
        shard.check_mesh(
            dataclasses.replace(TINY, vocab_size=258, num_heads=12, ffw_dim=66),
            jaxllm.make_mesh(share=3),
            1,
            shard.SEQUENCE_PARALLEL,
            slots=64,
        )


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        ({"model": 3}, 1, r"vocab_size=256 does not divide .* model=3 .*\[1, 2, 4\]"),
        ({"data": 4}, 2, r"batch=2 does not divide .* data=4 .*\[1, 2\]"),
        ({"model": 8}, 1, "needs 8 devices; there are 4"),
        ({"share": 3}, 1, r"vocab_size=256 does not divide .* share=3 \(3 devices\)"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(tiny, mesh, batch, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.compile(tiny, batch=batch, max_len=64, mesh=jaxllm.make_mesh(**mesh))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "Prompt 0 is empty"),
        ([[1], list(range(128))], {}, "Prompt 1 has 128 tokens; max_len=128"),
        ([[256]], {}, "256; the model has 0 to 255"),
        ([[-1]], {}, "from -1"),
        (["text"], {}, "no tokenizer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"min_p": 1.1}, "min_p is 1.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"stop_tokens": list(range(17))}, "at most 16"),
        ([[1]], {"stop": ["x"]}, "need a tokenizer"),
        ([[1]], {"stop": [""]}, "stop is"),
    ],
)
def test_bad_requests_are_refused(engine, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, **options)


@pytest.mark.parametrize("options", [{"batch": 0}, {"max_len": 0}, {"max_len": 257}])
def test_bad_shapes_are_refused(tiny, options):
    with pytest.raises(ValueError, match=r"positive integer|at most 256"):
        jaxllm.compile(tiny, **options)


def test_an_abandoned_request_leaves_the_engine_usable(engine):
    before = engine.generate([[1, 2, 3]], max_new_tokens=20)
    blocks = engine.token_blocks([[1, 2, 3]], 20, as_arrays(jaxllm.Sampling(), frozenset()))
    assert next(blocks).shape == (1, 1)
    blocks.close()
    assert engine.generate([[1, 2, 3]], max_new_tokens=20) == before


def test_smollm2_streams_and_stops(smollm2):
    engine = jaxllm.compile(smollm2, max_len=64)
    prompt = "Numbers: 1, 2, 3, 4,"
    (whole,) = engine.generate(prompt, max_new_tokens=24)
    pieces = list(engine.stream(prompt, max_new_tokens=24))
    assert "".join(pieces) == whole.text
    assert len(pieces) >= 3
    assert " 7," in whole.text
    (stopped,) = engine.generate(prompt, max_new_tokens=24, stop=["7, "])
    assert stopped.text == whole.text[: whole.text.index("7, ")]
    assert stopped.finish_reason == "stop_string"


@pytest.mark.parametrize("call", [0, 16, 240])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 130, 256, 257, 700])
def test_a_prefill_plan_covers_the_prompt_within_the_cache(length, call):
    plan = plan_prefill(length, [16, 64, 256], call)
    assert sum(plan) >= length > sum(plan[:-1])
    assert sum(plan) <= -(-length // 256) * 256
    assert plan == sorted(plan, reverse=True)


def test_a_prefill_plan_costs_least():
    def plan(length, call):
        return plan_prefill(length, [16, 64, 256], call)

    assert plan(128, 16) == [64, 64]
    assert plan(130, 16) == [64, 64, 16]
    assert plan(255, 16) == [256]
    assert plan(128, 240) == plan(65, 240) == [256]  # read once
    assert plan(700, 240) == [256, 256, 256]


def test_bfloat16_generates():
    lm = jaxllm.init(dataclasses.replace(FAMILIES["qwen3"], dtype="bfloat16"))
    for model in (lm, jaxllm.quantize("int8")(lm)):
        assert len(jaxllm.compile(model, max_len=32).generate([[1, 2]], max_new_tokens=5)[0].tokens) == 5
