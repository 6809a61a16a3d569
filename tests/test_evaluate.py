import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 20)).astype(np.int32)


def test_figures_equal_float64_numpy(tiny):
    other = jaxllm.prune(0.5)(tiny)
    quality = jaxllm.compare(other, tiny, TOKENS)

    def log_probs(lm):
        logits = np.asarray(jaxllm.logits(lm, TOKENS), np.float64)[:, :-1]
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    ours, reference = log_probs(other), log_probs(tiny)
    nll = -np.take_along_axis(ours, TOKENS[:, 1:, None], -1).mean()
    kl = (np.exp(reference) * (reference - ours)).sum(-1).mean()
    top1 = (ours.argmax(-1) == reference.argmax(-1)).mean()
    np.testing.assert_allclose(dataclasses.astuple(quality), [np.exp(nll), kl, top1], rtol=1e-4)
    assert jaxllm.perplexity(other, TOKENS) == quality.perplexity


def test_a_model_agrees_with_itself(tiny):
    quality = jaxllm.compare(tiny, tiny, TOKENS)
    assert (quality.kl, quality.top1) == (0.0, 1.0)


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


def test_calibration_and_evaluation_share_no_text():
    calibration, evaluation = (
        {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 40}
        for text in (jaxllm.calibration_text(), jaxllm.evaluation_text())
    )
    assert calibration
    assert evaluation
    assert not calibration & evaluation
