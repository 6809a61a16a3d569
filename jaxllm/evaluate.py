"""What a model's answers are worth: perplexity, and how far it has moved from the model it was made from."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.lm import LM, check_tokens, logits


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over every prediction in the evaluated windows. Show them together: perplexity alone hides small changes.

    perplexity: exp of the mean negative log-likelihood of the next token.
    kl: Kullback-Leibler divergence from the reference's next-token distribution to this model's, in nats.
    top1: fraction of positions where both models think the same token likeliest.
    """

    perplexity: float
    kl: float
    top1: float


def perplexity(lm: LM, tokens_NT: Any) -> float:
    """exp of the mean negative log-likelihood of tokens 1 … T - 1 of each row, given those before them.

    tokens_NT: integer ids, T >= 2; `token_windows` makes them from a text. Rows are independent; nothing is prepended.
    """
    return compare(lm, lm, tokens_NT).perplexity


def compare(lm: LM, reference: LM, tokens_NT: Any) -> Quality:
    """Runs both models on the same windows, one at a time: memory for two [T, V] float32 arrays.

    Raises ValueError when the vocabularies differ or a window has fewer than two tokens.
    """
    return compare_all([lm], reference, tokens_NT)[0]


def compare_all(models: Sequence[LM], reference: LM, tokens_NT: Any) -> list[Quality]:
    """`compare` for several models; the reference runs once a window."""
    tokens_NT = check_tokens(reference.cfg, tokens_NT)
    for lm in models:
        if lm.cfg.vocab_size != reference.cfg.vocab_size:
            raise ValueError(
                f"The model has {lm.cfg.vocab_size} tokens and the reference {reference.cfg.vocab_size}; "
                "only models of one vocabulary can be compared."
            )
    if tokens_NT.shape[1] < 2:
        raise ValueError("Windows of one token have nothing to predict; give at least two tokens a window.")
    totals = np.zeros((len(models), 3))
    for tokens_T in tokens_NT:
        reference_TV = logits(reference, tokens_T[None])[0]
        for total, lm in zip(totals, models, strict=True):
            logits_TV = reference_TV if lm is reference else logits(lm, tokens_T[None])[0]
            total += np.asarray(score(logits_TV, reference_TV, tokens_T), np.float64)
    windows, length = tokens_NT.shape
    means = totals / (windows * (length - 1))
    return [Quality(float(np.exp(nll)), float(kl), float(top1)) for nll, kl, top1 in means]


@jax.jit
def score(logits_TV: jax.Array, reference_TV: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """Sums over the T - 1 predictions whose answer is in the window: float32 [nll, kl, top-1 agreement]."""
    logp_TV = jax.nn.log_softmax(logits_TV[:-1])
    reference_logp_TV = jax.nn.log_softmax(reference_TV[:-1])
    nll = -jnp.sum(jnp.take_along_axis(logp_TV, tokens_T[1:, None], axis=1))
    kl = jnp.sum(jnp.exp(reference_logp_TV) * (reference_logp_TV - logp_TV))
    same = jnp.argmax(logp_TV, axis=1) == jnp.argmax(reference_logp_TV, axis=1)
    return jnp.stack([nll, kl, jnp.sum(same.astype(jnp.float32))])


def token_windows(lm: LM, text: str, length: int = 512, count: int | None = None) -> np.ndarray:
    """Cuts a text into windows that do not overlap: int32 [N, length].

    count: how many, from the beginning; None for all. What does not fill a window is left out, but a text shorter than
    one is a window of its own. Raises ValueError for a text of fewer than two tokens.
    """
    if lm.tokenizer is None:
        raise ValueError("This model has no tokenizer; give token ids instead of a text.")
    if length < 2 or (count is not None and count < 1):
        raise ValueError(f"{count} windows of {length} tokens; expected at least one of at least two tokens.")
    tokens = lm.tokenizer.encode(text, add_special=False)
    if len(tokens) < 2:
        raise ValueError(f"The text has {len(tokens)} tokens; at least two are needed to predict one.")
    length = min(length, len(tokens))
    windows = len(tokens) // length if count is None else min(count, len(tokens) // length)
    return np.asarray(tokens[: windows * length], np.int32).reshape(windows, length)


def calibration_text() -> str:
    """The text that ships with the package for transforms that look at activations."""
    return (importlib.resources.files("jaxllm") / "data" / "calibration.txt").read_text(encoding="utf-8")


def evaluation_text() -> str:
    """The text that ships with the package for measuring quality; nothing is calibrated on it."""
    return (importlib.resources.files("jaxllm") / "data" / "evaluation.txt").read_text(encoding="utf-8")
