"""Choosing the next token, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOP_TOKENS = 16
Likeliest = Callable[[jax.Array], jax.Array]  # logits [B, V] to int32 [B]
LEAST_TEMPERATURE = 1e-5  # what is lower, but not 0, counts as this: logits stay finite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order given here; the defaults leave all to chance.

    repetition_penalty: > 0; logits of tokens that the prompt or the answer already has are divided (if positive) or
        multiplied (if negative) by it; 1 does nothing (Keskar et al. 2019).
    temperature: >= 0; divides the logits; 0 takes the likeliest token and makes the rest moot.
    top_k: keeps the k likeliest tokens; 0 keeps all. Ties at the border stay.
    top_p: in (0, 1]; keeps the fewest likeliest tokens whose probabilities reach it (Holtzman et al. 2020).
    min_p: in [0, 1]; keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024).
    seed: the same seed gives the same tokens.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        checks = {
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a number above 0 (1 is no penalty)"),
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0 (greedy) up"),
            "top_k": (isinstance(self.top_k, int) and 0 <= self.top_k < 2**31, "an integer from 0 (all tokens) up"),
            "top_p": (0 < self.top_p <= 1, "a number in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "a number in [0, 1]"),
            "seed": (isinstance(self.seed, int) and 0 <= self.seed < 2**32, "an integer in [0, 2**32)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` and the stop tokens as what a program takes: scalars, and int32 [MAX_STOP_TOKENS] padded with -1.

    NumPy on the host, jax.Array while a program is traced.
    """

    repetition_penalty: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    stop_tokens: Any


def as_arrays(sampling: Sampling, stop_tokens: frozenset[int]) -> SamplingArrays:
    if len(stop_tokens) > MAX_STOP_TOKENS:
        raise ValueError(f"{len(stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} are possible.")
    stops = np.full(MAX_STOP_TOKENS, -1, np.int32)
    stops[: len(stop_tokens)] = sorted(stop_tokens)
    return SamplingArrays(
        repetition_penalty=np.float32(sampling.repetition_penalty),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
        min_p=np.float32(sampling.min_p),
        seed=np.uint32(sampling.seed),
        stop_tokens=stops,
    )


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the highest: int32 [B]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def next_token(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    rows_B: jax.Array,
    positions_B: jax.Array,
    how: SamplingArrays,
    likeliest: Likeliest = likeliest,
) -> jax.Array:
    """Draws int32 [B] from float32 logits.

    seen_BV: bool, which tokens the repetition penalty is for.
    rows_B, positions_B: which prompt it is for and where the token will stand. Chance depends on these and the seed, on
        nothing else: not on the other rows, nor on the batch, nor on how many steps a dispatch takes.
    likeliest: the one of this module, or another that does the same over a mesh.
    """

    def penalise(logits_BV: jax.Array) -> jax.Array:
        lower_BV = jnp.where(logits_BV > 0, logits_BV / how.repetition_penalty, logits_BV * how.repetition_penalty)
        return jnp.where(seen_BV, lower_BV, logits_BV)

    def draw(logits_BV: jax.Array) -> jax.Array:
        kept_BV = keep_likely(
            logits_BV / jnp.maximum(how.temperature, LEAST_TEMPERATURE), how.top_k, how.top_p, how.min_p
        )
        key = jax.random.key(how.seed)
        keys_B = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(rows_B, positions_B)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    def choose(logits_BV: jax.Array) -> jax.Array:
        return jax.lax.cond(how.temperature == 0, likeliest, draw, penalise(logits_BV))

    # Greedy, most of the time: one pass over the logits, and no copy.
    return jax.lax.cond(likeliest_only(how), likeliest, choose, logits_BV)


def likeliest_only(how: SamplingArrays) -> Any:
    """Whether the next token is the likeliest, with nothing changed before: bool []."""
    return (how.repetition_penalty == 1) & (how.temperature == 0)


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The logits with -inf for every token that top_k, then top_p, then min_p rule out."""

    def keep_top_k(probs_BV: jax.Array) -> jax.Array:
        k = jnp.minimum(top_k, probs_BV.shape[-1])
        floor_B1 = _highest_threshold(probs_BV, lambda kept_BV: jnp.sum(kept_BV, -1, keepdims=True) >= k)
        probs_BV = jnp.where(probs_BV >= floor_B1, probs_BV, 0.0)
        return probs_BV / jnp.sum(probs_BV, axis=-1, keepdims=True)

    def keep_top_p(probs_BV: jax.Array) -> jax.Array:
        def reached(kept_BV: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(kept_BV, probs_BV, 0.0), axis=-1, keepdims=True) >= top_p

        return jnp.where(probs_BV >= _highest_threshold(probs_BV, reached), probs_BV, 0.0)

    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    probs_BV = jax.lax.cond(top_k > 0, keep_top_k, lambda probs_BV: probs_BV, probs_BV)
    probs_BV = jax.lax.cond(top_p < 1, keep_top_p, lambda probs_BV: probs_BV, probs_BV)
    floor_B1 = min_p * jnp.max(probs_BV, axis=-1, keepdims=True)
    return jnp.where((probs_BV >= floor_B1) & (probs_BV > 0), logits_BV, -jnp.inf)


def _highest_threshold(probs_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The highest float32 t, [B, 1], for which enough(probs >= t) holds; 0 where it never does.

    Exact, by bisection over the bits (floats >= 0 order as their bits do): 31 passes and no sort of the vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)

    def set_bit(i: jax.Array, low_B1: jax.Array) -> jax.Array:
        trial_B1 = low_B1 | (jnp.int32(1) << (30 - i))
        return jnp.where(enough(bits_BV >= trial_B1), trial_B1, low_B1)

    low_B1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((probs_BV.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(low_B1, jnp.float32)
