"""llama.cpp, through the C API that llama-cpp-python wraps: its Python class has no batches."""

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
from engines import gguf_

api: Any = llama_cpp  # its hints refuse what its functions take
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@api.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    """Of thousands of lines, the errors."""
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Engine:
    def __init__(self, folder: Path, variant: str, threads: int):
        self.file = folder / "model.gguf"
        self.variant, self.threads = variant, threads
        self.model = self.context = None
        api.llama_log_set(_log, None)
        api.llama_backend_init()

    def prepare(self, source: Path) -> None:
        if self.variant != "Q4_0":
            gguf_.write(Path(source), self.file, self.variant)
            return
        whole = self.file.with_name("f32.gguf")
        gguf_.write(Path(source), whole, "F32")
        how = api.llama_model_quantize_default_params()
        how.ftype, how.nthread = api.LLAMA_FTYPE_MOSTLY_Q4_0, self.threads
        if status := api.llama_model_quantize(bytes(whole), bytes(self.file), how):
            raise RuntimeError(f"llama_model_quantize returned {status}")
        whole.unlink()

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        if self.context is not None:
            api.llama_free(self.context)
            api.llama_batch_free(self.batch)
        if self.model is None:
            self.model = api.llama_model_load_from_file(bytes(self.file), api.llama_model_default_params())
            if self.model is None:
                raise RuntimeError(f"llama.cpp does not load {self.file.name}")
            self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        how = api.llama_context_default_params()
        how.n_ctx = how.n_batch = batch * max_len
        how.n_seq_max = batch
        how.n_threads = how.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, how)
        if self.context is None:
            raise RuntimeError(f"llama.cpp makes no context of {batch} x {max_len} tokens")
        self.batch = api.llama_batch_init(batch * max_len, 0, 1)
        names = ("token", "pos", "n_seq_id", "logits")
        self.fields = {name: np.ctypeslib.as_array(getattr(self.batch, name), (batch * max_len,)) for name in names}
        self.fields["n_seq_id"][:] = 1
        return {}

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._first(prompts)[0]

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[int]]:
        _, tokens = self._first(prompts)
        row = [tokens[0]]
        start = time.perf_counter()
        for step in range(new_tokens - 1):
            tokens = self._run([[token] for token in tokens], len(prompts[0]) + step)
            row.append(tokens[0])
        return time.perf_counter() - start, row

    def _first(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        start = time.perf_counter()
        tokens = self._run(prompts, 0)
        return time.perf_counter() - start, tokens

    def _run(self, rows: Sequence[Sequence[int]], position: int) -> list[int]:
        """The likeliest next token of each row, whose tokens begin at the position."""
        length, count = len(rows[0]), len(rows) * len(rows[0])
        self.batch.n_tokens = count
        self.fields["token"][:count] = np.ravel(rows)
        self.fields["pos"][:count].reshape(len(rows), length)[:] = np.arange(position, position + length)
        self.fields["logits"][:count].reshape(len(rows), length)[:] = np.arange(length) == length - 1
        for i in range(count):
            self.batch.seq_id[i][0] = i // length
        if status := api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [int(self._logits(end).argmax()) for end in range(length - 1, count, length)]

    def _logits(self, i: int) -> np.ndarray:
        pointer = ctypes.cast(api.llama_get_logits_ith(self.context, i), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))
