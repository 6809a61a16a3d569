"""transformers on a GPU: torch.compile with CUDA graphs, a static cache and random weights; variant: a shape."""

import inspect
import os
import time
from pathlib import Path
from typing import Any

import torch
from engines.shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

# Its name has changed.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.shape = SHAPES[variant.split()[0]]
        self.model = None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        s = self.shape
        if self.model is None:
            config = LlamaConfig(
                vocab_size=s.vocab_size,
                hidden_size=s.embed_dim,
                num_hidden_layers=s.num_layers,
                num_attention_heads=s.num_heads,  # pyright: ignore[reportArgumentType]
                num_key_value_heads=s.num_kv_heads,  # pyright: ignore[reportArgumentType]
                head_dim=s.head_dim,
                intermediate_size=s.ffw_dim,  # pyright: ignore[reportArgumentType]
                tie_word_embeddings=s.tie_embeddings,
                max_position_embeddings=s.max_len,
            )
            with torch.device("cuda"):
                torch.set_default_dtype(torch.bfloat16)
                self.model = LlamaForCausalLM(config).eval()
        torch.compiler.reset()
        self.cache = StaticCache(self.model.config, max_cache_len=max_len)
        heads = s.widths("num_kv_heads")[0], s.head_dim
        self.cache.early_initialization(batch, *heads, torch.bfloat16, torch.device("cuda"))
        self.compiled = torch.compile(self._next, mode="reduce-overhead", dynamic=False)
        return {}

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        self.cache.reset()
        tokens = self._next(torch.tensor(prompts, device="cuda"))  # not timed, and not worth compiling
        found = [tokens]
        tokens.tolist()  # waits
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens = self.compiled(tokens).clone()  # the graph's own is overwritten by the next
            found.append(tokens)
        row = torch.cat(found, 1)[0].tolist()
        return time.perf_counter() - start, row

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.model is not None
        logits = self.model(tokens, **{_CACHE: self.cache}, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)
