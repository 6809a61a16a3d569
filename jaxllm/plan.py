"""What a model would need and do on machines that nobody has at hand: compiled for them, never run.

A decode step and a chunk of prefill are compiled by the target's own compiler, from shapes alone, and its program is
read. Models of many layers are compiled with a few, twice, and their layers' cost is extended: unrolled layers cost the
same each. `exact=True` compiles all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import formats, hlo, hlo_cost, shard, targets
from jaxllm.compile import CHUNKS, Lowering
from jaxllm.config import WIDTHS, ModelConfig
from jaxllm.hub import cache_dir
from jaxllm.lm import param_info
from jaxllm.params import Params, assign, unflatten
from jaxllm.targets import Target
from jaxllm.transforms.quantize import default_rules

_log = logging.getLogger(__name__)

FEW_LAYERS = (4, 8)  # with fewer, caches stay on the chip that would not in a whole model
HOP_S = 1e-6  # from a chip to its neighbour: what a small collective waits for; an assumption


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planned. format: of the weights, as for `quantize`; None for the config's dtype.

    data, model, share: the mesh. kv_dtype: "int8" or None. batch: sequences in all. context: tokens of each.
    """

    target: Target
    data: int
    model: int
    share: int
    format: str | None
    kv_dtype: str | None
    batch: int
    context: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, for each device. low, high: of a run."""

    argument_bytes: float
    temp_bytes: float
    program_bytes: float
    low: hlo_cost.Cost
    high: hlo_cost.Cost
    compile_s: float

    @classmethod
    def of(cls, compiled: Any, compile_s: float) -> Program:
        memory = compiled.memory_analysis()
        low, high = hlo_cost.cost(hlo.parse(compiled.as_text()))
        code = memory.generated_code_size_in_bytes
        return cls(memory.argument_size_in_bytes, memory.temp_size_in_bytes, code, low, high, compile_s)

    def extend(self, other: Program, times: float) -> Program:
        """self, and `times` what `other` is more."""

        def along(a: float, b: float) -> float:
            return a + (b - a) * times

        return Program(
            along(self.argument_bytes, other.argument_bytes),
            max(self.temp_bytes, other.temp_bytes),  # layers run one after the other, in the same memory
            along(self.program_bytes, other.program_bytes),
            self.low + (other.low + self.low * -1) * times,
            self.high + (other.high + self.high * -1) * times,
            self.compile_s + (other.compile_s if other is not self else 0.0),
        )


_NOTHING = Program(math.nan, math.nan, 0.0, hlo_cost.Cost(), hlo_cost.Cost(), 0.0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A prediction, for a device where bytes are given and for the whole slice where tokens are.

    fits: whether arguments, temporaries and program go into hbm_bytes. reason: why not; "" where it does.
    step_ms: of a decode step with a full cache, one token for each sequence. The low end is the roofline: what memory,
        matmul units or links need at their peak. The high end takes the compiler's cycles, of kernels their roofline,
        and a delay for each collective. bottleneck: what makes the low end.
    ttft_ms: of `prompt_tokens`, all sequences of the batch at once.
    tokens_per_s: of all sequences together. cost: for a million new tokens, at a price for a chip and hour.
    largest_batch: at this context, estimated from what a sequence more takes.
    layers: how many were compiled, of how many.
    """

    target: str
    chips: int
    mesh: dict[str, int]
    quantize: str | None
    kv_dtype: str | None
    batch: int
    context: int
    fits: bool
    reason: str
    hbm_bytes: float
    argument_bytes: float
    temp_bytes: float
    program_bytes: float
    step_ms_low: float
    step_ms_high: float
    bottleneck: str
    prompt_tokens: int
    ttft_ms_low: float
    ttft_ms_high: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    cost_low: float | None
    cost_high: float | None
    largest_batch: int
    memory_bytes: float
    flops: float
    collectives: dict[str, int]
    collective_bytes: float
    compile_s: float
    layers: tuple[int, int]


def meshes(cfg: ModelConfig, target: Target, batch: int) -> Iterator[tuple[int, int, int]]:
    """(data, model, share) of the meshes of all of a slice's devices that divide the model and the batch.

    Of those with as many devices a copy, only that in which the fewest share KV heads.
    """
    devices = target.devices()
    for copy in (n for n in range(len(devices), 0, -1) if len(devices) % n == 0):
        for share in (n for n in range(1, copy + 1) if copy % n == 0):
            try:
                sizes = len(devices) // copy, copy // share, share
                shard.check_mesh(cfg, shard.make_mesh(*sizes, devices=devices), batch)
            except ValueError:
                continue
            yield sizes
            break


