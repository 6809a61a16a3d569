"""Which weights go: masks from scores, in the patterns that pruning knows."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The shape of what is zeroed, in a weight seen as [out, in].

    keep, of: N:M keeps `keep` of every `of` neighbours along the inputs. 0 for no such rule.
    block: rows and columns of the rectangles that go as one; (1, 1) is unstructured.
    """

    keep: int = 0
    of: int = 0
    block: tuple[int, int] = (1, 1)

    @property
    def sparsity(self) -> float | None:
        """What the pattern alone decides."""
        return 1 - self.keep / self.of if self.of else None


def parse_pattern(name: str) -> Pattern:
    """parse_pattern("2:4"), "16x16" or "unstructured"."""
    if name == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", name):
        keep, of = int(found[1]), int(found[2])
        if 0 < keep < of:
            return Pattern(keep=keep, of=of)
    elif (found := re.fullmatch(r"(\d{1,4})x(\d{1,4})", name)) and int(found[1]) and int(found[2]):
        return Pattern(block=(int(found[1]), int(found[2])))
    raise ValueError(
        f"{name!r} is no pattern. There are unstructured, N:M (keep N of M inputs: 2:4, 4:8) and RxC (blocks: 16x16)."
    )


def check_pattern(pattern: Pattern, rows: int, columns: int, path: str) -> None:
    """Raises ValueError when the pattern does not divide the weight."""
    row, column = pattern.block
    if rows % row or columns % max(column, pattern.of):
        what = f"groups of {pattern.of} inputs" if pattern.of else f"blocks of {row} x {column}"
        raise ValueError(f"{path} is {rows} x {columns}, which {what} do not divide.")


def smallest(score: jax.Array, count: jax.Array | int) -> jax.Array:
    """Marks exactly `count` elements of each row, those of least score; of equal ones the first.

    score: float32 >= 0, [R, C]. The threshold is found bit by bit (floats of one sign order as their bits do): nothing
    is sorted. Less than 2**31 elements.
    """
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)

    def refine(i: jax.Array, threshold_R1: jax.Array) -> jax.Array:
        trial_R1 = threshold_R1 | (jnp.int32(1) << (30 - i))
        below_R1 = jnp.sum(bits < trial_R1, axis=1, keepdims=True, dtype=jnp.int32)
        return jnp.where(below_R1 <= count, trial_R1, threshold_R1)

    threshold_R1 = jax.lax.fori_loop(0, 31, refine, jnp.zeros((score.shape[0], 1), jnp.int32))
    below, tied = bits < threshold_R1, bits == threshold_R1
    ties_R1 = count - jnp.sum(below, axis=1, keepdims=True, dtype=jnp.int32)
    exact = jnp.all(ties_R1 == jnp.sum(tied, axis=1, keepdims=True, dtype=jnp.int32))
    # Counting ties is slow, and they are rare in float32.
    taken = jax.lax.cond(exact, lambda: tied, lambda: tied & (jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= ties_R1))
    return below | taken


def least_of_group(score: jax.Array, drop: int, of: int) -> jax.Array:
    """Marks the `drop` least of every `of` neighbours along the last axis; of equal ones the first."""
    s = score.reshape(*score.shape[:-1], -1, of)
    before = jnp.arange(of)[:, None] < jnp.arange(of)[None]  # [other, self]
    before = before.reshape((1,) * (s.ndim - 1) + before.shape)
    other, mine = s[..., :, None], s[..., None, :]
    rank = jnp.sum((other < mine) | ((other == mine) & before), axis=-2, dtype=jnp.int32)
    return (rank < drop).reshape(score.shape)


def choose(score_NK: jax.Array, pattern: Pattern, count: jax.Array | int, by_row: bool = False) -> jax.Array:
    """bool [N, K]: what goes.

    count: of elements, or of blocks, in all, or in each row with by_row; N:M decides by itself.
    """
    rows, columns = score_NK.shape
    if pattern.of:
        return least_of_group(score_NK, pattern.of - pattern.keep, pattern.of)
    row, column = pattern.block
    if pattern.block != (1, 1):
        score = score_NK.reshape(rows // row, row, columns // column, column).sum(axis=(1, 3))
        gone = smallest(score.reshape(1, -1), count).reshape(score.shape)
        return jnp.repeat(jnp.repeat(gone, row, axis=0), column, axis=1)
    if by_row:
        return smallest(score_NK, count)
    return smallest(score_NK.reshape(1, -1), count).reshape(score_NK.shape)


def global_threshold(scores: Sequence[Callable[[], jax.Array]], count: int) -> tuple[int, int]:
    """Bits of the threshold below which `count` or fewer elements of all arrays lie, and how many ties fill the count.

    scores: each makes one array of float32 >= 0. They are made again for each of the 31 bits, so that no two have to be
    in memory, nothing is sorted, and nothing gathered from other devices.
    """
    threshold = 0
    for bit in reversed(range(31)):
        trial = threshold | 1 << bit
        if sum(int(_count_below(score(), trial)) for score in scores) <= count:
            threshold = trial
    return threshold, count - sum(int(_count_below(score(), threshold)) for score in scores)


@jax.jit
def _count_below(score: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.bitcast_convert_type(score, jnp.int32) < threshold)


@functools.partial(jax.jit)
def below_threshold(score: jax.Array, threshold: jax.Array, ties: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Marks what is below, and the first `ties` at the threshold; and says how many of those there were."""
    bits = jax.lax.bitcast_convert_type(score, jnp.int32).reshape(-1)
    tied = bits == threshold
    taken = tied & (jnp.cumsum(tied, dtype=jnp.int32) <= ties)
    return ((bits < threshold) | taken).reshape(score.shape), jnp.sum(taken)
