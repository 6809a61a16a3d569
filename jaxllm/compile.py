"""A model's shapes and a mesh to compiled programs, ahead of time. No weight is needed, nor touched."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxllm import cache as kv
from jaxllm import kernels, shard, targets
from jaxllm.arrays import Contract
from jaxllm.cache import Entries, KVCache, LayerCache, init_cache
from jaxllm.config import ModelConfig
from jaxllm.hub import cache_dir
from jaxllm.models.decoder import Decoder, Write, residual_axes
from jaxllm.params import Params
from jaxllm.sample import Likeliest, Sampling, SamplingArrays, as_arrays, likeliest, next_token

CHUNKS = (16, 64, 256)  # tokens of a prompt that one prefill call takes; the smallest that fits is used
DONATING = ("prefill", "decode", "step")  # programs that are given the state, their second argument
STEPS = 8  # tokens that one decode call yields, at most

# A weight is fetched onto the chip in one piece: with each of several pieces comes a table of 16 KiB in memory, which
# were most of a decode step's temporaries.
_TPU_OPTIONS = {"xla_tpu_sliced_prefetch_max_slices": "0"}
_log = logging.getLogger(__name__)


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

    @classmethod
    def of(cls, compiled: Mapping[str, Any], batch: int, slots: int) -> Programs:
        """compiled: by the names of `Lowering.serving`."""
        each = {name: parse(name) for name in compiled}
        prefill = {size: compiled[name] for name, (kind, size) in each.items() if kind == "prefill"}
        decode = next(compiled[name] for name, (kind, _) in each.items() if kind == "decode")
        return cls(batch, slots, compiled["start"], prefill, decode)


def parse(name: str) -> tuple[str, int]:
    """("prefill", 16) of a program's name "prefill 16"; a size of 0 where it has none."""
    kind, _, size = name.partition(" ")
    return kind, int(size or 0)


