import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import likelihood
from jaxllm.likelihood import log_likelihoods


def by_hand(lm, context, continuation):
    """In float64, from one forward of the pair; what is behind it fills up to one length for all."""
    tokens = [*context, *continuation]
    logits = np.asarray(jaxllm.logits(lm, [tokens + [255] * (180 - len(tokens))])[0], np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    at = np.arange(len(context), len(tokens))
    return log_p[at - 1, tokens[len(context) :]].sum(), bool(
        (logits[at - 1].argmax(-1) == tokens[len(context) :]).all()
    )


@pytest.fixture(scope="module")
def pairs(tiny):
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (5, 1), (5, 3), (1, 40), (15, 1), (16, 1), (16, 2), (40, 20), (100, 5), (3, 3), (2, 160)]
    out = [tuple(rng.integers(0, 256, size).tolist() for size in pair) for pair in sizes]
    context = rng.integers(0, 256, 12).tolist()
    out += [(context, [choice]) for choice in range(5)]  # read the same tokens
    out += [(context, [7, choice]) for choice in range(3)]
    likeliest = context[:6]
    for _ in range(4):
        likeliest = [
            *likeliest,
            int(np.argmax(jaxllm.logits(tiny, [likeliest + [0] * (180 - len(likeliest))])[0, len(likeliest) - 1])),
        ]
    return [*out, (likeliest[:6], likeliest[6:]), (likeliest[:6], [*likeliest[6:9], 0])]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_equals_float64_numpy_whatever_the_batch(tiny, pairs, batch):
    for (log_p, greedy), pair in zip(log_likelihoods(tiny, pairs, batch), pairs, strict=True):
        expected, expected_greedy = by_hand(tiny, *pair)
        assert log_p == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert greedy == expected_greedy
    assert [greedy for _, greedy in log_likelihoods(tiny, pairs[-2:], batch)] == [True, False]


def test_families_look_only_left(family):
    pairs = [([1, 2, 3], [4, 5]), (list(range(40)), [9]), ([7] * 17, [7, 7, 7])]
    for (log_p, _), pair in zip(log_likelihoods(family, pairs, 3), pairs, strict=True):
        assert log_p == pytest.approx(by_hand(family, *pair)[0], rel=1e-6, abs=1e-5)


def test_few_programs_and_no_row_twice(tiny, pairs, monkeypatch):
    shapes, run_layers = [], likelihood.run_layers
    monkeypatch.setattr(
        likelihood, "run_layers", lambda lm, tokens: shapes.append(tokens.shape) or run_layers(lm, tokens)
    )
    log_likelihoods(tiny, pairs, 4)
    assert {rows for rows, _ in shapes} == {4}
    assert {length for _, length in shapes} <= {16, 32, 64, 128, 256}
    distinct = {tuple([*context, *continuation][:-1]) for context, continuation in pairs}
    assert len(distinct) <= len(pairs) - 4
    assert len(shapes) == -(-len(distinct) // 4)


def test_what_is_too_long_is_cut_at_the_left(tiny):
    tokens = np.random.default_rng(1).integers(0, 256, 400).tolist()
    (log_p, _), (full, _) = log_likelihoods(tiny, [(tokens, [1, 2, 3]), (tokens, tokens[:20])], max_len=20)
    assert log_p == pytest.approx(by_hand(tiny, tokens[-18:], [1, 2, 3])[0], rel=1e-6)
    assert full == pytest.approx(by_hand(tiny, tokens[-1:], tokens[:20])[0], rel=1e-6)


def test_nothing_to_say_is_certain(tiny):
    assert log_likelihoods(tiny, []) == []
    assert log_likelihoods(tiny, [([1], []), ([1], [2])])[0] == (0.0, True)


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (([], [1]), {}, "Pair 1 has 0 tokens of context"),
        (([1], [1] * 257), {}, "257 of continuation; .* at most max_len=256"),
        (([1], [256]), {}, "256; the model has 0 to 255"),
        (([-1], [1]), {}, "from -1"),
        (([1], [1]), {"batch": 0}, "batch=0"),
        (([1], [1]), {"max_len": 0}, "max_len=0"),
    ],
)
def test_bad_pairs_are_refused_before_anything_runs(tiny, monkeypatch, pair, options, message):
    monkeypatch.setattr(likelihood, "run_layers", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=message):
        log_likelihoods(tiny, [([1], [2]), pair], **options)


def test_quantised_models_too(tiny, pairs):
    lm = jaxllm.quantize("int8")(tiny)
    assert jax.tree.structure(lm.params) != jax.tree.structure(tiny.params)
    for (log_p, _), pair in zip(log_likelihoods(lm, pairs[:5], 5), pairs[:5], strict=True):
        assert log_p == pytest.approx(by_hand(lm, *pair)[0], rel=1e-6, abs=1e-5)
