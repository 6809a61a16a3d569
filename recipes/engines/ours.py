"""jaxllm. A bundle for the first case, which start-up is measured with; the others are compiled, as `compile` does.

With quantised weights goes an int8 cache.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxllm
from jaxllm.sample import Sampling, as_arrays

BUNDLE = (1, 128)  # batch and max_len
_QUANTISED = {"int8": "int8", "int4": "int4-g32"}


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.folder, self.variant = folder, variant
        self.lm = self.engine = None

    def prepare(self, source: Path) -> None:
        batch, max_len = map(str, BUNDLE)
        how = ["--target", "cpu", "--batch", batch, "--context", max_len, "--out", str(self.folder)]
        quantised = ["--quantize", _QUANTISED[self.variant], "--kv", "int8"] if self.variant in _QUANTISED else []
        dtype = "bfloat16" if self.variant == "bfloat16" else "float32"
        command = [sys.executable, "-m", "jaxllm.cli", "compile", str(source), "--dtype", dtype, *quantised, *how]
        subprocess.run(command, check=True)

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        self.engine = None
        if (batch, max_len) == BUNDLE:
            self.engine = jaxllm.load_bundle(self.folder)
        else:
            self.lm = self.lm or jaxllm.load(self.folder)
            self.engine = jaxllm.compile(self.lm, batch=batch, max_len=max_len)
        return {"step_bytes": self.engine.step_bytes}

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._run(prompts, 1)[0]

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        _, seconds, tokens = self._run(prompts, new_tokens)
        return seconds, tokens

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        assert self.engine is not None
        start = time.perf_counter()
        blocks = self.engine.token_blocks(prompts, new_tokens, as_arrays(Sampling(), frozenset()))
        found = [next(blocks)]
        first = time.perf_counter()
        found += blocks
        end = time.perf_counter()
        return first - start, end - first, np.concatenate(found, axis=1)[0, :new_tokens].tolist()
