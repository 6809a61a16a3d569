"""How fast a compiled model is, and how fast this machine would let it be."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generate import Engine
from jaxllm.sample import Sampling, as_arrays


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians over the rounds.

    ttft_ms: from the prompt's tokens on the host to the first new token on the host.
    step_ms: a decode step, which yields one token for each row of the batch; spread is (slowest - fastest) / median.
    bandwidth_use: bytes that a device has to read for a step, over its time, over its read bandwidth (MBU).
    """

    ttft_ms: float
    step_ms: float
    step_spread: float
    tokens_per_s: float
    bandwidth_use: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: `rounds` times a prompt and greedy decoding of new tokens, after one time to warm up.

    new_tokens: at least 2, because the first comes from prefill. max_len: what the engines are compiled for.
    """

    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5
    batch: int = 1
    max_len: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 2 if field.name == "new_tokens" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; expected at least {least}.")
        if self.prompt_tokens + self.new_tokens > self.max_len:
            raise ValueError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones do not fit max_len={self.max_len}."
            )


def measure(
    engines: Mapping[str, Engine], work: Workload, read_gb_s: float, log: Callable[[str], None] = lambda _: None
) -> dict[str, Speed]:
    """Times engines that were compiled for the workload's batch and max_len, in interleaved rounds.

    read_gb_s: from `read_bandwidth`.
    """
    ttft: dict[str, list[float]] = {name: [] for name in engines}
    step: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(work.rounds + 1):
        log(f"timing round {number} of {work.rounds}" if number else "warming up")
        for name, engine in engines.items():
            first_s, rest_s = _time(engine, work)
            if number:
                ttft[name].append(first_s * 1e3)
                step[name].append(rest_s * 1e3 / (work.new_tokens - 1))
    speeds = {}
    for name, engine in engines.items():
        step_ms = float(np.median(step[name]))
        speeds[name] = Speed(
            ttft_ms=float(np.median(ttft[name])),
            step_ms=step_ms,
            step_spread=(max(step[name]) - min(step[name])) / step_ms,
            tokens_per_s=work.batch * 1e3 / step_ms,
            bandwidth_use=engine.step_bytes / (step_ms * 1e-3) / (read_gb_s * 1e9),
        )
    return speeds


def _time(engine: Engine, work: Workload) -> tuple[float, float]:
    """Seconds to the first token and from there to the last."""
    prompt = (np.arange(work.prompt_tokens) * 7919 % engine.cfg.vocab_size).tolist()
    start = time.perf_counter()
    blocks = engine.token_blocks([prompt] * work.batch, work.new_tokens, as_arrays(Sampling(), frozenset()))
    next(blocks)
    first = time.perf_counter()
    for _ in blocks:
        pass
    return first - start, time.perf_counter() - first


@functools.cache
def read_bandwidth(megabytes: int | None = None) -> float:
    """The rate at which the default device reads memory, in GB (1e9 bytes) a second: the best of several ways to read.

    megabytes: read each time; by default more than any cache holds. Takes about a second on a CPU.
    """
    on_cpu = jax.default_backend() == "cpu"
    megabytes = megabytes or (512 if on_cpu else 1024)
    calls = 1 if on_cpu else 16  # an accelerator starts the next while it works, and the host's part is not counted
    rows = megabytes * 1024 * 1024 // 4 // 4096
    x = jax.jit(lambda: jnp.ones((rows, 4096), jnp.float32))()
    v = jnp.ones(4096, jnp.float32)
    ways = [
        jax.jit(lambda x, v: x @ v),
        jax.jit(lambda x, v: jnp.max(x) + v[0]),
        jax.jit(lambda x, v: jnp.sum(x) + v[0]),
    ]
    best = 0.0
    for way in ways:
        jax.block_until_ready(way(x, v))
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready([way(x, v) for _ in range(calls)])
            best = max(best, calls * x.nbytes / (time.perf_counter() - start) / 1e9)
    return best


@functools.cache
def matmul_rate(dtype: str = "float32") -> float:
    """FLOPs a second of the default device's matmuls in a type, sustained: the best median of a few sizes.

    Sums come out in float32, which is what XLA on CPU has a fast kernel of bfloat16 for. Takes a second on a CPU.
    """
    best = 0.0
    for size in (1024, 2048):
        x = jax.jit(lambda size=size: jnp.ones((size, size), dtype))()
        multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        jax.block_until_ready(multiply(x))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(multiply(x))
            times.append(time.perf_counter() - start)
        best = max(best, 2.0 * size**3 / statistics.median(times))
    return best
