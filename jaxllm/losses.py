"""What a student is held to: divergences from a teacher's predictions, and sums of them without all logits at once.

P is the teacher's distribution of the next token, Q the student's. Divergences take log-probabilities over the same
events, [..., E], and give nats, [...]: events are the vocabulary, or the teacher's top tokens and all others as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """KL(P ‖ Q) (Hinton et al. 2015): the student has to cover all that the teacher thinks possible."""
    return _expected(log_p, log_p, log_q)


def reverse_kl(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """KL(Q ‖ P) (Gu et al. 2024, MiniLLM): the student has to leave out what the teacher thinks impossible."""
    return _expected(log_q, log_q, log_p)


def jensen_shannon(log_q: jax.Array, log_p: jax.Array, beta: float = 0.5) -> jax.Array:
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q, 0 < β < 1 (Agarwal et al. 2024, GKD)."""
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    return beta * _expected(log_p, log_p, log_m) + (1 - beta) * _expected(log_q, log_q, log_m)


def _expected(log_w: jax.Array, log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """Σ w (log a - log b), where an event without any weight adds nothing, whatever its logarithms."""
    possible = log_w > -jnp.inf
    terms = jnp.exp(log_w) * (jnp.where(possible, log_a, 0.0) - jnp.where(possible, log_b, 0.0))
    return jnp.sum(jnp.where(possible, terms, 0.0), axis=-1)


class TopTokens(NamedTuple):
    """A teacher's predictions, shortened. Nothing is renormalised: the tail is an event of its own.

    ids: int32 [..., K], the likeliest tokens. log_p: float32 [..., K], of them. log_tail: float32 [...], of all others
    together.
    """

    ids: jax.Array
    log_p: jax.Array
    log_tail: jax.Array


def top_tokens(logits: jax.Array, k: int, temperature: float = 1.0) -> TopTokens:
    """The k likeliest of [..., V] logits."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    best, ids = lax.top_k(log_p, k)
    return TopTokens(ids, best, _log_tail(log_p, ids))


def _log_tail(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    """The logarithm of what all tokens but `ids` have together. Not 1 minus the rest, which rounding spoils."""
    others = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)


def events(
    student_logits: jax.Array, teacher: jax.Array | TopTokens, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """(log Q, log P) at a temperature. teacher: its logits; or its top tokens, made at that temperature."""
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    if not isinstance(teacher, TopTokens):
        return log_q, jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    own = jnp.take_along_axis(log_q, teacher.ids, axis=-1)
    log_q = jnp.concatenate([own, _log_tail(log_q, teacher.ids)[..., None]], axis=-1)
    return log_q, jnp.concatenate([teacher.log_p, teacher.log_tail[..., None]], axis=-1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log Q(target): [..., V] and int32 [...] to [...]."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


def hidden_loss(student_BTD: jax.Array, teacher_BTD: jax.Array) -> jax.Array:
    """Mean square of two residual streams' difference, over the teacher's mean square: 1 for a student of zeros."""
    student, teacher = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    return jnp.mean(jnp.square(student - teacher)) / jnp.mean(jnp.square(teacher))


def relation_loss(student_BTNH: jax.Array, teacher_BTNH: jax.Array, relations: int) -> jax.Array:
    """How differently two models relate tokens to those before them (Wang et al. 2021, MiniLMv2): a mean KL in nats.

    Queries, or keys, or values, of any number and width of heads: seen as `relations` heads, which divides both widths,
    each token has a distribution over itself and those before it, by the softmax of scaled products. The student's is
    held to the teacher's.
    """

    def log_relations(x_BTNH: jax.Array) -> jax.Array:
        batch, length = x_BTNH.shape[:2]
        x_BTRh = x_BTNH.astype(jnp.float32).reshape(batch, length, relations, -1)
        scores_BRTS = jnp.einsum("BTRh,BSRh->BRTS", x_BTRh, x_BTRh) * x_BTRh.shape[-1] ** -0.5
        causal_TS = jnp.tril(jnp.ones((length, length), bool))
        return jax.nn.log_softmax(jnp.where(causal_TS, scores_BRTS, -jnp.inf))

    return jnp.mean(forward_kl(log_relations(student_BTNH), log_relations(teacher_BTNH)))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: (1 - ce) τ² D + ce · cross-entropy + hidden · hidden_loss + attention · relation_loss.

    divergence: D, "forward_kl", "reverse_kl" or "jensen_shannon". temperature: τ > 0, of both distributions in D; τ²
    keeps the gradient's size (Hinton et al. 2015). beta: of jensen_shannon. ce: in [0, 1], the text's own next token.
    hidden, attention: weights >= 0 of what is matched in the layers that a map names.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    ce: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence is {self.divergence!r}; expected one of {', '.join(DIVERGENCES)}.")
        checks = {
            "temperature": (0 < self.temperature < float("inf"), "a number above 0"),
            "beta": (0 < self.beta < 1, "a number between 0 and 1"),
            "ce": (0 <= self.ce <= 1, "a number in [0, 1]"),
            "hidden": (0 <= self.hidden < float("inf"), "a number from 0 up"),
            "attention": (0 <= self.attention < float("inf"), "a number from 0 up"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    def tokens(self, student: jax.Array, teacher: jax.Array | TopTokens, targets: jax.Array) -> Mapping[str, Any]:
        """Of logits [..., V] and ids [...], by name, of each token: "loss", what the layers add left out; "divergence",
        at τ; "ce"."""
        log_q, log_p = events(student, teacher, self.temperature)
        kind = DIVERGENCES[self.divergence]
        divergence = kind(log_q, log_p, self.beta) if kind is jensen_shannon else kind(log_q, log_p)
        ce = cross_entropy(student, targets)
        loss = (1 - self.ce) * self.temperature**2 * divergence + self.ce * ce
        return {"loss": loss, "divergence": divergence, "ce": ce}


DIVERGENCES: Mapping[str, Callable[..., jax.Array]] = {
    kind.__name__: kind for kind in (forward_kl, reverse_kl, jensen_shannon)
}

Part = Callable[[Any, jax.Array, Any, Any], Mapping[str, jax.Array]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(part: Part, size: int, weights: Any, x: jax.Array, rows: Any, others: Any) -> Mapping[str, jax.Array]:
    """The sums of what `part` gives, computed for `size` entries of x's first axis at a time.

    part: (weights, x [size, …], rows, others) -> {name: float32 [size, …]}, of which "loss" alone has a gradient, with
        respect to weights and x. rows: arrays whose first axis goes along with x's. others: passed on whole.

    Gradients are made on the way forward, while a chunk's logits are there: they are neither kept nor made twice. A run
    holds one chunk's logits and a gradient of `weights`, summed in float32. The first axis is filled up with zeros to
    whole chunks, of which `part` has to make nothing: `rows` should say which count.
    """
    chunks = _chunks(size, (x, rows))
    first = jax.tree.map(lambda x: x[0], chunks)

    def one(sums: Any, chunk: Any) -> tuple[Any, None]:
        found = jax.tree.map(jnp.sum, part(weights, chunk[0], chunk[1], others))
        return jax.tree.map(jnp.add, sums, found), None

    shapes = jax.eval_shape(lambda chunk: part(weights, chunk[0], chunk[1], others), first)
    sums, _ = lax.scan(one, jax.tree.map(lambda _: jnp.float32(0), shapes), chunks)
    return sums


def _forward(part: Part, size: int, weights: Any, x: jax.Array, rows: Any, others: Any) -> Any:
    def loss(weights: Any, x: jax.Array, of: Any) -> tuple[jax.Array, Any]:
        found = jax.tree.map(jnp.sum, part(weights, x, of, others))
        return found["loss"], found

    def one(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        (_, found), (d_weights, d_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, *chunk)
        d_weights = jax.tree.map(lambda g: g.astype(jnp.float32), d_weights)
        return jax.tree.map(jnp.add, carry, (found, d_weights)), d_x

    chunks = _chunks(size, (x, rows))
    shapes = jax.eval_shape(loss, weights, *jax.tree.map(lambda x: x[0], chunks))[1]
    start = jax.tree.map(lambda _: jnp.float32(0), shapes), jax.tree.map(lambda w: jnp.zeros(w.shape), weights)
    (sums, d_weights), d_x = lax.scan(one, start, chunks)
    d_weights = jax.tree.map(lambda g, w: g.astype(w.dtype), d_weights, weights)
    return sums, (d_weights, d_x.reshape(-1, *x.shape[1:])[: len(x)])


def _backward(part: Part, size: int, gradients: Any, upstream: Any) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * upstream["loss"]).astype(g.dtype), gradients)
    return *scaled, None, None


in_chunks.defvjp(_forward, _backward)


def _chunks(size: int, tree: Any) -> Any:
    """[n, …] as [chunks, size, …]."""

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
        return filled.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, tree)
