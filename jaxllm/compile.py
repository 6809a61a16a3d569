"""A model's shapes and a mesh to compiled programs, ahead of time. No weight is needed, nor touched."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxllm import shard
from jaxllm.cache import KVCache, init_cache
from jaxllm.config import ModelConfig
from jaxllm.hub import cache_dir
from jaxllm.models.decoder import Decoder, residual_axes
from jaxllm.params import Params
from jaxllm.sample import Sampling, SamplingArrays, as_arrays, next_token

CHUNKS = (16, 64, 256)  # tokens of a prompt that one prefill call takes; the smallest that fits is used
STEPS = 8  # tokens that one decode call yields, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What generation carries from one call to the next; donated to each."""

    cache: KVCache
    token_B: jax.Array  # int32: drawn, not yet fed to the model
    row_B: jax.Array  # int32: which prompt of the request this is; chance depends on it
    position_B: jax.Array  # int32: where token_B stands
    done_B: jax.Array  # bool: token_B is a stop token
    seen_BV: jax.Array  # bool: tokens of the prompt and the answer, for the repetition penalty


@dataclasses.dataclass(frozen=True)
class Part:
    """What the programs of a run of layers do beside them; all of it unless the model is split in stages.

    embeds: take token ids, and not the residual stream after the layers before. predicts: draw the next tokens, and do
    not give the residual stream to others.
    """

    embeds: bool = True
    predicts: bool = True


WHOLE = Part()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one model, batch, length and mesh. With stages, State is one that `stages` knows.

    start() -> State
    prefill[C](params, state, tokens_BC, start, lengths_B, row_B, sampling) -> (State, token_B)
        takes tokens start … start + C - 1 of every prompt, of which row b has lengths_B[b]; 0 for a row not in use.
        token_B has the first new token of the rows whose prompt has ended.
    decode(params, state, limit, sampling) -> (State, tokens_BN)
        up to min(limit, N) more tokens of each row; -1 where a row has ended.
    """

    batch: int
    slots: int
    start: Callable[[], Any]
    prefill: Mapping[int, Callable[..., tuple[Any, jax.Array]]]
    decode: Callable[..., tuple[Any, jax.Array]]


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, under the cache directory, unless the user has chosen a place already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


def compile_programs(
    cfg: ModelConfig,
    params: Params,
    batch: int,
    max_len: int,
    mesh: Mesh | None = None,
    steps: int = STEPS,
    rules: shard.Rules = shard.RULES,
) -> Programs:
    """Compiles prefill, in chunks of several lengths, and decode.

    params: the weights or their jax.ShapeDtypeStruct.
    max_len: tokens of prompt and answer together that a row can hold; rounded up to whole chunks.
    mesh: None for the default device. rules: which of its axes split what.

    Raises ValueError when the mesh does not divide a dimension of the model.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; expected a positive integer.")
    use_compilation_cache()
    lower = Lowering(cfg, params, batch, max_len, mesh, rules)
    lowered: dict[Any, Any] = {"start": lower.start(), "decode": lower.decode(steps)}
    lowered |= {chunk: lower.prefill(chunk) for chunk in lower.chunks}
    with ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    prefill = {chunk: compiled[chunk] for chunk in lower.chunks}
    return Programs(batch, lower.slots, compiled["start"], prefill, compiled["decode"])


def prefill_chunks(max_len: int) -> list[int]:
    return [size for size in CHUNKS if size < max_len] or [CHUNKS[0]]


