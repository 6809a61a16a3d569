"""A model's programs compiled whole for a machine not at hand: memory, largest buffers, broken contracts."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxllm import contracts, hlo, hlo_cost, prediction, targets
from jaxllm.compile import Lowering, parse

_log = logging.getLogger(__name__)

DECODE = contracts.Contract()
PREFILL = contracts.Contract(temp_share=0.5)  # activations of a whole chunk
# For each layer, in a step and in a chunk of prefill; weights that are split over the batch are gathered one by one.
COLLECTIVES = {"tensor": (2, 2), "scatter": (2, 6), "sequence": (7, 10), "fully": (math.inf, math.inf)}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in memory that is neither argument nor on the chip. source: what it was traced from."""

    nbytes: int
    shape: str
    source: str


@dataclasses.dataclass(frozen=True)
class Examined:
    """One program, on each device. Bytes as of `prediction.Program`; reason: why it does not fit, "" where it does.

    ms_low, ms_high: of a run; a decode call of `compile.STEPS` steps counts as one step. bottleneck: as of a Candidate.
    buffers: the largest, largest first. breaches: of its contract.
    """

    name: str
    reason: str
    argument_bytes: float = 0.0
    temp_bytes: float = 0.0
    program_bytes: float = 0.0
    ms_low: float = 0.0
    ms_high: float = 0.0
    bottleneck: str = ""
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_s: float = 0.0
    buffers: tuple[Buffer, ...] = ()
    breaches: tuple[contracts.Breach, ...] = ()


def contract(program: str, rules: str) -> contracts.Contract | None:
    """What a program has to keep to. program: its name, as of `Lowering.serving`. rules: a key of `shard.TABLES`."""
    in_step, in_chunk = COLLECTIVES[rules]
    kind = parse(program)[0]
    if kind in ("decode", "step"):
        return dataclasses.replace(DECODE, collectives=in_step)
    return dataclasses.replace(PREFILL, collectives=in_chunk) if kind == "prefill" else None


def examine(
    programs: Mapping[str, tuple[Lowering, Any, contracts.Contract | None]], target: targets.Target | None
) -> tuple[list[Examined], dict[str, Any]]:
    """Compiles programs and tells what the compiler says of those that read weights; also returns those that fit.

    programs: by name, what each is of, itself, and its contract. target: None for a CPU or GPU, of which neither a time
        is predicted nor a contract checked; else what one of them runs on.
    """

    def one(name: str) -> tuple[Examined, Any]:
        lowering, program, contract = programs[name]
        _log.info("compiling %s for %s", name, target or "this machine")
        began = time.perf_counter()
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Examined(name, prediction.too_large(str(error))), None
        seconds = time.perf_counter() - began
        memory = compiled.memory_analysis()
        sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
        largest = tuple(sorted(_buffers(compiled), key=lambda b: -b.nbytes)[:5])
        if target is None or contract is None:
            return Examined(name, "", *sizes, compile_s=seconds, buffers=largest), compiled
        found = prediction.Program.of(compiled, seconds)
        low, high, bottleneck = prediction.interval(found, target)
        reason = f"needs {sum(sizes) / 1e9:.1f} GB" if sum(sizes) > target.chip.hbm_bytes else ""
        breaches = contracts.check(compiled, lowering.params, lowering.state, lowering.layers, contract)
        counts = dict(found.low.collectives)
        times = low * 1e3, high * 1e3, bottleneck
        return Examined(name, reason, *sizes, *times, counts, seconds, largest, tuple(breaches)), compiled

    with targets.uncached(), ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        made = dict(zip(programs, pool.map(one, programs), strict=True))
    found = [examined for name, (examined, _) in made.items() if name != "start"]
    return found, {name: compiled for name, (_, compiled) in made.items() if compiled is not None}


def _buffers(compiled: Any) -> Iterator[Buffer]:
    module = hlo.parse(compiled.as_text())
    for computation, i in module.executed():
        if i.op in ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional") or "-" in i.op:
            continue  # of starts and their ends, what they begin with lies elsewhere
        for shape, size in hlo_cost.written(module, i, module.computations[computation]):
            if size is None and shape.memory_bytes():
                yield Buffer(shape.memory_bytes(), f"{shape.dtype}{list(shape.dims)}", i.source)
