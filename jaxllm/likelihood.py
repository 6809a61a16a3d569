"""How likely a model finds given continuations, many at once: what multiple-choice tasks ask."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.lm import LM, check_tokens, ends, predict, run_layers

_PREDICTIONS = 128  # positions that one call of the head takes: no [B, T, V] array is made


def log_likelihoods(
    lm: LM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int = 8, max_len: int | None = None
) -> list[tuple[float, bool]]:
    """log P(continuation | context) in nats, and whether greedy decoding would give that continuation, of each pair.

    pairs: token ids of a context, at least one, and of its continuation. What both have beyond max_len + 1 tokens is
        cut off at the left.
    batch: rows that run together. Rows are padded at the right, where causal attention does not look, to powers of
        two: a program is compiled for each length, not for each pair. Pairs that read the same tokens share a row.
    max_len: by default what the model was trained for.

    Raises ValueError for a pair without a context, a continuation longer than max_len, or ids out of range.
    """
    max_len = lm.cfg.max_len if max_len is None else max_len
    if batch < 1 or max_len < 1:
        raise ValueError(f"batch={batch} and max_len={max_len}; expected positive integers.")
    readers: dict[tuple[int, ...], list[int]] = {}  # what a row holds: the pairs that it answers
    for i, (context, continuation) in enumerate(pairs):
        if len(context) == 0 or len(continuation) > max_len:
            raise ValueError(
                f"Pair {i} has {len(context)} tokens of context and {len(continuation)} of continuation; expected at "
                f"least one, and at most max_len={max_len}."
            )
        check_tokens(lm.cfg, [[*context, *continuation]])
        inputs = [*context, *continuation][-max_len - 1 :][:-1]
        if continuation:
            readers.setdefault(tuple(inputs), []).append(i)

    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    rows = sorted(readers, key=len, reverse=True)  # so that only the last batch is not full
    batch = min(batch, len(rows))
    for start in range(0, len(rows), max(1, batch)):
        group = rows[start : start + batch]
        tokens_BT = np.zeros((batch, _padded(len(group[0]), max_len)), np.int32)
        wanted = []
        for b, inputs in enumerate(group):
            tokens_BT[b, : len(inputs)] = inputs
            for i in readers[inputs]:
                answer = pairs[i][1]
                wanted += [(b, len(inputs) - len(answer) + n, token, i) for n, token in enumerate(answer)]
        x_BTD = run_layers(lm, tokens_BT)
        for first in range(0, len(wanted), _PREDICTIONS):
            some = np.array(wanted[first : first + _PREDICTIONS], np.int32)
            row_M, position_M, token_M, pair_M = np.pad(some, ((0, _PREDICTIONS - len(some)), (0, 0))).T
            logits_1MV = predict(lm.cfg.layer(0), ends(lm.params), _gather(x_BTD, row_M, position_M))
            log_p_M, likeliest_M = (np.asarray(part)[: len(some)] for part in _look_up(logits_1MV[0], token_M))
            np.add.at(sums, pair_M[: len(some)], log_p_M.astype(np.float64))
            np.logical_and.at(greedy, pair_M[: len(some)], likeliest_M)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _padded(length: int, max_len: int) -> int:
    """The next power of two, 16 at least and max_len at most."""
    return min(max_len, max(16, 1 << (length - 1).bit_length()))


@jax.jit
def _gather(x_BTD: jax.Array, row_M: jax.Array, position_M: jax.Array) -> jax.Array:
    return x_BTD[row_M, position_M][None]


@jax.jit
def _look_up(logits_MV: jax.Array, token_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of a token at each position, and whether it is the likeliest."""
    log_p_MV = jax.nn.log_softmax(logits_MV)
    log_p_M = jnp.take_along_axis(log_p_MV, token_M[:, None], axis=1)[:, 0]
    return log_p_M, jnp.argmax(logits_MV, axis=1) == token_M