def abstract_params(cfg: ModelConfig, format: str | None) -> Params:
    """The shapes of a model's weights, quantised as `quantize(format)` would. Raises ValueError as that does."""
    info = param_info(cfg)
    chosen = assign(default_rules(format), info) if format else {}
    leaves: dict[str, Any] = {}
    for path, entry in info.items():
        weight = jax.ShapeDtypeStruct(entry.shape, jnp.dtype(cfg.dtype))
        name = chosen.get(path)
        if name is None:
            leaves[path] = weight
        else:
            fmt = formats.parse(name)
            formats.check_group(fmt, entry.shape, entry.contracted, path)
            leaves[path] = jax.eval_shape(lambda w, c=entry.contracted, f=fmt: formats.quantize(w, c, f), weight)
    return unflatten(leaves)


def predict(
    cfg: ModelConfig, case: Case, prompt_tokens: int = 512, price: float | None = None, exact: bool = False
) -> Candidate:
    """Compiles one case and predicts it. price: of a chip for an hour. exact: compile all layers.

    Raises ValueError when the mesh does not divide the model, or the format not its weights.
    """
    cfg = dataclasses.replace(cfg, kv_dtype=case.kv_dtype or cfg.kv_dtype)
    uniform = not any(isinstance(getattr(cfg, name), tuple) for name in WIDTHS)
    few = FEW_LAYERS if uniform and not exact and cfg.num_layers > FEW_LAYERS[1] else (cfg.num_layers,)
    each = [(kind, dataclasses.replace(cfg, num_layers=layers)) for kind in ("prefill", "step") for layers in few]
    with targets.uncached(), ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        made = list(pool.map(lambda one: _compiled(one[1], case, one[0]), each))
    reason = next((one for one in made if isinstance(one, str)), "")
    programs: dict[str, Program] = {"prefill": _NOTHING, "step": _NOTHING}
    if not reason:
        times = (cfg.num_layers - few[0]) / (few[-1] - few[0]) if len(few) > 1 else 0.0
        for n, kind in enumerate(programs):
            first, last = made[n * len(few)], made[(n + 1) * len(few) - 1]
            assert isinstance(first, Program)
            assert isinstance(last, Program)
            programs[kind] = first.extend(last, times)
    return _candidate(cfg, case, programs, reason, prompt_tokens, price, few[-1])


def _candidate(
    cfg: ModelConfig,
    case: Case,
    programs: dict[str, Program],
    reason: str,
    prompt_tokens: int,
    price: float | None,
    layers: int,
) -> Candidate:
    chip, step, prefill = case.target.chip, programs["step"], programs["prefill"]
    temp = max(step.temp_bytes, prefill.temp_bytes)
    code = step.program_bytes + prefill.program_bytes
    need = step.argument_bytes + temp + code
    if not reason and need > chip.hbm_bytes:
        reason = f"needs {need / 1e9:.1f} GB of {chip.hbm_bytes / 1e9:.1f}"
    low, high, bottleneck = interval(step, case.target)
    chunks = math.ceil(prompt_tokens / CHUNKS[-1])
    first_low, first_high, _ = interval(prefill, case.target)
    rates = sorted((case.batch / high if high else 0.0, case.batch / low if low else 0.0))
    costs: list[float | None] = [None, None]
    if price is not None and rates[0]:
        costs = [price * case.target.chips / 3600 / rate * 1e6 for rate in reversed(rates)]
    weights = _weight_bytes(cfg, case)
    row = (step.argument_bytes - weights + temp) / case.batch
    room = (chip.hbm_bytes - weights - code) / row if row and not math.isnan(row) else 0
    return Candidate(
        target=str(case.target),
        chips=case.target.chips,
        mesh={"data": case.data, "model": case.model, "share": case.share},
        quantize=case.format,
        kv_dtype=cfg.kv_dtype,
        batch=case.batch,
        context=case.context,
        fits=not reason,
        reason=reason,
        hbm_bytes=chip.hbm_bytes,
        argument_bytes=step.argument_bytes,
        temp_bytes=temp,
        program_bytes=code,
        step_ms_low=low * 1e3,
        step_ms_high=high * 1e3,
        bottleneck=bottleneck,
        prompt_tokens=prompt_tokens,
        ttft_ms_low=first_low * chunks * 1e3,
        ttft_ms_high=first_high * chunks * 1e3,
        tokens_per_s_low=rates[0],
        tokens_per_s_high=rates[1],
        cost_low=costs[0],
        cost_high=costs[1],
        largest_batch=max(0, int(room) // case.data * case.data),
        memory_bytes=step.low.memory_bytes,
        flops=step.low.flops,
        collectives=dict(step.low.collectives),
        collective_bytes=step.low.collective_bytes,
        compile_s=step.compile_s + prefill.compile_s,
        layers=(layers, cfg.num_layers),
    )


def interval(program: Program, target: Target) -> tuple[float, float, str]:
    """Seconds of a run, least and most, and what makes the least."""
    chip = target.chip

    def floors(cost: hlo_cost.Cost) -> dict[str, float]:
        links = sum(size > 1 for size in target.grid)
        return {
            "memory": cost.memory_bytes / chip.memory_bytes_per_s,
            "matmul": (cost.flops - cost.int8_flops) / chip.flops + cost.int8_flops / chip.int8_flops,
            "links": cost.wire_bytes / (chip.link_bytes_per_s * 2 * links) if links else 0.0,
        }

    low, high = floors(program.low), floors(program.high)
    bottleneck = max(low, key=low.__getitem__)
    hops = 2 * sum(size // 2 for size in target.grid if size > 1)  # there and back around a ring, both ways at once
    waiting = sum(program.high.collectives.values()) * hops * HOP_S
    kernels = max(program.high.kernel_bytes / chip.memory_bytes_per_s, program.high.kernel_flops / chip.flops)
    cycles = program.high.cycles / chip.clock_hz + kernels
    most = max(cycles, high["memory"], high["matmul"]) + 2 * high["links"] + waiting
    return low[bottleneck], most, bottleneck


def _weight_bytes(cfg: ModelConfig, case: Case) -> float:
    """Of one device."""
    mesh = shard.make_mesh(case.data, case.model, case.share, devices=case.target.devices())
    params = abstract_params(cfg, case.format)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shard.param_shardings(cfg, params, mesh)), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
        for leaf, sharding in pairs
    )


