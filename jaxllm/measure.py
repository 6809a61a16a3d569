"""How fast a compiled model is, and how fast this machine would let it be."""

from __future__ import annotations

import dataclasses
import functools
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
    bandwidth_use: bytes that a step has to read, over its time, over the machine's read bandwidth (MBU).
    """

    ttft_ms: float
    step_ms: float
    step_spread: float
    tokens_per_s: float
    bandwidth_use: float


def measure(
    engines: Mapping[str, Engine],
    read_gb_s: float,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 5,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Speed]:
    """Times greedy decoding of each engine, full batch, in interleaved rounds after one to warm up.

    read_gb_s: from `read_bandwidth`. Raises ValueError when prompt and answer do not fit an engine's max_len.
    """
    if min(prompt_tokens, rounds) < 1 or new_tokens < 2:
        raise ValueError(
            f"prompt_tokens={prompt_tokens}, new_tokens={new_tokens}, rounds={rounds}; "
            "expected at least 1, 2 (the first comes from prefill) and 1."
        )
    for name, engine in engines.items():
        if prompt_tokens + new_tokens > engine.max_len:
            raise ValueError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens do not fit {name}'s max_len={engine.max_len}."
            )
    ttft: dict[str, list[float]] = {name: [] for name in engines}
    step: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        log(f"timing round {number} of {rounds}" if number else "warming up")
        for name, engine in engines.items():
            first_s, rest_s = _time(engine, prompt_tokens, new_tokens)
            if number:
                ttft[name].append(first_s * 1e3)
                step[name].append(rest_s * 1e3 / (new_tokens - 1))
    speeds = {}
    for name, engine in engines.items():
        step_ms = float(np.median(step[name]))
        speeds[name] = Speed(
            ttft_ms=float(np.median(ttft[name])),
            step_ms=step_ms,
            step_spread=(max(step[name]) - min(step[name])) / step_ms,
            tokens_per_s=engine.programs.batch * 1e3 / step_ms,
            bandwidth_use=engine.step_bytes / (step_ms * 1e-3) / (read_gb_s * 1e9),
        )
    return speeds


def _time(engine: Engine, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and from there to the last."""
    prompt = (np.arange(prompt_tokens) * 7919 % engine.cfg.vocab_size).tolist()
    start = time.perf_counter()
    blocks = engine.token_blocks([prompt] * engine.programs.batch, new_tokens, as_arrays(Sampling(), frozenset()))
    next(blocks)
    first = time.perf_counter()
    for _ in blocks:
        pass
    return first - start, time.perf_counter() - first


@functools.cache
def read_bandwidth(megabytes: int = 512) -> float:
    """The rate at which the default device reads memory, in GB (1e9 bytes) a second: the best of several ways to read.

    megabytes: read each time; more than any cache holds. Takes about a second on a CPU.
    """
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
            jax.block_until_ready(way(x, v))
            best = max(best, x.nbytes / (time.perf_counter() - start) / 1e9)
    return best
