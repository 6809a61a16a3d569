"""OpenVINO GenAI: the Q8_0 GGUF, as the model in OpenVINO's own format that it makes of it, with continuous batching.

That is what its LLMPipeline runs on a CPU as well; here each step is seen.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]
from engines import gguf_


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.folder, self.threads = folder, threads
        self.pipeline = None

    def prepare(self, source: Path) -> None:
        file = self.folder / "model.gguf"
        gguf_.write(Path(source), file, "Q8_0")
        genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)
        file.unlink()

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        self.pipeline = None
        how = genai.SchedulerConfig()
        how.enable_prefix_caching = False  # a prompt that comes again is computed again
        how.max_num_seqs = batch
        how.max_num_batched_tokens = max(256, batch * max_len)
        how.cache_size = 1  # GB
        how.dynamic_split_fuse = False  # whole prompts first
        properties = {"INFERENCE_NUM_THREADS": self.threads}
        self.pipeline = genai.ContinuousBatchingPipeline(str(self.folder), how, "CPU", properties)
        return {}

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._run(prompts, 1)[0]

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        _, seconds, tokens = self._run(prompts, new_tokens)
        return seconds, tokens

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        assert self.pipeline is not None
        how = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        handles = [
            self.pipeline.add_request(i, openvino.Tensor(np.asarray([prompt], np.int64)), how)
            for i, prompt in enumerate(prompts)
        ]
        start = time.perf_counter()
        self.pipeline.step()
        first = time.perf_counter()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        end = time.perf_counter()
        return first - start, end - first, handles[0].read_all()[0].generated_ids
