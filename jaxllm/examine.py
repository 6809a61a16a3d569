"""A model's programs compiled whole for a machine not at hand: memory, largest buffers, broken contracts."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxllm import contracts, hlo, hlo_cost, prediction, targets
from jaxllm.compile import STEPS
from jaxllm.config import ModelConfig
from jaxllm.stages import split

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


def examine(cfg: ModelConfig, case: prediction.Case) -> list[Examined]:
    """Compiles decode and prefill of every chunk length, from shapes alone; with stages, a step of each for decode.

    Raises ValueError when the mesh does not divide the model, or the format not its weights.
    """
    cfg = dataclasses.replace(cfg, kv_dtype=case.kv_dtype or cfg.kv_dtype)
    one, lowered = case.of_stage, {}
    in_step, in_chunk = COLLECTIVES[case.rules]
    for number, stage in enumerate(split(cfg, case.stages), 1):
        lower, where = one.lowering(stage), f"stage {number} " if case.stages > 1 else ""
        decode = lower.step() if case.stages > 1 else lower.decode(STEPS)
        lowered[f"{where}decode"] = lower, decode, dataclasses.replace(DECODE, collectives=in_step)
        contract = dataclasses.replace(PREFILL, collectives=in_chunk)
        lowered |= {f"{where}prefill {n}": (lower, lower.prefill(n), contract) for n in lower.chunks}

    def one_program(name: str) -> Examined:
        lower, program, contract = lowered[name]
        _log.info("compiling %s for %s", name, case.target)
        began = time.perf_counter()
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Examined(name, prediction.too_large(str(error)))
        seconds = time.perf_counter() - began
        found = prediction.Program.of(compiled, seconds)
        low, high, bottleneck = prediction.interval(found, one.target)
        need = found.argument_bytes + found.temp_bytes + found.program_bytes
        return Examined(
            name,
            "" if need <= case.target.chip.hbm_bytes else f"needs {need / 1e9:.1f} GB",
            found.argument_bytes,
            found.temp_bytes,
            found.program_bytes,
            low * 1e3,
            high * 1e3,
            bottleneck,
            dict(found.low.collectives),
            seconds,
            tuple(sorted(_buffers(compiled), key=lambda b: -b.nbytes)[:5]),
            tuple(contracts.check(compiled, lower.params, lower.state, lower.layers, contract)),
        )

    with targets.uncached(), ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        return list(pool.map(one_program, lowered))


def _buffers(compiled: Any) -> Iterator[Buffer]:
    module = hlo.parse(compiled.as_text())
    for computation, i in module.executed():
        if i.op in ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional") or "-" in i.op:
            continue  # of starts and their ends, what they begin with lies elsewhere
        for shape, size in hlo_cost.written(module, i, module.computations[computation]):
            if size is None and shape.memory_bytes():
                yield Buffer(shape.memory_bytes(), f"{shape.dtype}{list(shape.dims)}", i.source)
