"""A training step: the weights that are trained, the optimiser that knows their zeros, an objective's gradients."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import activations, formats, shard
from jaxllm.arrays import Tap, dequantize
from jaxllm.config import ModelConfig
from jaxllm.lm import embed_tokens, ends, param_info, predict
from jaxllm.losses import Objective, hidden_loss, in_chunks, relation_loss
from jaxllm.models.decoder import Block, Constrain, residual_axes
from jaxllm.params import Params, flatten, unflatten
from jaxllm.transforms.mask import choose, parse_pattern

_RELATED = ("attn/q/w", "attn/k/w", "attn/v/w")  # whose results `relation_loss` compares
_CHUNK = 256  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class Training:
    """How weights are trained.

    steps: optimiser steps. batch: sequences of each, in `accumulate` parts that run one after the other.
    learning_rate: the highest, of AdamW (Loshchilov & Hutter 2019): it rises over the first `warmup` of the steps and
        falls to a tenth of itself, along a cosine. weight_decay: of matrices alone. clip: of the gradient's norm.
    beta1, beta2: of AdamW. seed: of everything that chance decides.
    rank: 0 trains all weights; above 0 a product of two matrices of this rank beside each matrix of the layers (Hu et
        al. 2021, LoRA), added to it in the end: the optimiser holds a small part of the memory.
    remat: each layer's activations are computed again for its gradient instead of kept.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    seed: int = 0
    rank: int = 0
    remat: bool = False

    def __post_init__(self):
        for name, least in {"steps": 1, "batch": 1, "accumulate": 1, "seed": 0, "rank": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer from {least} up.")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} has no {self.accumulate} equal parts; accumulate has to divide it.")
        checks = {
            "learning_rate": (0 < self.learning_rate < float("inf"), "a number above 0"),
            "warmup": (0 <= self.warmup < 1, "a fraction of the steps in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "a number from 0 up"),
            "clip": (self.clip > 0, "a number above 0"),
            "beta1": (0 <= self.beta1 < 1, "a number in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "a number in [0, 1)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    @property
    def schedule(self) -> optax.Schedule:
        warmup = int(self.warmup * self.steps)
        peak = self.learning_rate
        return optax.warmup_cosine_decay_schedule(
            peak / (warmup + 1), peak, warmup, max(self.steps, warmup + 1), peak / 10
        )


@dataclasses.dataclass(frozen=True)
class Gradual:
    """Pruning while training: magnitude, to the sparsity that a schedule says (Zhu & Gupta 2017), every so many steps.

    sparsity: step -> fraction of zeros of each matrix, as `cubic_schedule` gives. match: regular expression of paths.
    """

    sparsity: Callable[[jax.typing.ArrayLike], jax.Array]
    every: int = 10
    pattern: str = "unstructured"
    match: str = r"layers_\d+/.*"


class State(NamedTuple):
    """What training changes. weights: {path: float32}, those that are trained. step: how many have been done."""

    weights: dict[str, Any]
    optimiser: Any
    step: jax.Array


def keep_zeros(paths: Collection[str]) -> optax.GradientTransformation:
    """At the end of a chain: what is zero in these weights when training begins stays zero. The state has the masks."""

    def init(weights: Mapping[str, jax.Array]) -> Any:
        return {path: weights[path] != 0 for path in paths}

    def update(updates: Any, masks: Any, weights: Any = None) -> tuple[Any, Any]:
        return {**updates, **{path: jnp.where(kept, updates[path], 0) for path, kept in masks.items()}}, masks

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def prune_gradually(how: Gradual, contracted: Mapping[str, int]) -> optax.GradientTransformation:
    """The last of a chain: weights {path: array} become zero by a schedule, and stay so until others are smaller.

    contracted: of the paths that are pruned.
    """
    pattern = parse_pattern(how.pattern)

    def init(weights: Mapping[str, jax.Array]) -> Any:
        return jnp.int32(0), {path: weights[path] != 0 for path in contracted}

    def update(updates: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        step, masks = state
        now = how.sparsity(step)

        def again(path: str) -> jax.Array:
            w = weights[path] + updates[path]
            rows = int(np.prod(w.shape[: w.ndim - contracted[path]]))
            blocks = w.size // int(np.prod(pattern.block))
            gone = choose(jnp.abs(w).reshape(rows, -1), pattern, jnp.int32(jnp.floor(now * blocks)))
            return ~gone.reshape(w.shape)

        due = step % how.every == 0
        masks = lax.cond(due, lambda: {path: again(path) for path in masks}, lambda: masks)
        gone = {path: jnp.where(masks[path], updates[path], -weights[path]) for path in masks}
        return {**updates, **gone}, (step + 1, masks)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which of a model's weights are trained, and what model they make.

    cfg: of the model, whose dtype is computed in. rank, seed: as of `Training`. rounded: {path: format}, weights that
    the model sees rounded, and whose gradient passes the rounding as if it were not there (Bengio et al. 2013).
    """

    cfg: ModelConfig
    rank: int = 0
    rounded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def begin(self, params: Params) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """(what stays as it is, what is trained in float32), both by path."""
        flat, info = flatten(params), param_info(self.cfg)
        if not self.rank:
            return {}, {path: jnp.array(leaf, jnp.float32) for path, leaf in flat.items()}  # a copy: it is donated
        rng, trained = np.random.default_rng(self.seed), {}
        for path in self.paths(params):
            leaf = flat[path]
            rows = int(np.prod(leaf.shape[: leaf.ndim - info[path].contracted]))
            columns = leaf.size // rows
            first = rng.standard_normal((self.rank, columns), np.float32) * np.float32(columns**-0.5)
            trained[f"{path}/a"], trained[f"{path}/b"] = jnp.asarray(first), jnp.zeros((rows, self.rank), jnp.float32)
        return flat, trained

    def paths(self, params: Params) -> list[str]:
        """Of the weights that training changes: all, or by a rank the layers' matrices."""
        info = param_info(self.cfg)
        return [p for p in flatten(params) if not self.rank or (info[p].contracted and p.startswith("layers_"))]

    def whole(self, fixed: Mapping[str, jax.Array], trained: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """All weights in float32. What is zero in a fixed matrix stays zero."""
        if not self.rank:
            return dict(trained)
        flat = {path: leaf.astype(jnp.float32) for path, leaf in fixed.items()}
        for path in dict.fromkeys(name.rpartition("/")[0] for name in trained):
            w = flat[path]
            change = (trained[f"{path}/b"] @ trained[f"{path}/a"]).reshape(w.shape)
            flat[path] = w + jnp.where(w == 0, 0, change)
        return flat

    def model(self, fixed: Mapping[str, jax.Array], trained: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The params that a forward pass takes."""
        info, flat = param_info(self.cfg), self.whole(fixed, trained)
        for path, name in self.rounded.items():
            fmt, w = formats.parse(name), flat[path]
            seen = dequantize(formats.quantize(lax.stop_gradient(w), info[path].contracted, fmt))
            flat[path] = w + lax.stop_gradient(seen - w)
        return unflatten({path: w.astype(self.cfg.dtype) for path, w in flat.items()})

    def finish(self, fixed: Mapping[str, jax.Array], trained: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The params of the trained model, not rounded."""
        return unflatten({path: w.astype(self.cfg.dtype) for path, w in self.whole(fixed, trained).items()})


class Seen(NamedTuple):
    """x_BTD: the residual stream after a layer. related: the queries, keys and values in it, before rotation."""

    x_BTD: jax.Array
    related: tuple[jax.Array, ...]


def run(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    constrain: Constrain = lambda x, *axes: x,
    remat: bool = False,
    show: Sequence[int] = (),
) -> tuple[jax.Array, dict[int, Seen]]:
    """The residual stream [B, T, D] after the layers of whole sequences, and what `show` asks for, by layer."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = constrain(embed_tokens(cfg.layer(0), params["embed"], tokens_BT), *residual_axes(tokens_BT.shape[1]))
    seen: dict[int, Seen] = {}
    for i in range(cfg.num_layers):
        layer = functools.partial(_layer, cfg.layer(i), constrain, i in show)
        x_BTD, related = (jax.checkpoint(layer) if remat else layer)(params[f"layers_{i}"], x_BTD, positions_BT)
        if i in show:
            seen[i] = Seen(x_BTD, related)
    return x_BTD, seen


def _layer(
    cfg: ModelConfig, constrain: Any, show: bool, layer: Params, x_BTD: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    flat, related = flatten(layer), {}
    if show:

        def record(path: str, bias: jax.Array | None, y: jax.Array) -> None:
            related[path] = y if bias is None else y + bias[None, None]

        for path in _RELATED:
            bias = flat.get(path.removesuffix("w") + "b")
            flat[path] = Tap(flat[path], lambda x, y, path=path, bias=bias: record(path, bias, y))
    y_BTD = Block(cfg, constrain).apply({"params": unflatten(flat)}, x_BTD, positions_BT, None)[0]
    return y_BTD, tuple(related[path] for path in _RELATED if path in related)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training step of a student, for a teacher's shapes and a mesh.

    layer_map: {student's layer: teacher's layer}, which the objective's `hidden` and `attention` compare.
    teacher: its config; None where its predictions come as `TopTokens`. gradual: None for no pruning.
    """

    weights: Weights
    teacher: ModelConfig | None
    objective: Objective
    training: Training
    layer_map: Mapping[int, int] = dataclasses.field(default_factory=dict)
    gradual: Gradual | None = None
    mesh: Mesh | None = None
    rules: shard.Rules = dataclasses.field(default_factory=lambda: shard.RULES)

    @functools.cached_property
    def optimiser(self) -> optax.GradientTransformation:
        how, info = self.training, param_info(self.weights.cfg)
        contracted = {path: entry.contracted for path, entry in info.items() if entry.contracted}

        def matrices(weights: Mapping[str, Any]) -> dict[str, bool]:
            return {path: bool(how.rank) or path in contracted for path in weights}

        last = [] if how.rank else [keep_zeros(contracted)]
        if self.gradual is not None:
            pruned = {p: n for p, n in contracted.items() if re.fullmatch(self.gradual.match, p)}
            last.append(prune_gradually(self.gradual, pruned))
        return optax.chain(
            optax.clip_by_global_norm(how.clip),
            optax.adamw(how.schedule, how.beta1, how.beta2, weight_decay=how.weight_decay, mask=matrices),
            *last,
        )

    def constrain(self, x: Any, *axes: str | None) -> Any:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(activations.value(x), shard.sharding(self.mesh, self.rules, *axes))

    def losses(
        self, trained: Any, fixed: Any, teacher: Any, tokens_BT: jax.Array, scored_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective's mean over the scored tokens, and its parts by name.

        teacher: params, or TopTokens [B, T - 1, …]. scored_BT: bool, which tokens are predicted; the first never is.
        """
        cfg, how = self.weights.cfg, self.objective
        params = self.weights.model(fixed, trained)
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        x_BTD, seen = run(cfg, params, inputs_BT, self.constrain, self.training.remat, [*self.layer_map])
        known: dict[int, Seen] = {}
        if self.teacher is None:
            rows: Any = teacher
        else:
            rows, known = run(self.teacher, teacher, inputs_BT, self.constrain, show=[*self.layer_map.values()])
            rows, known = lax.stop_gradient((rows, known))
        count = jnp.maximum(jnp.sum(scored_BT[:, 1:]), 1).astype(jnp.float32)

        def swapped(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)

        def part(head: Any, x_CBD: jax.Array, of: Any, teacher_head: Any) -> Mapping[str, jax.Array]:
            x_BCD, (teacher_rows, targets_BC, scored_BC) = swapped((x_CBD, of))
            student_BCV = predict(cfg.layer(0), head, x_BCD)
            if self.teacher is not None:
                teacher_rows = predict(self.teacher.layer(0), teacher_head, teacher_rows)
            found = how.tokens(student_BCV, teacher_rows, targets_BC)
            return {name: jnp.where(scored_BC, value, 0.0) / count for name, value in found.items()}

        head = ends(teacher) if self.teacher is not None else ()
        # Chunks are of positions: each device makes the logits of its own sequences.
        x_TBD, by_position = swapped((x_BTD, (rows, targets_BT, scored_BT[:, 1:])))
        out = dict(in_chunks(part, max(1, _CHUNK // len(tokens_BT)), ends(params), x_TBD, by_position, head))
        row_B = jnp.any(scored_BT[:, 1:], axis=1)
        seen, known = _of_rows(row_B, seen), _of_rows(row_B, known)
        share = jnp.mean(row_B, dtype=jnp.float32)
        # Of hidden, a quotient of sums, sequences that do not count are in neither.
        for weight, name, compare, of in (
            (how.hidden, "hidden", _hidden, 1.0),
            (how.attention, "attention", _attention, share),
        ):
            if weight:
                terms = [compare(seen[mine], known[theirs]) for mine, theirs in self.layer_map.items()]
                out[name] = sum(terms, jnp.float32(0)) / len(terms) / of
                out["loss"] += weight * out[name]
        return out["loss"], out

    def step(
        self, state: State, fixed: Any, teacher: Any, tokens_BT: jax.Array, scored_BT: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """One optimiser step; teacher as of `losses`. To be compiled."""
        parts = self.training.accumulate
        with_teacher = functools.partial(self._with_teacher, fixed, teacher)
        own = (teacher, tokens_BT, scored_BT) if self.teacher is None else (tokens_BT, scored_BT)
        batches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), own)

        def one(sums: Any, batch: Any) -> tuple[Any, None]:
            (_, found), gradient = jax.value_and_grad(with_teacher, has_aux=True)(state.weights, batch)
            return jax.tree.map(lambda a, b: a + b / parts, sums, (found, gradient)), None

        _, shapes = jax.eval_shape(with_teacher, state.weights, jax.tree.map(lambda x: x[0], batches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, state.weights))
        (found, gradient), _ = lax.scan(one, zeros, batches)
        with jax.numpy_dtype_promotion("standard"):  # which optax relies on
            updates, optimiser = self.optimiser.update(gradient, state.optimiser, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        found |= {"gradient_norm": optax.tree.norm(gradient)}
        return State(weights, optimiser, state.step + 1), found  # pyright: ignore[reportArgumentType]

    def _with_teacher(self, fixed: Any, teacher: Any, trained: Any, batch: Any) -> Any:
        return self.losses(trained, fixed, *(batch if self.teacher is None else (teacher, *batch)))

    def begin(self, params: Params) -> tuple[Any, State]:
        """(what stays as it is, what the first step takes), on the mesh."""
        fixed, trained = self.weights.begin(params)
        fixed, trained = self._put(fixed), self._put(trained)
        state = State(trained, self.optimiser.init(trained), jnp.int32(0))  # not traced: moments lie where weights do
        if self.mesh is not None:
            everywhere = NamedSharding(self.mesh, P())
            state = jax.tree.map(
                lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere), state
            )
        return fixed, state

    def _put(self, flat: dict[str, jax.Array]) -> Any:
        if self.mesh is None:
            return flat
        info = param_info(self.weights.cfg)
        everywhere = NamedSharding(self.mesh, P())
        places = {
            path: shard.leaf_shardings(info[path], leaf, self.mesh, self.rules) if path in info else everywhere
            for path, leaf in flat.items()
        }
        return shard.put(flat, places)

    def flops(self, tokens: int, length: int) -> float:
        """Of matmuls, that a step of so many tokens needs: 2 for each weight and token forward, 4 backward; the
        attention's; the teacher's forward. What is computed again does not count."""
        forward = _forward_flops(self.weights.cfg, length)
        return tokens * (3 * forward + (0 if self.teacher is None else _forward_flops(self.teacher, length)))


def _forward_flops(cfg: ModelConfig, length: int) -> float:
    """For a token of sequences of this length, of which causal attention sees half."""
    info = param_info(cfg)
    weights = sum(int(np.prod(entry.shape)) for path, entry in info.items() if entry.contracted and path != "embed/w")
    weights += cfg.vocab_size * cfg.embed_dim if cfg.tie_embeddings else 0
    attention = sum(2 * cfg.head_dim * heads * length / 2 for heads in cfg.widths("num_heads"))
    return 2.0 * (weights + attention)


def _of_rows(row_B: jax.Array, seen: dict[int, Seen]) -> dict[int, Seen]:
    """The sequences that count; zeros, of which no difference comes, for the others."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(row_B, range(1, x.ndim)), x, 0), seen)


def _hidden(student: Seen, teacher: Seen) -> jax.Array:
    return hidden_loss(student.x_BTD, teacher.x_BTD)


def _attention(student: Seen, teacher: Seen) -> jax.Array:
    """Over queries, keys and values; each by as many relations as both have heads to share."""
    pairs = list(zip(student.related, teacher.related, strict=True))
    heads = [int(np.gcd(mine.shape[2], theirs.shape[2])) for mine, theirs in pairs]
    terms = [relation_loss(mine, theirs, n) for (mine, theirs), n in zip(pairs, heads, strict=True)]
    return sum(terms, jnp.float32(0)) / len(terms)
