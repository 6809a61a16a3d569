import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.evaluate import Windows, as_windows, compare_all, score, sliding_windows, window_sums

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 20)).astype(np.int32)


def by_hand(lm, reference, windows):
    """NLL, KL and agreement of each scored token, window by window, in float64."""
    out = []
    for tokens, first in zip(windows.tokens_NT, windows.first_N, strict=True):
        log_p = [np.asarray(jaxllm.logits(model, tokens[None])[0], np.float64) for model in (lm, reference)]
        ours, theirs = (x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in log_p)
        at = np.arange(first, len(tokens)) - 1
        kl = np.sum(np.exp(theirs) * (theirs - ours), axis=-1)[at]
        out.append(np.stack([-ours[at, tokens[at + 1]], kl, (ours.argmax(-1) == theirs.argmax(-1))[at]], axis=1))
    return out


@pytest.mark.parametrize("first", [[1, 1, 1], [1, 7, 19]])
def test_figures_equal_float64_numpy(tiny, first):
    other = jaxllm.prune(sparsity=0.5)(tiny)
    windows = Windows(TOKENS, np.array(first), "")
    scores = by_hand(other, tiny, windows)
    nll, kl, top1 = np.concatenate(scores).mean(0)
    quality = jaxllm.compare(other, tiny, windows)
    np.testing.assert_allclose(dataclasses.astuple(quality)[:3], [np.exp(nll), kl, top1], rtol=1e-5)
    np.testing.assert_allclose(window_sums([other], tiny, windows)[0], [s.sum(0) for s in scores], rtol=1e-5)
    assert jaxllm.perplexity(other, windows) == quality.perplexity
    assert windows.scored == sum(20 - n for n in first) == len(np.concatenate(scores))
    if first == [1, 1, 1]:  # what an array without more means
        assert jaxllm.compare(other, tiny, TOKENS) == quality
        assert compare_all([tiny, other], tiny, TOKENS)[1] == quality


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 3.0])
def test_scores_are_exact_where_logits_are_large_and_models_close(spread):
    rng = np.random.default_rng(0)
    reference = (rng.normal(size=(19, 5000)) * 3 + 40).astype(np.float32)
    logits = (reference + rng.normal(size=reference.shape) * spread - 7).astype(np.float32)
    tokens = rng.integers(0, 5000, 19).astype(np.int32)
    nll, kl, top1 = np.asarray(score(logits, reference, tokens), np.float64).sum(0)
    p, q = (x.astype(np.float64)[:-1] for x in (reference, logits))
    p, q = (x - np.log(np.sum(np.exp(x), axis=1, keepdims=True)) for x in (p, q))
    assert nll == pytest.approx(-q[np.arange(18), tokens[1:]].sum(), rel=1e-6)
    # The logarithms of the two normalisers are near 10 and float32 keeps them to 1e-6, whatever their difference.
    assert kl == pytest.approx(np.sum(np.exp(p) * (p - q)), rel=1e-5, abs=18 * 5e-7)
    assert top1 == np.sum(p.argmax(1) == q.argmax(1))


def test_the_standard_error_is_that_of_windows(tiny):
    (sums,) = window_sums([tiny], tiny, TOKENS)
    means = sums[:, 0] / 19  # equal counts: the textbook's standard error of a mean
    assert jaxllm.compare(tiny, tiny, TOKENS).nll_se == pytest.approx(means.std(ddof=1) / np.sqrt(3))
    assert np.isnan(jaxllm.compare(tiny, tiny, TOKENS[:1]).nll_se)


