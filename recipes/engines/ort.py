"""onnxruntime-genai, on the model that its builder makes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # pyright: ignore[reportMissingImports]

og: Any = onnxruntime_genai  # a module without types


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.folder, self.variant, self.threads = folder, variant, threads
        self.model = None

    def prepare(self, source: Path) -> None:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(self.folder)]
        subprocess.run([*builder, "-p", self.variant, "-e", "cpu", "-c", str(self.folder / "cache")], check=True)

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        if self.model is None:
            config = og.Config(str(self.folder))
            pools = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": pools}}}))
            self.model = og.Model(config)
        self.how = og.GeneratorParams(self.model)
        # A least length keeps the end token from being drawn. One more than asked for: a prefill case draws one, too.
        lengths = {"max_length": max_len + 1, "min_length": max_len + 1}
        self.how.set_search_options(batch_size=batch, do_sample=False, **lengths)
        return {}

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._first(prompts)[0]

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        _, generator = self._first(prompts)
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        return seconds, generator.get_sequence(0)[len(prompts[0]) :].tolist()

    def _first(self, prompts: list[list[int]]) -> tuple[float, Any]:
        generator = og.Generator(self.model, self.how)
        start = time.perf_counter()
        generator.append_tokens(np.asarray(prompts, np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start, generator