def _compiled(cfg: ModelConfig, case: Case, kind: str) -> Program | str:
    """From the cache or the compiler; a text where the compiler says that it cannot fit."""
    file = cache_dir() / "plan" / f"{_key(cfg, case, kind)}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        return stored if isinstance(stored, str) else _from_json(stored)
    _log.info("plan: compiling %s of %d layers for %s, batch %d", kind, cfg.num_layers, case.target, case.batch)
    began = time.perf_counter()
    mesh = shard.make_mesh(case.data, case.model, case.share, devices=case.target.devices())
    lower = Lowering(cfg, abstract_params(cfg, case.format), case.batch, case.context, mesh)
    lowered = lower.step() if kind == "step" else lower.prefill(lower.chunks[-1])
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found: Program | str = too_large(str(error))
    else:
        found = Program.of(compiled, time.perf_counter() - began)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(found if isinstance(found, str) else dataclasses.asdict(found)))
    half.replace(file)
    return found


def too_large(message: str) -> str:
    used = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    used = used or re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])", message)
    return f"needs {used[1]}iB of {used[2]}iB" if used else "the compiler says that it does not fit"


def _from_json(stored: dict[str, Any]) -> Program:
    costs: dict[str, Any] = {end: hlo_cost.Cost(**stored[end]) for end in ("low", "high")}
    return Program(**(stored | costs))


def _key(cfg: ModelConfig, case: Case, kind: str) -> str:
    """Of all that a compiled program depends on, this package's own text included."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    what = [dataclasses.asdict(cfg), dataclasses.asdict(case), kind, versions, _source()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def sweep(
    cfg: ModelConfig,
    slices: Sequence[Target],
    formats: Sequence[str | None],
    batches: Sequence[int],
    contexts: Sequence[int],
    kv_dtype: str | None = None,
    prompt_tokens: int = 512,
    price: float | None = None,
    exact: bool = False,
    every_mesh: bool = False,
) -> Iterator[Candidate]:
    """Every slice with every format, batch and context, one by one as they are compiled.

    every_mesh: with each mesh that divides model and batch, not only the one that splits a copy of the model most.
    """
    for target in slices:
        for format in formats:
            for batch in batches:
                for context in contexts:
                    for mesh in itertools.islice(meshes(cfg, target, batch), None if every_mesh else 1):
                        case = Case(target, *mesh, format, kv_dtype, batch, context)
                        yield predict(cfg, case, prompt_tokens, price, exact)


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit the one with the most tokens per second and chip, by the slower end."""
    fitting = [c for c in candidates if c.fits]
    return max(fitting, key=lambda c: c.tokens_per_s_low / c.chips, default=None)