def test_a_model_agrees_with_itself(tiny):
    quality = jaxllm.compare(tiny, tiny, TOKENS)
    assert (quality.kl, quality.top1) == (0.0, 1.0)
    copy = jaxllm.compare(dataclasses.replace(tiny), tiny, TOKENS)
    assert (copy.kl, copy.top1) == (pytest.approx(0, abs=1e-7), 1.0)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny):
    silent = dataclasses.replace(tiny, params=jax.tree.map(jnp.zeros_like, tiny.params))
    np.testing.assert_allclose(jaxllm.perplexity(silent, TOKENS), 256, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 1), np.int32), "at least two tokens"),
        (np.zeros((2, 3), np.float32), "float32"),
        (np.zeros(3, np.int32), "shape"),
        (np.zeros((0, 4), np.int32), "not empty"),
        (np.full((1, 4), 256), "256 to 256; the model has 0 to 255"),
    ],
)
def test_bad_tokens_are_refused(tiny, tokens, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.perplexity(tiny, tokens)


@pytest.mark.parametrize("first", [[0, 1, 1], [1, 1, 20], [1, 1], [1.0, 1.0, 1.0]])
def test_bad_first_tokens_are_refused(tiny, first):
    with pytest.raises(ValueError, match="3 integers from 1 to 19"):
        jaxllm.perplexity(tiny, Windows(TOKENS, np.array(first), ""))


def test_models_of_different_vocabularies_are_not_compared(tiny):
    other = jaxllm.init(dataclasses.replace(tiny.cfg, vocab_size=128))
    with pytest.raises(ValueError, match="128 tokens and the reference 256"):
        jaxllm.compare(other, tiny, TOKENS)


def test_windows_do_not_overlap_and_fill_up(smollm2):
    text = jaxllm.calibration_text()
    tokens = smollm2.tokenizer.encode(text, add_special=False)
    windows = jaxllm.token_windows(smollm2, text, 100)
    assert windows.shape == (len(tokens) // 100, 100)
    assert windows.reshape(-1).tolist() == tokens[: windows.size]
    assert jaxllm.token_windows(smollm2, text, 100, 2).shape == (2, 100)
    assert jaxllm.token_windows(smollm2, "A short text.", 100).shape[0] == 1
    for bad in ("", "A"):
        with pytest.raises(ValueError, match="at least two are needed"):
            jaxllm.token_windows(smollm2, bad)
    with pytest.raises(ValueError, match="expected at least one"):
        jaxllm.token_windows(smollm2, text, 1)


TEXT = "".join(chr(97 + i % 26) for i in range(101))


@pytest.mark.parametrize("count", [None, 1, 3, 99])
@pytest.mark.parametrize(("length", "stride"), [(20, 1), (20, 7), (20, 10), (20, 19), (2, 1), (101, 50), (500, 100)])
def test_sliding_windows_score_each_token_once_with_enough_before_it(tiny_text, length, stride, count):
    tokens = np.array(tiny_text.tokenizer.encode(TEXT, add_special=False))
    windows = sliding_windows(tiny_text, TEXT, length, stride, count)
    full = min(length, len(tokens))
    assert windows.tokens_NT.shape[1] == full
    assert windows.tokens_NT.dtype == np.int32
    scored, start, n = [], 0, 0
    for row, first in zip(windows.tokens_NT, windows.first_N, strict=True):
        start = min(n * stride, len(tokens) - full)
        np.testing.assert_array_equal(row, tokens[start : start + full])
        assert first == 1 if n == 0 else first >= full - stride
        scored += range(start + first, start + full)
        n += 1
    assert scored == list(range(1, start + full))
    assert windows.scored == len(scored)
    if count is None:
        assert start + full == len(tokens)
    else:
        assert n <= count


def test_a_stride_of_the_length_is_plain_windows_and_the_rest(tiny_text):
    sliding, plain = sliding_windows(tiny_text, TEXT, 20, 20), jaxllm.token_windows(tiny_text, TEXT, 20)
    np.testing.assert_array_equal(sliding.tokens_NT[:-1], plain)
    assert sliding.first_N.tolist() == [1, 1, 1, 1, 1, 19]  # the text has 5 times 20 tokens and one more
    whole = sliding_windows(tiny_text, TEXT[:100], 20, 20)
    assert jaxllm.compare(tiny_text, tiny_text, whole) == jaxllm.compare(tiny_text, tiny_text, plain)
    assert sliding_windows(tiny_text, TEXT, 20).first_N.tolist()[1] == 10  # by default half the length


def test_the_protocol_says_what_was_scored(tiny_text):
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:16]
    assert sliding_windows(tiny_text, TEXT, 20, 10).protocol == (
        f"20-token windows, stride 10, 100 tokens scored, no BOS, text sha256 {digest}"
    )
    plain = as_windows(tiny_text, TOKENS).protocol
    assert plain.startswith("3 separate windows of 20 tokens, 57 tokens scored, token ids sha256 ")
    assert plain != as_windows(tiny_text, TOKENS + 1).protocol


@pytest.mark.parametrize("stride", [0, -1, 21])
def test_a_stride_out_of_range_is_refused(tiny_text, stride):
    with pytest.raises(ValueError, match=f"stride is {stride}; expected 1 to 20"):
        sliding_windows(tiny_text, TEXT, 20, stride)


def test_calibration_and_evaluation_share_no_text():
    calibration, evaluation = (
        {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 40}
        for text in (jaxllm.calibration_text(), jaxllm.evaluation_text())
    )
    assert calibration
    assert evaluation
    assert not calibration & evaluation
