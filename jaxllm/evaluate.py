"""What a model's answers are worth: perplexity, and how far it has moved from the model it was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import shard
from jaxllm.lm import LM, check_tokens, logits


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Tokens that are read together, and which of them are scored. Made by `sliding_windows`.

    tokens_NT: int32 ids, T >= 2. Rows are independent; nothing is prepended.
    first_N: row n scores its tokens first_N[n] … T - 1, each given those before it in the row; 1 <= first < T.
    protocol: how they were cut and from what, in a line for reports.
    """

    tokens_NT: np.ndarray
    first_N: np.ndarray
    protocol: str

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return int(np.sum(self.tokens_NT.shape[1] - self.first_N))


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over every scored token of the windows. Show them together: perplexity alone hides small changes.

    perplexity: exp of the mean negative log-likelihood (NLL) of the next token.
    kl: Kullback-Leibler divergence from the reference's next-token distribution to this model's, in nats.
    top1: fraction of positions where a token is likeliest for both models.
    nll_se: standard error of the mean NLL, and so about that of perplexity over perplexity. Windows are the sample,
        because a text's tokens are not independent; NaN for a single one. The difference of two models on the same
        windows is known far better than this: `window_sums` has what a paired test needs.
    """

    perplexity: float
    kl: float
    top1: float
    nll_se: float


def perplexity(lm: LM, windows: Any) -> float:
    """exp of the mean negative log-likelihood of the scored tokens, given those before them in their window.

    windows: `Windows`, or integer ids [N, T], T >= 2, of which all but the first of each row are scored.
    """
    return compare(lm, lm, windows).perplexity


def compare(lm: LM, reference: LM, windows: Any) -> Quality:
    """Runs both models on the same windows, one at a time: memory for two [T, V] float32 arrays.

    windows: as for `perplexity`. Raises ValueError when the vocabularies differ or a window scores nothing.
    """
    return compare_all([lm], reference, windows)[0]


def compare_all(models: Sequence[LM], reference: LM, windows: Any) -> list[Quality]:
    """`compare` for several models; the reference runs once a window."""
    windows = as_windows(reference, windows)
    sums_MN3 = window_sums(models, reference, windows)
    counts_N = windows.tokens_NT.shape[1] - windows.first_N
    qualities = []
    for sums_N3 in sums_MN3:
        nll, kl, top1 = sums_N3.sum(0) / windows.scored
        nll_se = _ratio_error(sums_N3[:, 0], counts_N)
        qualities.append(Quality(float(np.exp(nll)), float(kl), float(top1), nll_se))
    return qualities


def _ratio_error(sums_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Standard error of sum(sums) / sum(counts), from windows of unequal counts (Cochran 1977, section 6.3)."""
    windows, total = len(sums_N), counts_N.sum()
    if windows < 2:
        return math.nan
    residuals_N = sums_N - counts_N * (sums_N.sum() / total)
    return float(np.sqrt(np.sum(residuals_N**2) * windows / (windows - 1)) / total)


def window_sums(models: Sequence[LM], reference: LM, windows: Any) -> np.ndarray:
    """Float64 [M, N, 3]: of each model and window, the sums over its scored tokens of NLL, KL and top-1 agreement."""
    windows = as_windows(reference, windows)
    for lm in models:
        if lm.cfg.vocab_size != reference.cfg.vocab_size:
            raise ValueError(
                f"The model has {lm.cfg.vocab_size} tokens and the reference {reference.cfg.vocab_size}; "
                "only models of one vocabulary can be compared."
            )
    sums_MN3 = np.zeros((len(models), len(windows.tokens_NT), 3))
    for n, (tokens_T, first) in enumerate(zip(windows.tokens_NT, windows.first_N, strict=True)):
        reference_TV = logits(reference, tokens_T[None])[0]
        for m, lm in enumerate(models):
            logits_TV = reference_TV if lm is reference else logits(lm, tokens_T[None])[0]
            scores_T3 = shard.to_host(score(logits_TV, reference_TV, tokens_T)).astype(np.float64)
            sums_MN3[m, n] = scores_T3[first - 1 :].sum(0)
            if lm is reference:
                sums_MN3[m, n, 1:] = 0, len(tokens_T) - first  # rounding leaves a KL of some 1e-9
    return sums_MN3


