"""A model in stages: runs of layers, each its own programs on devices of its own, with its weights and caches alone.

What the layers of one stage give goes to the devices of the next, and the token that the last one draws back to the
first (Huang et al. 2019, "GPipe", without its backward pass). The batch runs in groups, so that while a stage works on
one, the others work on others: calls are dispatched ahead, and each device takes them in order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm import shard
from jaxllm.cache import KVCache
from jaxllm.compile import STEPS, Lowering, Part, Programs, use_compilation_cache
from jaxllm.config import WIDTHS, ModelConfig
from jaxllm.lm import param_info
from jaxllm.params import Params
from jaxllm.programs import State
from jaxllm.sample import SamplingArrays


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of a model's layers. cfg: of a model of these alone. part: what comes beside them."""

    layers: range
    cfg: ModelConfig
    part: Part

    def params(self, params: Params) -> Params:
        """The weights of the whole model that are this stage's, its layers counted from 0.

        A tied embedding is on the first stage, which looks tokens up in it, and on the last, which predicts with it.
        """
        names = {f"layers_{i}": f"layers_{n}" for n, i in enumerate(self.layers)}
        if self.part.embeds or (self.part.predicts and self.cfg.tie_embeddings):
            names["embed"] = "embed"
        if self.part.predicts:
            names |= {name: name for name in ("final_norm", "head") if name in params}
        return {new: params[old] for old, new in names.items()}


