"""A teacher's predictions on disk: the likeliest tokens of each position, so that training need not run it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxllm.calibrate import describe
from jaxllm.lm import LM, check_tokens, fingerprint, logits
from jaxllm.losses import TopTokens, top_tokens
from jaxllm.manifest import claim

_MANIFEST = "teacher.json"
_SHARD = 64  # windows a file: what a run that is cut off does again
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """What `cache_teacher` wrote. Made by `open_teacher`.

    windows: [N, T] of the tokens it saw; sha256: of them. k, temperature: of its predictions.
    """

    path: Path
    windows: tuple[int, int]
    sha256: str
    k: int
    temperature: float
    vocab_size: int

    def rows(self, rows_B: np.ndarray) -> TopTokens:
        """Of these windows, [B, T - 1, …]. Raises ValueError for a file that is damaged."""
        found: list[tuple[np.ndarray, ...]] = []
        for row in rows_B.tolist():
            file = self.path / _shard_name(row // _SHARD)
            try:
                with safe_open(file, "np") as opened:
                    parts = [opened.get_slice(name)[row % _SHARD] for name in TopTokens._fields]
            except Exception as error:  # whatever safetensors raises
                raise ValueError(f"{file} cannot be read: {error}. Remove it and run `cache_teacher` again.") from error
            found.append(tuple(parts))
        ids, log_p, log_tail = (np.stack(part) for part in zip(*found, strict=True))
        return TopTokens(ids.astype(np.int32), log_p, log_tail)  # pyright: ignore[reportArgumentType]


def cache_teacher(
    teacher: LM,
    tokens_NT: Any,
    path: str | os.PathLike[str],
    k: int = 64,
    temperature: float = 1.0,
    log: Callable[[str], None] = lambda _: None,
) -> CachedTeacher:
    """Writes a teacher's k likeliest tokens after each token of the windows, and what the others have together.

    Bytes: N (T - 1) (8 k + 4). Written in files of 64 windows, each all or nothing: a run goes on where it was cut off.
    Raises ValueError when `path` holds another teacher's, or for other windows, k or temperature.
    """
    tokens_NT = check_tokens(teacher.cfg, tokens_NT)
    check_top(k, teacher.cfg.vocab_size, temperature)
    path = Path(path)
    manifest = {
        "version": _VERSION,
        **describe(tokens_NT),
        "k": k,
        "temperature": temperature,
        "vocab_size": teacher.cfg.vocab_size,
        "teacher": _identity(teacher),
    }
    claim(path / _MANIFEST, manifest)
    shorten = jax.jit(lambda x: top_tokens(x, k, temperature))
    for start in range(0, len(tokens_NT), _SHARD):
        file = path / _shard_name(start // _SHARD)
        if file.exists():
            continue
        rows = [shorten(logits(teacher, row_T[None])[0, :-1]) for row_T in tokens_NT[start : start + _SHARD]]
        arrays = {name: np.stack([np.asarray(getattr(row, name)) for row in rows]) for name in TopTokens._fields}
        half = file.with_suffix(f".{os.getpid()}")
        save_file(arrays, half)
        half.replace(file)
        log(f"teacher: {min(start + _SHARD, len(tokens_NT))} of {len(tokens_NT)} windows")
    return open_teacher(path)


def check_top(k: int, vocab_size: int, temperature: float) -> None:
    """Raises ValueError where there are no k likeliest tokens and others, or no such temperature."""
    if not 1 <= k < vocab_size:
        raise ValueError(f"k is {k}; expected 1 to {vocab_size - 1}, fewer than the vocabulary.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a number above 0.")


def open_teacher(path: str | os.PathLike[str]) -> CachedTeacher:
    """Raises ValueError when a directory does not hold all that `cache_teacher` writes."""
    path = Path(path)
    try:
        found = json.loads((path / _MANIFEST).read_text())
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']!r}, expected {_VERSION}")
        (windows, length), k, vocab_size = found["windows"], found["k"], found["vocab_size"]
        numbers = [windows, length, k, vocab_size]
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in numbers):
            raise ValueError(f"windows, k and vocab_size are {numbers}")
        made = CachedTeacher(path, (windows, length), str(found["sha256"]), k, float(found["temperature"]), vocab_size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / _MANIFEST} is not as `cache_teacher` wrote it: {error}.") from error
    missing = [n for n in range(-(-windows // _SHARD)) if not (path / _shard_name(n)).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {_shard_name(missing[0])}: `cache_teacher` was cut off; run it again.")
    return made


def _shard_name(n: int) -> str:
    return f"{n:05d}.safetensors"


def _identity(lm: LM) -> list[Any]:
    """How the teacher came about, and what it says: weights at the same path may have become others."""
    probe = np.asarray(logits(lm, np.arange(16)[None] % lm.cfg.vocab_size))
    return [fingerprint(lm), np.round(probe[0, -1, :8], 2).tolist()]