@jax.jit
def score(logits_TV: jax.Array, reference_TV: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """NLL, KL and top-1 agreement (0 or 1) of each prediction whose answer is in the window: float32 [T - 1, 3]."""

    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_V, reference_V, token = args
        peak, reference_peak = jnp.max(x_V), jnp.max(reference_V)
        same = jnp.max(jnp.where(x_V == peak, reference_V, -jnp.inf)) == reference_peak
        # From the peaks on, the logarithms of both normalisers are small, and so is what rounding does to KL.
        x_V, reference_V = x_V - peak, reference_V - reference_peak
        p_V = jnp.exp(reference_V)
        norm = jnp.sum(p_V)
        log_norm = jnp.log(jnp.sum(jnp.exp(x_V)))
        kl = jnp.sum(p_V * (reference_V - x_V)) / norm - jnp.log(norm) + log_norm
        return jnp.stack([log_norm - x_V[token], kl, same.astype(jnp.float32)])

    # A few rows at a time: they stay in the CPU's cache from one pass over the vocabulary to the next. The last row's
    # answer is not in the window; it is scored and dropped, because cutting it off first would copy the rest.
    return lax.map(one, (logits_TV, reference_TV, jnp.roll(tokens_T, -1)), batch_size=8)[:-1]


def as_windows(lm: LM, windows: Any) -> Windows:
    """Windows, checked for this model; of plain ids [N, T], each row scores all but its first token."""
    given = windows if isinstance(windows, Windows) else None
    tokens_NT = check_tokens(lm.cfg, windows if given is None else given.tokens_NT)
    if tokens_NT.shape[1] < 2:
        raise ValueError("Windows of one token have nothing to predict; give at least two tokens a window.")
    count, length = tokens_NT.shape
    if given is None:
        digest = hashlib.sha256(tokens_NT.tobytes()).hexdigest()[:16]
        what = f"{count} separate windows of {length} tokens, {count * (length - 1)} tokens scored"
        return Windows(tokens_NT, np.ones(count, np.int32), f"{what}, token ids sha256 {digest}")
    first_N = np.asarray(given.first_N)
    integers = np.issubdtype(first_N.dtype, np.integer)
    if first_N.shape != (count,) or not integers or first_N.min() < 1 or first_N.max() >= length:
        raise ValueError(
            f"first_N is {first_N.dtype} {first_N.shape}; expected {count} integers from 1 to {length - 1}, "
            "the first scored token of each window."
        )
    return Windows(tokens_NT, first_N, given.protocol)


def sliding_windows(
    lm: LM, text: str, length: int = 512, stride: int | None = None, count: int | None = None
) -> Windows:
    """Windows of a text that advance by `stride` tokens, each scoring the tokens that none before it scored.

    length: tokens a window; the whole text where it is shorter. stride: 1 to length; by default half the length.
    count: how many windows, from the beginning; None for all, and then the last one ends with the text, however far
    that is from the one before.

    With stride < length every token but the text's first is scored once, and all but the first window's with at least
    length - stride tokens before it. With stride = length windows do not overlap, and the first token of each is not
    scored: these are the windows of `token_windows`, and one more, for what they leave out at the end. The smaller the
    stride, the lower and truer the perplexity and the longer the wait; compare figures of one protocol only.

    Raises ValueError for a stride out of range and as `token_windows` does.
    """
    if stride is not None and not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}; expected 1 to {length}, the length of a window.")
    tokens, length = _encode(lm, text, length, count)
    stride = length // 2 if stride is None else stride
    last = len(tokens) - length
    starts_N = np.append(np.arange(0, last, stride), last)[:count]
    tokens_NT = tokens[starts_N[:, None] + np.arange(length)]
    first_N = np.append(1, np.maximum(1, length - np.diff(starts_N)))
    scored = np.sum(length - first_N)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    protocol = f"{length}-token windows, stride {stride}, {scored} tokens scored, no BOS, text sha256 {digest}"
    return Windows(tokens_NT, first_N, protocol)


def token_windows(lm: LM, text: str, length: int = 512, count: int | None = None) -> np.ndarray:
    """Cuts a text into windows that do not overlap: int32 [N, length].

    count: how many, from the beginning; None for all. What does not fill a window is left out, but a text shorter than
    one is a window of its own. Raises ValueError for a text of fewer than two tokens.
    """
    tokens, length = _encode(lm, text, length, count)
    windows = len(tokens) // length if count is None else min(count, len(tokens) // length)
    return tokens[: windows * length].reshape(windows, length)


def _encode(lm: LM, text: str, length: int, count: int | None) -> tuple[np.ndarray, int]:
    """The int32 ids of a text, and `length`, but no more than there are."""
    if lm.tokenizer is None:
        raise ValueError("This model has no tokenizer; give token ids instead of a text.")
    if length < 2 or (count is not None and count < 1):
        raise ValueError(f"{count} windows of {length} tokens; expected at least one of at least two tokens.")
    tokens = lm.tokenizer.encode(text, add_special=False)
    if len(tokens) < 2:
        raise ValueError(f"The text has {len(tokens)} tokens; at least two are needed to predict one.")
    return np.asarray(tokens, np.int32), min(length, len(tokens))


def calibration_text() -> str:
    """The text that ships with the package for transforms that look at activations."""
    return (importlib.resources.files("jaxllm") / "data" / "calibration.txt").read_text(encoding="utf-8")


def evaluation_text() -> str:
    """The text that ships with the package for measuring quality; nothing is calibrated on it."""
    return (importlib.resources.files("jaxllm") / "data" / "evaluation.txt").read_text(encoding="utf-8")