@functools.cache
def _options(everywhere: NamedSharding | None) -> dict[str, str] | None:
    """What the compiler for these devices is told; None for the default device."""
    platform = jax.default_backend() if everywhere is None else next(iter(everywhere.device_set)).platform
    if platform != "tpu":
        return None
    try:
        with targets.uncached():
            jax.jit(lambda: jnp.int32(0), out_shardings=everywhere, compiler_options=_TPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        _log.warning("This TPU compiler does not know %s: temporaries will be larger.", ", ".join(_TPU_OPTIONS))
        return None
    return _TPU_OPTIONS


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
    lowered = lower.serving(steps)
    with ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    return Programs.of(compiled, batch, lower.slots)


def prefill_chunks(max_len: int) -> list[int]:
    return [size for size in CHUNKS if size < max_len] or [CHUNKS[0]]


def cache_slots(max_len: int) -> int:
    """max_len in whole chunks."""
    largest = prefill_chunks(max_len)[-1]
    return -(-max_len // largest) * largest


class Lowering:
    """A model's programs, traced for a batch, length and mesh: each method returns one, to be compiled.

    Arguments and errors as of `compile_programs`. The mesh's devices need not be at hand. platform: "cpu", "tpu" or
    another, where no mesh tells; "any" for programs that are to run on all. params and state: shapes and shardings of
    the first two arguments of most programs.

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
        platform: str | None = None,
        part: Part = WHOLE,
    ):
        for name, value in {"batch": batch, "max_len": max_len}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")
        self.chunks, self.slots = prefill_chunks(max_len), cache_slots(max_len)
        if mesh is not None:
            shard.check_mesh(cfg, mesh, batch, rules, self.slots)
            platform = mesh.devices.flat[0].platform
        self.layers = cfg.num_layers
        self._cfg, self._batch, self._part = cfg, batch, part
        self._sharded = sharded = _Shardings(cfg, mesh, rules)
        platform = platform or jax.default_backend()
        split = platform == "cpu"
        self._make_state = functools.partial(_start if part.predicts else init_cache, cfg, batch, self.slots, split)
        self.state = sharded.abstract(jax.eval_shape(self._make_state), sharded.state(split, part))
        self.params = sharded.abstract(params, sharded.params(params))
        write = functools.partial(kv.write, keep_layout=platform == "tpu")
        decoder = Decoder(cfg, write=write) if mesh is None else Decoder(cfg, sharded.constrain, sharded.write(write))
        fast = kernels.choose(self.params, platform, shard.axes_of(rules["batch"]))
        self._model = _Model(decoder, fast, likeliest if mesh is None else sharded.likeliest)
        self._probes = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in shard.axes_of(rules["batch"]))

    def serving(self, steps: int = STEPS) -> dict[str, Any]:
        """What generation needs, by name: "start", "prefill 16", …, "decode 8"."""
        return {name: self._lower(*parse(name)) for name in self.names(steps)}

    def names(self, steps: int = STEPS) -> list[str]:
        return ["start", f"decode {steps}", *(f"prefill {chunk}" for chunk in self.chunks)]

    def start(self) -> Any:
        return self._lower("start")

    def prefill(self, chunk: int) -> Any:
        return self._lower("prefill", chunk)

    def decode(self, steps: int) -> Any:
        return self._lower("decode", steps)

    def step(self) -> Any:
        """One decode step without the loop around it: what `decode` does over and over."""
        return self._lower("step")

    def probe(self, length: int) -> Any:
        """(params, tokens [R, length]) -> float32 logits [R, length, V]; no cache. R: how often the batch is split."""
        return self._lower("probe", length)

    def function(self, kind: str, size: int = 0) -> Callable[..., Any]:
        """A program before it is traced. kind: a method's name; size: its argument."""
        if not self._part.predicts and kind != "start":
            return functools.partial(_run, self._model)
        return {
            "start": self._make_state,
            "prefill": functools.partial(_prefill, self._model),
            "decode": functools.partial(_decode, self._model, size),
            "step": functools.partial(_step, self._model),
            "probe": functools.partial(_probe, self._model),
        }[kind]

    def signature(self, kind: str, size: int = 0) -> tuple[tuple[Any, ...], Any]:
        """Shapes and shardings of what a program takes and gives. The state, where it is taken, is donated."""
        row, number = self._array("batch", shape=(self._batch,)), self._array()
        tokens = self._array("batch", None, shape=(self._batch, size))
        before = () if self._part.embeds else (self.stream(size or 1),)
        if not self._part.predicts and kind != "start":
            x = before or ((tokens if size else row),)
            return (self.params, self.state, *x, row), (self.state, self.stream(size or 1))
        if kind == "probe":
            shape = (self._probes, size)
            logits = self._array(None, None, None, shape=(*shape, self._cfg.vocab_size), dtype="float32")
            return (self.params, self._array("batch", None, shape=shape)), logits
        how = jax.eval_shape(lambda: as_arrays(Sampling(), frozenset()))
        how = jax.tree.map(lambda x: self._array(*(None,) * x.ndim, shape=x.shape, dtype=x.dtype), how)
        # What the host reads is on all devices, where some belong to other processes.
        read = None if shard.across_hosts(self._sharded.mesh) else "batch"
        new_B, new_BN = self._array(read, shape=(self._batch,)), self._array(read, None, shape=(self._batch, size))
        return {
            "start": ((), self.state),
            "prefill": ((self.params, self.state, tokens, number, row, row, how, *before), (self.state, new_B)),
            "decode": ((self.params, self.state, number, how), (self.state, new_BN)),
            "step": ((self.params, self.state, how, *before), (self.state, new_B)),
        }[kind]

    def stream(self, length: int) -> jax.ShapeDtypeStruct:
        """The residual stream, as stages give it to each other."""
        shape = (self._batch, length, self._cfg.embed_dim)
        return self._array(*residual_axes(length), shape=shape, dtype=self._cfg.dtype)

    def _array(self, *axes: str | None, shape: tuple[int, ...] = (), dtype: Any = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._sharded.of(*axes))

    def _lower(self, kind: str, size: int = 0) -> Any:
        program = self.function(kind, size)
        arguments, results = self.signature(kind, size)
        donated = 1 if kind in DONATING else ()
        shardings = None if self._sharded.mesh is None else jax.tree.map(lambda x: x.sharding, results)
        jitted = jax.jit(
            program,
            donate_argnums=donated,
            keep_unused=True,  # what a program takes is its signature
            out_shardings=shardings,
            compiler_options=_options(self._sharded.of()),
        )
        return jitted.lower(*arguments)


@dataclasses.dataclass(frozen=True)
class _Shardings:
    """The rule table applied to what the programs take and give; all None without a mesh."""

    cfg: ModelConfig
    mesh: Mesh | None
    rules: shard.Rules = dataclasses.field(hash=False)

    def of(self, *axes: str | None) -> Any:
        return None if self.mesh is None else shard.sharding(self.mesh, self.rules, *axes)

    def params(self, params: Params) -> Any:
        return None if self.mesh is None else shard.param_shardings(self.cfg, params, self.mesh, self.rules)

    def state(self, split: bool, part: Part) -> Any:
        if self.mesh is None:
            return None
        row = self.of("batch")
        cache = shard.cache_shardings(self.cfg, self.mesh, split, self.rules)
        return State(cache, row, row, row, row, self.of("batch", "vocab")) if part.predicts else cache

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins an array with these logical axes; left free, propagation may split it and pay with collectives."""
        assert self.mesh is not None
        return lax.with_sharding_constraint(x, shard.sharding(self.mesh, self.rules, *axes))

    def write(self, write: Callable[..., LayerCache]) -> Write:
        """As `kv.write`, which is given. A token of each row is written by the devices that have the row, each for its
        own heads and slots: the partitioner would send every row to all."""
        slot_axes = shard.axes_of(self.rules["slots"])
        old, new, row = self.of("batch", "kv_heads", "slots"), self.of("batch", None, "kv_heads"), self.of("batch")
        specs = [sharding.spec for sharding in (old, old, new, new, row)]

        def local(
            k: Entries, v: Entries, new_k: Entries, new_v: Entries, positions: jax.Array
        ) -> tuple[Entries, Entries]:
            slots = jax.tree.leaves(v)[0].shape[2]
            first_slot = lax.axis_index(slot_axes) * slots if slot_axes else None
            written = write(LayerCache(k, v, False), new_k, new_v, positions, first_slot)
            return written.k, written.v

        def over_mesh(
            past: LayerCache, new_k_BTKH: Entries, new_v_BTKH: Entries, positions_BT: jax.Array
        ) -> LayerCache:
            if positions_BT.shape[1] > 1:
                return kv.write(past, new_k_BTKH, new_v_BTKH, positions_BT)
            put = jax.shard_map(local, mesh=self.mesh, in_specs=tuple(specs), out_specs=(old.spec, old.spec))
            return LayerCache(*put(past.k, past.v, new_k_BTKH, new_v_BTKH, positions_BT), split=False)

        return over_mesh

    def likeliest(self, logits_BV: jax.Array) -> jax.Array:
        """As `sample.likeliest`, with one exchange: each device gives the best of its part of the vocabulary."""
        axes = shard.axes_of(self.rules["vocab"])
        if not axes:
            return likeliest(logits_BV)

        def local(logits_Bv: jax.Array) -> jax.Array:
            best_B, at_B = jnp.max(logits_Bv, axis=-1), likeliest(logits_Bv)
            at_B += lax.axis_index(axes) * logits_Bv.shape[1]
            both_CB2 = lax.all_gather(jnp.stack([lax.bitcast_convert_type(best_B, jnp.int32), at_B], axis=-1), axes)
            first_B = likeliest(lax.bitcast_convert_type(both_CB2[..., 0], jnp.float32).T)
            return both_CB2[first_B, jnp.arange(len(first_B)), 1]

        row = self.of("batch").spec
        # Every device finds the same, which the types do not say.
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=self.of("batch", "vocab").spec, out_specs=row, check_vma=False
        )(logits_BV)

    def abstract(self, tree: Any, shardings: Any) -> Any:
        """The shapes and types of `tree`, with these shardings where there is a mesh."""
        if self.mesh is None:
            return jax.eval_shape(lambda tree: tree, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _start(cfg: ModelConfig, batch: int, slots: int, split: bool) -> State:
    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros((batch, *shape), dtype)  # a buffer each: all are donated

    cache = init_cache(cfg, batch, slots, split)
    return State(cache, zeros(), zeros(), zeros(), zeros(dtype=bool), zeros(cfg.vocab_size, dtype=bool))


@dataclasses.dataclass(frozen=True)
class _Model:
    """A decoder, and what stands for parts of it on the platform and mesh that it is traced for.

    kernels: that contract its weights. likeliest: as of `next_token`.
    """

    decoder: Decoder
    kernels: Mapping[str, Contract]
    likeliest: Likeliest

    def __call__(self, params: Params, *args: jax.Array | KVCache, method: str | None = None) -> tuple[jax.Array, Any]:
        params = kernels.equip(params, self.kernels)
        return self.decoder.apply({"params": params}, *args, method=method)  # pyright: ignore[reportReturnType]


def _probe(model: _Model, params: Params, tokens_RT: jax.Array) -> jax.Array:
    positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1]), tokens_RT.shape)
    return model(params, tokens_RT, positions_RT)[0]


def _prefill(
    model: _Model,
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
    seen_BV = state.seen_BV.at[rows_B[:, None], tokens_BC].max(positions_BC < lengths_B[:, None])
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


def _decode(
    model: _Model, steps: int, params: Params, state: State, limit: jax.Array, how: SamplingArrays
) -> tuple[State, jax.Array]:
    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        step, state, _ = carry
        return (step < jnp.minimum(limit, steps)) & ~jnp.all(state.done_B)

    def advance(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        step, state, out_BN = carry
        state, token_B = _step(model, params, state, how)
        return step + 1, state, lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)

    out_BN = jnp.full((state.token_B.shape[0], steps), -1, jnp.int32)
    _, state, out_BN = lax.while_loop(unfinished, advance, (jnp.int32(0), state, out_BN))
    return state, out_BN


def _step(
    model: _Model, params: Params, state: State, how: SamplingArrays, x_B1D: jax.Array | None = None
) -> tuple[State, jax.Array]:
    """The next token of each row; -1 where the row has ended."""
    x = state.token_B[:, None] if x_B1D is None else x_B1D
    logits_B1V, cache = model(params, x, state.position_B[:, None], state.cache)
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


def _run(
    model: _Model, params: Params, cache: KVCache, x: jax.Array, position_B: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Layers whose result others go on with. x: tokens, [B] or [B, T], or the residual stream [B, T, D]."""
    x = x[:, None] if x.ndim == 1 else x
    positions_BT = position_B[:, None] + jnp.arange(x.shape[1])[None]
    x_BTD, cache = model(params, x, positions_BT, cache, method="run")
    return cache, x_BTD
