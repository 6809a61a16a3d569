"""Programs compiled for machines that nobody has at hand: what they need and take, remembered on disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxllm import formats, hlo, hlo_cost, shard
from jaxllm.compile import Lowering
from jaxllm.config import ModelConfig
from jaxllm.hub import cache_dir
from jaxllm.lm import param_info
from jaxllm.params import Params, assign, unflatten
from jaxllm.stages import Stage, count_groups
from jaxllm.targets import Target
from jaxllm.transforms.quantize import default_rules

_log = logging.getLogger(__name__)

HOP_S = 1e-6  # from a chip to its neighbour: what a small collective waits for; an assumption


Kind = Literal["prefill", "step"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planned. format: of the weights, as for `quantize`; None for the config's dtype.

    data, model, share: the mesh, of each stage. kv_dtype: "int8" or None. batch: sequences in all. context: tokens of
    each. rules: a key of `shard.TABLES`. stages: of the layers, each on its part of the target's devices.
    """

    target: Target
    data: int
    model: int
    share: int
    format: str | None
    kv_dtype: str | None
    batch: int
    context: int
    rules: str = "tensor"
    stages: int = 1

    @property
    def groups(self) -> int:
        """In how many the batch runs."""
        return count_groups(self.batch, self.stages, self.data)

    @property
    def of_stage(self) -> Case:
        """The case of one stage, for one group. Raises ValueError where the target has no such parts."""
        return dataclasses.replace(
            self, target=self.target.part(self.stages), batch=self.batch // self.groups, stages=1
        )

    def lowering(self, stage: Stage) -> Lowering:
        """The programs of a stage, of a case of one."""
        mesh = shard.make_mesh(self.data, self.model, self.share, devices=self.target.devices())
        alone = dataclasses.replace(stage, layers=range(stage.cfg.num_layers))
        params = alone.params(abstract_params(stage.cfg, self.format))
        return Lowering(stage.cfg, params, self.batch, self.context, mesh, shard.TABLES[self.rules], part=stage.part)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, for each device. low, high: of a run.

    rest_*: the part of it that belongs to no layer, but to embedding, head and choosing.
    """

    argument_bytes: float
    temp_bytes: float
    program_bytes: float
    low: hlo_cost.Cost
    high: hlo_cost.Cost
    compile_s: float
    rest_argument_bytes: float
    rest_low: hlo_cost.Cost
    rest_high: hlo_cost.Cost

    @classmethod
    def of(cls, compiled: Any, compile_s: float) -> Program:
        memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
        rest = functools.partial(_of_no_layer, module.computations[module.entry])
        return cls(
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
            *hlo_cost.cost(module),
            compile_s,
            sum(i.shapes[0].nbytes for i in module.parameters.values() if rest(i)),
            *hlo_cost.cost(module, counts=rest),
        )

    def extend(self, times: float) -> Program:
        """With so many times the layers. Temporaries stay: layers run one after the other, in the same memory."""
        return dataclasses.replace(
            self,
            argument_bytes=self.rest_argument_bytes + (self.argument_bytes - self.rest_argument_bytes) * times,
            program_bytes=self.program_bytes * times,
            low=self.rest_low + (self.low + self.rest_low * -1) * times,
            high=self.rest_high + (self.high + self.rest_high * -1) * times,
        )


def _of_no_layer(entry: hlo.Computation, i: hlo.Instruction) -> bool:
    """What the compiler made up, such as a copy, belongs to what it is made from."""
    while not i.source and i.operands and i.operands[0] in entry:
        i = entry[i.operands[0]]
    return bool(i.source) and not re.search(r"\blayers?_\d|\bcache\.[kv]\[", i.source)


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
    counts = program.high.collectives.items()
    waiting = sum(count * (1 if kind == "collective-permute" else hops) for kind, count in counts) * HOP_S
    kernels = max(program.high.kernel_bytes / chip.memory_bytes_per_s, program.high.kernel_flops / chip.flops)
    cycles = program.high.cycles / chip.clock_hz + kernels
    most = max(cycles, high["memory"], high["matmul"]) + 2 * high["links"] + waiting
    return low[bottleneck], most, bottleneck


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


def weight_bytes(stage: Stage, case: Case) -> float:
    """Of one device of a stage."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(case.lowering(stage).params)
    )


def compiled(stage: Stage, case: Case, kind: Kind) -> Program | str:
    """From the cache or the compiler; a text where the compiler says that it cannot fit."""
    file = cache_dir() / "plan" / f"{_key(stage, case, kind)}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        return stored if isinstance(stored, str) else _from_json(stored)
    layers = stage.cfg.num_layers
    _log.info("plan: compiling %s of %d layers for %s, batch %d", kind, layers, case.target, case.batch)
    began = time.perf_counter()
    lower = case.lowering(stage)
    lowered = lower.step() if kind == "step" else lower.prefill(lower.chunks[-1])
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found: Program | str = too_large(str(error))
    else:
        found = Program.of(program, time.perf_counter() - began)
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
    costs: dict[str, Any] = {name: hlo_cost.Cost(**stored[name]) for name in ("low", "high", "rest_low", "rest_high")}
    return Program(**(stored | costs))


def _key(stage: Stage, case: Case, kind: Kind) -> str:
    """Of all that a compiled program depends on, this package's own text included."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    part = dataclasses.asdict(stage.cfg), dataclasses.asdict(stage.part)
    what = [part, dataclasses.asdict(case), kind, versions, _source()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