def cache_slots(max_len: int) -> int:
    """max_len in whole chunks."""
    largest = prefill_chunks(max_len)[-1]
    return -(-max_len // largest) * largest


class Lowering:
    """A model's programs, traced for a batch, length and mesh: each method returns one, to be compiled.

    Arguments and errors as of `compile_programs`. The mesh's devices need not be at hand. params and state: shapes and
    shardings of the first two arguments of all programs but `start`.

    part: of a model split in stages, of which cfg and params are then one. A program that does not predict is
    (params, cache, x, position_B) -> (cache, residual stream [B, T, D]), its state a KVCache: x are tokens or the
    residual stream, and row b stands at position_B[b]. One that does not embed takes the residual stream last.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        batch: int,
        max_len: int,
        mesh: Mesh | None,
        rules: shard.Rules = shard.RULES,
        part: Part = WHOLE,
    ):
        for name, value in {"batch": batch, "max_len": max_len}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")
        self.chunks, self.slots = prefill_chunks(max_len), cache_slots(max_len)
        if mesh is not None:
            shard.check_mesh(cfg, mesh, batch, rules, self.slots)
        self.layers = cfg.num_layers
        self._cfg, self._batch, self._part = cfg, batch, part
        self._sharded = sharded = _Shardings(cfg, mesh, rules, part)
        self._decoder = Decoder(cfg) if mesh is None else Decoder(cfg, sharded.constrain)
        start = _start if part.predicts else init_cache
        self._make_state = functools.partial(start, cfg, batch, self.slots, sharded.on_cpu)
        self.state = sharded.abstract(jax.eval_shape(self._make_state), sharded.state())
        self.params = sharded.abstract(params, sharded.params(params))
        self._how = jax.eval_shape(lambda: as_arrays(Sampling(), frozenset()))
        self._number = jax.ShapeDtypeStruct((), jnp.int32)

    def start(self) -> Any:
        return jax.jit(self._make_state, out_shardings=self._sharded.state()).lower()

    def prefill(self, chunk: int) -> Any:
        if not self._part.predicts:
            return self._run(chunk, self._before(chunk) or (self._rows(chunk),))
        tokens, lengths = self._rows(chunk), self._rows()
        prefill = self._jit(functools.partial(_prefill, self._decoder), self._sharded.batch(1))
        inputs = tokens, self._number, lengths, lengths, self._how
        return prefill.lower(self.params, self.state, *inputs, *self._before(chunk))

    def decode(self, steps: int) -> Any:
        decode = self._jit(functools.partial(_decode, self._decoder, steps), self._sharded.batch(2))
        return decode.lower(self.params, self.state, self._number, self._how)

    def step(self) -> Any:
        """One decode step without the loop around it: what `decode` does over and over."""
        if not self._part.predicts:
            return self._run(1, self._before(1) or (self._rows(),))
        step = self._jit(functools.partial(_step, self._decoder), self._sharded.batch(1))
        return step.lower(self.params, self.state, self._how, *self._before(1))

    def _run(self, length: int, x: tuple[Any, ...]) -> Any:
        run = self._jit(functools.partial(_run, self._decoder), self._sharded.stream(length))
        return run.lower(self.params, self.state, *x, self._rows())

    def _rows(self, *lengths: int) -> Any:
        """Integers for each row."""
        rows = jax.ShapeDtypeStruct((self._batch, *lengths), jnp.int32)
        return self._sharded.abstract(rows, self._sharded.batch(len(rows.shape)))

    def stream(self, length: int) -> Any:
        """The residual stream, as stages give it to each other."""
        shape = jax.ShapeDtypeStruct((self._batch, length, self._cfg.embed_dim), self._cfg.dtype)
        return self._sharded.abstract(shape, self._sharded.stream(length))

    def _before(self, length: int) -> tuple[Any, ...]:
        """What layers before these give; nothing where there are none."""
        return () if self._part.embeds else (self.stream(length),)

    def _jit(self, program: Callable[..., Any], out: Any) -> Any:
        """out: shardings of what it gives beside the state."""
        return jax.jit(program, donate_argnums=1, out_shardings=(self._sharded.state(), out))


@dataclasses.dataclass(frozen=True)
class _Shardings:
    """The rule table applied to what the programs take and give; all None without a mesh."""

    cfg: ModelConfig
    mesh: Mesh | None
    rules: shard.Rules = dataclasses.field(hash=False)
    part: Part

    @property
    def on_cpu(self) -> bool:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform == "cpu"

    def params(self, params: Params) -> Any:
        return None if self.mesh is None else shard.param_shardings(self.cfg, params, self.mesh, self.rules)

    def batch(self, rank: int) -> Any:
        return None if self.mesh is None else shard.sharding(self.mesh, self.rules, "batch", *(None,) * (rank - 1))

    def state(self) -> Any:
        if self.mesh is None:
            return None
        row = self.batch(1)
        cache = shard.cache_shardings(self.cfg, self.mesh, self.on_cpu, self.rules)
        return State(cache, row, row, row, row, self.batch(2)) if self.part.predicts else cache

    def stream(self, length: int) -> Any:
        axes = residual_axes(length)
        return None if self.mesh is None else shard.sharding(self.mesh, self.rules, *axes)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins an array with these logical axes; left free, propagation may split it and pay with collectives."""
        assert self.mesh is not None
        return lax.with_sharding_constraint(x, shard.sharding(self.mesh, self.rules, *axes))

    def abstract(self, tree: Any, shardings: Any) -> Any:
        """The shapes and types of `tree`, with these shardings where there is a mesh."""
        if self.mesh is None:
            return jax.eval_shape(lambda tree: tree, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _start(cfg: ModelConfig, batch: int, slots: int, on_cpu: bool) -> State:
    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros((batch, *shape), dtype)  # a buffer each: all are donated

    cache = init_cache(cfg, batch, slots, split=on_cpu)
    return State(cache, zeros(), zeros(), zeros(), zeros(dtype=bool), zeros(cfg.vocab_size, dtype=bool))


def _apply(decoder: Decoder, params: Params, *args: jax.Array | KVCache) -> tuple[jax.Array, Any]:
    return decoder.apply({"params": params}, *args)  # pyright: ignore[reportReturnType]


def _prefill(
    decoder: Decoder,
    params: Params,
    state: State,
    tokens_BC: jax.Array,
    start: jax.Array,
    lengths_B: jax.Array,
    row_B: jax.Array,
    how: SamplingArrays,
    x_BCD: jax.Array | None = None,
) -> tuple[State, jax.Array]:
    batch, chunk = tokens_BC.shape
    positions_BC = jnp.broadcast_to(start + jnp.arange(chunk), (batch, chunk))
    last_B = lengths_B - 1 - start
    x = tokens_BC if x_BCD is None else x_BCD
    logits_B1V, cache = _apply(decoder, params, x, positions_BC, state.cache, jnp.clip(last_B, 0, chunk - 1))
    rows_B = jnp.arange(batch)
    seen_BV = state.seen_BV.at[rows_B[:, None], tokens_BC].max(positions_BC < lengths_B[:, None])
    ends_here_B = (last_B >= 0) & (last_B < chunk)
    token_B = next_token(logits_B1V[:, 0], seen_BV, row_B, lengths_B, how)
    token_B = jnp.where(ends_here_B, token_B, state.token_B)
    state = State(
        cache=cache,
        token_B=token_B,
        row_B=row_B,
        position_B=lengths_B,
        done_B=(lengths_B == 0) | (jnp.isin(token_B, how.stop_tokens) & (last_B < chunk)),
        seen_BV=seen_BV.at[rows_B, token_B].max(ends_here_B),
    )
    return state, token_B


def _decode(
    decoder: Decoder, steps: int, params: Params, state: State, limit: jax.Array, how: SamplingArrays
) -> tuple[State, jax.Array]:
    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        step, state, _ = carry
        return (step < jnp.minimum(limit, steps)) & ~jnp.all(state.done_B)

    def advance(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        step, state, out_BN = carry
        state, token_B = _step(decoder, params, state, how)
        return step + 1, state, lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)

    out_BN = jnp.full((state.token_B.shape[0], steps), -1, jnp.int32)
    _, state, out_BN = lax.while_loop(unfinished, advance, (jnp.int32(0), state, out_BN))
    return state, out_BN


def _step(
    decoder: Decoder, params: Params, state: State, how: SamplingArrays, x_B1D: jax.Array | None = None
) -> tuple[State, jax.Array]:
    """The next token of each row; -1 where the row has ended."""
    rows_B = jnp.arange(state.token_B.shape[0])
    x = state.token_B[:, None] if x_B1D is None else x_B1D
    logits_B1V, cache = _apply(decoder, params, x, state.position_B[:, None], state.cache)
    token_B = next_token(logits_B1V[:, 0], state.seen_BV, state.row_B, state.position_B + 1, how)
    # A row that has ended stands still: it writes the same slot again, and nothing reads it.
    token_B = jnp.where(state.done_B, state.token_B, token_B)
    after = State(
        cache=cache,
        token_B=token_B,
        row_B=state.row_B,
        position_B=jnp.where(state.done_B, state.position_B, state.position_B + 1),
        done_B=state.done_B | jnp.isin(token_B, how.stop_tokens),
        seen_BV=state.seen_BV.at[rows_B, token_B].set(True),
    )
    return after, jnp.where(state.done_B, -1, token_B)


def _run(
    decoder: Decoder, params: Params, cache: KVCache, x: jax.Array, position_B: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Layers whose result others go on with. x: tokens, [B] or [B, T], or the residual stream [B, T, D]."""
    x = x[:, None] if x.ndim == 1 else x
    positions_BT = position_B[:, None] + jnp.arange(x.shape[1])[None]
    x_BTD, cache = decoder.apply({"params": params}, x, positions_BT, cache, method="run")  # pyright: ignore
    return cache, x_BTD
