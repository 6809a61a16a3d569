"""Layers of different widths made as wide as the widest, for formats that have one width for all."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxllm.config import ModelConfig


def widest(cfg: ModelConfig) -> ModelConfig:
    """The config with every layer as wide as the widest, in KV heads, query heads to each of them, and FFN channels."""
    heads, kv_heads = cfg.widths("num_heads"), cfg.widths("num_kv_heads")
    share = max(n // k for n, k in zip(heads, kv_heads, strict=True))
    return dataclasses.replace(
        cfg, num_heads=max(kv_heads) * share, num_kv_heads=max(kv_heads), ffw_dim=max(cfg.widths("ffw_dim"))
    )


def pad(w: np.ndarray, axes: tuple[str, ...], cfg: ModelConfig, wide: ModelConfig) -> np.ndarray:
    """A weight of a narrow layer with zeros for the heads and channels that the wide one has more.

    axes: `ParamInfo.axes` of w. cfg, wide: of the layer alone, as it is and as it becomes.
    The layer's output stays what it was: an FFN channel whose "up" and "down" are zero adds nothing, nor does a head
    whose values and "o" are. Query heads stay with the KV head they read.
    """
    for at, axis in enumerate(axes):
        if axis == "heads":
            have, want = ((c.widths("num_kv_heads")[0], c.widths("num_heads")[0]) for c in (cfg, wide))
            split = w.reshape(*w.shape[:at], have[0], have[1] // have[0], *w.shape[at + 1 :])
            split = _extend(_extend(split, at, want[0]), at + 1, want[1] // want[0])
            w = split.reshape(*w.shape[:at], want[1], *w.shape[at + 1 :])
        elif axis in ("kv_heads", "ffw"):
            w = _extend(w, at, wide.widths("num_kv_heads" if axis == "kv_heads" else "ffw_dim")[0])
    return w


def _extend(w: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(w, [(0, size - have if at == axis else 0) for at, have in enumerate(w.shape)])
