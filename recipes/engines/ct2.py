"""CTranslate2."""

import json
import os
import time
from pathlib import Path
from typing import Any

# Its own choice is AVX2 where it finds no MKL; this must be set before the import.
if "avx512f" in Path("/proc/cpuinfo").read_text():
    os.environ["CT2_FORCE_CPU_ISA"] = "AVX512"

import ctranslate2  # pyright: ignore[reportMissingImports]


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.folder, self.variant, self.threads = folder, variant, threads
        self.generator = None

    def prepare(self, source: Path) -> None:
        from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

        TransformersConverter(str(source)).convert(str(self.folder), quantization=self.variant, force=True)

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        if self.generator is None:
            how = {"compute_type": self.variant, "inter_threads": 1, "intra_threads": self.threads}
            self.generator = ctranslate2.Generator(str(self.folder), "cpu", **how)
            self.words = json.loads((self.folder / "vocabulary.json").read_text())
        return {}

    def prefill(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        self._generate(prompts, 1)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        times = []
        results = self._generate(prompts, new_tokens, callback=lambda step: times.append(time.perf_counter()))
        end = time.perf_counter()
        # It is called for each row of a step.
        return end - times[len(prompts) - 1], results[0].sequences_ids[0]

    def _generate(self, prompts: list[list[int]], new_tokens: int, **how: Any) -> list[Any]:
        assert self.generator is not None
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        how |= {"min_length": new_tokens, "max_length": new_tokens, "include_prompt_in_result": False}
        return self.generator.generate_batch(words, beam_size=1, sampling_topk=1, **how)
