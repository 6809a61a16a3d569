"""What compiled programs do: pure functions of weights and a state, which carries a generation from call to call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm import kernels
from jaxllm.arrays import Kernel
from jaxllm.cache import KVCache, init_cache
from jaxllm.config import ModelConfig
from jaxllm.models.decoder import Decoder
from jaxllm.params import Params
from jaxllm.sample import Likeliest, SamplingArrays, next_token


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


def start(cfg: ModelConfig, batch: int, slots: int, split: bool) -> State:
    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros((batch, *shape), dtype)  # a buffer each: all are donated

    cache = init_cache(cfg, batch, slots, split)
    return State(cache, zeros(), zeros(), zeros(), zeros(dtype=bool), zeros(cfg.vocab_size, dtype=bool))


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder, and what stands for parts of it on the platform and mesh that it is traced for.

    kernels: that contract its weights on a platform. likeliest: as of `next_token`.
    """

    decoder: Decoder
    kernels: Mapping[str, Kernel]
    platform: str
    likeliest: Likeliest

    def __call__(self, params: Params, *args: jax.Array | KVCache, method: str | None = None) -> tuple[jax.Array, Any]:
        params = kernels.equip(params, self.kernels, self.platform)
        return self.decoder.apply({"params": params}, *args, method=method)  # pyright: ignore[reportReturnType]


def probe(model: Model, params: Params, tokens_RT: jax.Array) -> jax.Array:
    positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1]), tokens_RT.shape)
    return model(params, tokens_RT, positions_RT)[0]


def prefill(
    model: Model,
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
    logits_B1V, cache = model(params, x, positions_BC, state.cache, jnp.clip(last_B, 0, chunk - 1))
    rows_B = jnp.arange(batch)
    seen_BV = state.seen_BV & (start > 0)  # the state may be one that another generation has left
    seen_BV = seen_BV.at[rows_B[:, None], tokens_BC].max(positions_BC < lengths_B[:, None])
    ends_here_B = (last_B >= 0) & (last_B < chunk)
    token_B = next_token(logits_B1V[:, 0], seen_BV, row_B, lengths_B, how, model.likeliest)
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


def decode(
    model: Model, steps: int, params: Params, state: State, limit: jax.Array, how: SamplingArrays
) -> tuple[State, jax.Array]:
    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        done, state, _ = carry
        return (done < jnp.minimum(limit, steps)) & ~jnp.all(state.done_B)

    def advance(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        done, state, out_BN = carry
        state, token_B = step(model, params, state, how)
        return done + 1, state, lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], done, axis=1)

    out_BN = jnp.full((state.token_B.shape[0], steps), -1, jnp.int32)
    _, state, out_BN = lax.while_loop(unfinished, advance, (jnp.int32(0), state, out_BN))
    return state, out_BN


def greedy(
    model: Model, steps: int, params: Params, state: State, limit: jax.Array, how: SamplingArrays
) -> tuple[State, jax.Array]:
    """What `decode` does where `how` asks for the likeliest tokens and no limit is near.

    How the loop goes on is known in advance: a GPU stands still whenever the host has to read that.
    """
    del limit

    def advance(done: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, token_B = step(model, params, carry[0], how, likeliest_only=True)
        return state, lax.dynamic_update_slice_in_dim(carry[1], token_B[:, None], done, axis=1)

    out_BN = jnp.full((state.token_B.shape[0], steps), -1, jnp.int32)
    return lax.fori_loop(0, steps, advance, (state, out_BN))


def step(
    model: Model,
    params: Params,
    state: State,
    how: SamplingArrays,
    x_B1D: jax.Array | None = None,
    likeliest_only: bool = False,
) -> tuple[State, jax.Array]:
    """The next token of each row; -1 where the row has ended. likeliest_only: as `how` is known to ask for."""
    x = state.token_B[:, None] if x_B1D is None else x_B1D
    logits_B1V, cache = model(params, x, state.position_B[:, None], state.cache)
    if likeliest_only:
        token_B = model.likeliest(logits_B1V[:, 0])
    else:
        token_B = next_token(logits_B1V[:, 0], state.seen_BV, state.row_B, state.position_B + 1, how, model.likeliest)
    # A row that has ended stands still: it writes the same slot again, and nothing reads it.
    token_B = jnp.where(state.done_B, state.token_B, token_B)
    after = State(
        cache=cache,
        token_B=token_B,
        row_B=state.row_B,
        position_B=jnp.where(state.done_B, state.position_B, state.position_B + 1),
        done_B=state.done_B | jnp.isin(token_B, how.stop_tokens),
        # Not a scatter, which for one row has to gather a vocabulary that is split.
        seen_BV=state.seen_BV | (jnp.arange(state.seen_BV.shape[1])[None] == token_B[:, None]),
    )
    return after, jnp.where(state.done_B, -1, token_B)


def run(model: Model, params: Params, cache: KVCache, x: jax.Array, position_B: jax.Array) -> tuple[KVCache, jax.Array]:
    """Layers whose result others go on with. x: tokens, [B] or [B, T], or the residual stream [B, T, D]."""
    x = x[:, None] if x.ndim == 1 else x
    positions_BT = position_B[:, None] + jnp.arange(x.shape[1])[None]
    x_BTD, cache = model(params, x, positions_BT, cache, method="run")
    return cache, x_BTD
