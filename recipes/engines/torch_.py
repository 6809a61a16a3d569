"""transformers with torch.compile, a static cache and a loop of our own, which is faster than its `generate`."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, StaticCache


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.folder, self.variant = folder, variant
        self.model = None
        torch.set_num_threads(threads)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")

    def prepare(self, source: Path) -> None:
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(self.folder)

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()
            if self.variant == "int8":
                quantize_(self.model, Int8WeightOnlyConfig())
        torch.compiler.reset()
        config = self.model.config
        self.cache = StaticCache(config, max_cache_len=max_len)
        # Otherwise made by the first call, whose program is then not the one for the second.
        heads = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(batch, *heads, torch.bfloat16, torch.device("cpu"))
        self.compiled = torch.compile(self._next, dynamic=False)
        return {}

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> float:
        self.cache.reset()
        tokens = torch.tensor(prompts)
        start = time.perf_counter()
        self.compiled(tokens).tolist()
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        self.cache.reset()
        tokens = self._next(torch.tensor(prompts))  # not timed, and not worth compiling
        row = [int(tokens[0])]
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens = self.compiled(tokens)
            row.append(int(tokens[0]))
        return time.perf_counter() - start, row

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.model is not None
        logits = self.model(tokens, cache=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)