def split(cfg: ModelConfig, stages: int) -> list[Stage]:
    """The model in stages of nearly equal cost: the weights that a decode step reads, the head's with the last.

    Raises ValueError when there are fewer layers than stages.
    """
    if not 1 <= stages <= cfg.num_layers:
        raise ValueError(f"stages={stages}; a model of {cfg.num_layers} layers has 1 to {cfg.num_layers}.")
    costs = [0] * cfg.num_layers
    for path, info in param_info(cfg).items():
        if path.startswith("layers_"):
            costs[int(path[len("layers_") : path.index("/")])] += int(np.prod(info.shape))
    costs[-1] += cfg.vocab_size * cfg.embed_dim
    before = [0, *itertools.accumulate(costs)]

    @functools.cache
    def best(first: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """The largest stage of the layers from `first`, the sum of squares, and where the stages end."""
        if left == 1:
            cost = before[-1] - before[first]
            return cost, cost**2, (cfg.num_layers,)
        found = []
        for end in range(first + 1, cfg.num_layers - left + 2):
            cost, (worst, squares, ends) = before[end] - before[first], best(end, left - 1)
            found.append((max(cost, worst), cost**2 + squares, (end, *ends)))
        return min(found)

    ends = best(0, stages)[2]
    return [_stage(cfg, range(*run)) for run in itertools.pairwise((0, *ends))]


def _stage(cfg: ModelConfig, layers: range) -> Stage:
    widths = {name: cfg.widths(name)[layers.start : layers.stop] for name in WIDTHS}
    part = Part(embeds=layers.start == 0, predicts=layers.stop == cfg.num_layers)
    return Stage(layers, dataclasses.replace(cfg, num_layers=len(layers), **widths), part)


def count_groups(batch: int, stages: int, data: int) -> int:
    """In how many groups a batch runs: one for each stage, or as many as leave each device whole rows.

    batch: a multiple of data, over which each group is split.
    """
    return max(n for n in range(1, stages + 1) if batch % (n * data) == 0)


def put(cfg: ModelConfig, params: Params, mesh: Mesh, rules: shard.Rules = shard.RULES) -> tuple[Params, ...]:
    """The weights of each stage, on its devices."""
    return tuple(
        jax.device_put(part := stage.params(params), shard.param_shardings(stage.cfg, part, on, rules))
        for stage, on in zip(split(cfg, mesh.shape["stages"]), shard.stage_meshes(mesh), strict=True)
    )


def compile_stages(
    cfg: ModelConfig,
    params: Params,
    batch: int,
    max_len: int,
    mesh: Mesh,
    steps: int = STEPS,
    rules: shard.Rules = shard.RULES,
) -> Programs:
    """Compiles prefill and decode of each stage. Arguments and errors as of `compile.compile_programs`.

    The programs take their weights as `put` gives them. Their state is a `Group` for each group of rows.
    """
    use_compilation_cache()
    meshes = shard.stage_meshes(mesh)
    parts = split(cfg, len(meshes))
    shard.check_mesh(cfg, meshes[0], batch, rules)
    groups = count_groups(batch, len(meshes), mesh.shape["data"])
    lowerings = [
        Lowering(part.cfg, part.params(params), batch // groups, max_len, on, rules, part=part.part)
        for part, on in zip(parts, meshes, strict=True)
    ]
    chunks = lowerings[0].chunks
    lowered: dict[Any, Any] = {}
    for i, lower in enumerate(lowerings):
        lowered |= {(i, "start"): lower.start(), (i, "step"): lower.step()}
        lowered |= {(i, chunk): lower.prefill(chunk) for chunk in chunks}
    with ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    lengths: dict[Any, int] = {"step": 1, **{chunk: chunk for chunk in chunks}}
    pipeline = _Pipeline(
        groups,
        steps,
        [{kind: compiled[i, kind] for kind in ("start", *lengths)} for i in range(len(meshes))],
        [shard.sharding(on, rules, "batch") for on in meshes],
        [{kind: lower.stream(length).sharding for kind, length in lengths.items()} for lower in lowerings],
    )
    prefill = {chunk: functools.partial(pipeline.prefill, chunk) for chunk in chunks}
    return Programs(batch, lowerings[0].slots, pipeline.start, prefill, pipeline.decode)


@dataclasses.dataclass(frozen=True)
class Group:
    """What some rows carry from one call to the next. caches: of all stages but the last, whose state has its own."""

    caches: tuple[KVCache, ...]
    last: State


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """The compiled programs of all stages, and where they take what others give: rows and residual streams."""

    groups: int
    steps: int
    stages: Sequence[Mapping[Any, Any]]
    rows: Sequence[Any]
    streams: Sequence[Mapping[Any, Any]]

    def start(self) -> tuple[Group, ...]:
        made = ([stage["start"]() for stage in self.stages] for _ in range(self.groups))
        return tuple(Group(tuple(caches), last) for *caches, last in made)

    def prefill(
        self,
        chunk: int,
        params: Sequence[Params],
        state: Sequence[Group],
        tokens_BC: np.ndarray,
        start: np.ndarray,
        lengths_B: np.ndarray,
        row_B: np.ndarray,
        how: SamplingArrays,
    ) -> tuple[tuple[Group, ...], jax.Array]:
        after, drawn = [], []
        parts = (np.split(rows, self.groups) for rows in (tokens_BC, lengths_B, row_B))
        for group, tokens, lengths, rows in zip(state, *parts, strict=True):
            position_B = [np.full(len(tokens), start, np.int32)] * len(group.caches)
            caches, x = self._front(chunk, params, group.caches, tokens, position_B)
            last, token_B = self.stages[-1][chunk](params[-1], group.last, tokens, start, lengths, rows, how, x)
            after.append(Group(caches, last))
            drawn.append(token_B)
        return tuple(after), jnp.concatenate(drawn)

    def decode(
        self, params: Sequence[Params], state: Sequence[Group], limit: np.ndarray, how: SamplingArrays
    ) -> tuple[tuple[Group, ...], jax.Array]:
        groups, columns = list(state), []
        for _ in range(min(int(limit), self.steps)):
            drawn = []
            for i, group in enumerate(groups):
                token_B, *position_B = jax.device_put(
                    [group.last.token_B, *[group.last.position_B] * len(group.caches)], [self.rows[0], *self.rows[:-1]]
                )
                caches, x = self._front("step", params, group.caches, token_B, position_B)
                last, new_B = self.stages[-1]["step"](params[-1], group.last, how, x)
                groups[i] = Group(caches, last)
                drawn.append(new_B)
            columns.append(drawn)
        return tuple(groups), _block(columns)

    def _front(
        self, kind: Any, params: Sequence[Params], caches: Sequence[KVCache], x: Any, position_B: Sequence[Any]
    ) -> tuple[tuple[KVCache, ...], jax.Array]:
        """All stages but the last: their caches, and the residual stream on the last one's devices."""
        after = []
        for i, (cache, position) in enumerate(zip(caches, position_B, strict=True)):
            cache, x = self.stages[i][kind](params[i], cache, x, position)
            x = jax.device_put(x, self.streams[i + 1][kind])
            after.append(cache)
        return tuple(after), x


@jax.jit
def _block(columns: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """[B, N] from N columns, each in groups of rows."""
    return jnp.stack([jnp.concatenate(groups) for groups in columns], axis=1)
