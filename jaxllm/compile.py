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
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxllm import activations, kernels, programs, shard, targets
from jaxllm import cache as kv
from jaxllm.activations import Activations
from jaxllm.cache import Entries, LayerCache, init_cache
from jaxllm.config import ModelConfig
from jaxllm.hub import cache_dir
from jaxllm.kernels import cpu, gpu
from jaxllm.models.decoder import Decoder, Write, residual_axes
from jaxllm.params import Params
from jaxllm.sample import Sampling, SamplingArrays, as_arrays, likeliest, likeliest_only

CHUNKS = (16, 64, 256)  # tokens of a prompt that one prefill call takes; the smallest that fits is used
DONATING = ("prefill", "decode", "greedy", "step")  # programs that are given the state, their second argument
STEPS = 8  # tokens that one decode call yields, at most

# A weight is fetched onto the chip in one piece: with each of several pieces comes a table of 16 KiB in memory, which
# were most of a decode step's temporaries.
_TPU_OPTIONS = {"xla_tpu_sliced_prefetch_max_slices": "0"}
_log = logging.getLogger(__name__)


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
        for name, (kind, size) in each.items():
            if kind == "greedy":
                decode = functools.partial(_decode, compiled[name], size, decode)
        return cls(batch, slots, compiled["start"], prefill, decode)


def _decode(
    greedy: Callable[..., Any],
    steps: int,
    decode: Callable[..., Any],
    params: Params,
    state: Any,
    limit: np.int32,
    how: SamplingArrays,
) -> Any:
    """By the faster program, where it does the same."""
    return (greedy if limit >= steps and likeliest_only(how) else decode)(params, state, limit, how)


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
        native = platform == "cpu" and mesh is None and cpu.library() is not None
        self._on_gpu = on_gpu = platform == "gpu" and mesh is None and gpu.runs(jax.devices()[0])
        split = platform == "cpu" and not native
        make_state = programs.start if part.predicts else init_cache
        self._make_state = functools.partial(make_state, cfg, batch, self.slots, split)
        self.state = sharded.abstract(jax.eval_shape(self._make_state), sharded.state(split, part))
        self.params = sharded.abstract(params, sharded.params(params))
        write = functools.partial(kv.write, keep_layout=platform == "tpu")
        if mesh is not None:
            decoder, choose_token = Decoder(cfg, sharded.constrain, sharded.write(write)), sharded.likeliest
        elif native:
            decoder, choose_token = Decoder(cfg, attend=cpu.attend), cpu.likeliest
        elif on_gpu:
            from jaxllm.kernels.gpu import attention  # with Pallas, whose import others need not wait for

            decoder, choose_token = Decoder(cfg, attend=attention.attend), likeliest
        else:
            decoder, choose_token = Decoder(cfg, write=write), likeliest
        chooses = native or on_gpu or platform == "tpu"
        fast = kernels.choose(self.params, platform, shard.axes_of(rules["batch"])) if chooses else {}
        self._model = programs.Model(decoder, fast, "cuda" if on_gpu else platform, choose_token)
        self._probes = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in shard.axes_of(rules["batch"]))

    def serving(self, steps: int = STEPS) -> dict[str, Any]:
        """What generation needs, by name: "start", "prefill 16", …, "decode 8"; with a GPU's kernels "greedy 8"."""
        return {name: self._lower(*parse(name)) for name in self.names(steps)}

    def names(self, steps: int = STEPS) -> list[str]:
        greedy = [f"greedy {steps}"] if self._on_gpu else []
        return ["start", f"decode {steps}", *greedy, *(f"prefill {chunk}" for chunk in self.chunks)]

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
            return functools.partial(programs.run, self._model)
        return {
            "start": self._make_state,
            "prefill": functools.partial(programs.prefill, self._model),
            "decode": functools.partial(programs.decode, self._model, size),
            "greedy": functools.partial(programs.greedy, self._model, size),
            "step": functools.partial(programs.step, self._model),
            "probe": functools.partial(programs.probe, self._model),
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
            "greedy": ((self.params, self.state, number, how), (self.state, new_BN)),
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
        return programs.State(cache, row, row, row, row, self.of("batch", "vocab")) if part.predicts else cache

    def constrain(self, x: Activations, *axes: str | None) -> jax.Array:
        """Pins activations with these logical axes; left free, propagation may split it and pay with collectives."""
        assert self.mesh is not None
        x = activations.value(x)
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
