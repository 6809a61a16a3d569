"""Structured pruning: channels, heads and layers leave, the shapes shrink, and every program of the model is faster."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.calibrate import input_mean_squares
from jaxllm.config import ModelConfig
from jaxllm.evaluate import calibration_text, score, token_windows
from jaxllm.lm import LM, Transform, check_tokens, logits, record, require_order
from jaxllm.params import flatten, unflatten

TILE = 128  # a TPU's matmul works on multiples of this; a width in between costs as much as the next one
LAYER_WINDOWS = 1  # of the calibration text that layers are judged on; each costs a forward a layer and removal
Keep = int | float | None


def compact(ffn: Keep = None, kv_heads: Keep = None, layers: Keep = None, calibration: Any = None) -> Transform:
    """Removes the FFN channels, KV heads (each with its query heads) and whole layers that matter least.

    ffn, kv_heads, layers: what is kept: an int is a count, a float in (0, 1] a fraction; None keeps all. A fraction of
        the FFN channels is rounded to a multiple of 128 where there are that many.
    calibration: integer ids [N, T] of the text that decides, T >= 2; by default the one that ships with the package.
        Layers are judged on its first window.

    A channel's score is the root mean square of its activation times the norm of the weights that read it (the "down"
    column); a KV head's is the same summed over its query heads and "o". A layer's is how far the predictions move (KL)
    without it. Weights alone do not do: a few channels with small weights carry most of the signal.

    Raises ValueError for a count that is not there and for a model that is quantised already.
    Sources: Sun et al. 2024 (Wanda: weight times activation); Men et al. 2024 (ShortGPT: whole layers).
    """
    keep = {"ffn": ffn, "kv_heads": kv_heads, "layers": layers}
    if all(value is None for value in keep.values()):
        raise ValueError("compact was asked for nothing; give at least one of ffn, kv_heads and layers.")

    def transform(lm: LM) -> LM:
        require_order(lm, "compact")
        counts = kept_counts(lm.cfg, ffn, kv_heads, layers)
        tokens_NT = token_windows(lm, calibration_text()) if calibration is None else calibration
        tokens_NT = check_tokens(lm.cfg, tokens_NT)
        if tokens_NT.shape[1] < 2:
            raise ValueError("Calibration windows of one token have nothing to predict; give at least two a window.")
        small, kept_layers = _keep_layers(lm, counts["layers"], tokens_NT)
        small = _keep_channels(small, counts["ffn"], counts["kv_heads"], tokens_NT)
        digest = hashlib.sha256(tokens_NT.tobytes()).hexdigest()[:16]
        calibrated = {"tokens": tokens_NT.size, "sha256": digest}
        args = counts | {"kept_layers": kept_layers, "calibration": calibrated}
        touched = [path for path in flatten(lm.params) if path.startswith("layers_")]
        return record(lm, "compact", args, touched, cfg=small.cfg, params=small.params)

    return transform


def kept_counts(cfg: ModelConfig, ffn: Keep = None, kv_heads: Keep = None, layers: Keep = None) -> dict[str, int]:
    """What `compact` would keep of a model of this shape. Raises ValueError for a count that is not there."""
    return {
        "ffn": _count("ffn", ffn, cfg.ffw_dim, TILE),
        "kv_heads": _count("kv_heads", kv_heads, cfg.num_kv_heads),
        "layers": _count("layers", layers, cfg.num_layers),
    }


def _count(name: str, keep: Keep, have: int, tile: int = 1) -> int:
    if keep is None:
        return have
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name}={keep} keeps a fraction; expected one in (0, 1], or a count as an integer.")
        tile = tile if have >= 2 * tile else 1
        return min(have, max(tile, round(keep * have / tile) * tile))
    if not isinstance(keep, int) or not 1 <= keep <= have:
        raise ValueError(f"{name}={keep!r}: the model has {have}; expected a count from 1 to {have}, or a fraction.")
    return keep


def _keep_layers(lm: LM, count: int, tokens_NT: np.ndarray) -> tuple[LM, list[int]]:
    """The model with its `count` most needed layers, and which those are.

    The layer whose absence moves the predictions least goes first, then the next one in what is left.
    """
    kept = list(range(lm.cfg.num_layers))
    if count == lm.cfg.num_layers:
        return lm, kept
    flat = flatten(lm.params)
    windows = tokens_NT[:, None][:LAYER_WINDOWS]
    reference = [logits(lm, tokens_1T) for tokens_1T in windows]

    def divergence(absent: list[int]) -> float:
        """KL from the whole model with nothing from these layers added to the residual stream: one program for all."""
        silent = [f"layers_{i}/{out}/w" for i in absent for out in ("attn/o", "mlp/down")]
        params = unflatten(flat | {path: jnp.zeros_like(flat[path]) for path in silent})
        without = dataclasses.replace(lm, params=params)
        scores = [
            score(logits(without, tokens_1T)[0], reference_1TV[0], tokens_1T[0])[1]
            for tokens_1T, reference_1TV in zip(windows, reference, strict=True)
        ]
        total = float(sum(scores))
        if not np.isfinite(total):
            raise ValueError("The model's predictions are not finite; layers cannot be compared.")
        return total

    absent: list[int] = []
    while len(kept) > count:
        gone = min(kept, key=lambda i: divergence([*absent, i]))
        absent.append(gone)
        kept.remove(gone)
    renumber = {f"layers_{old}": f"layers_{new}" for new, old in enumerate(kept)}
    params = {}
    for path, leaf in flat.items():
        top, _, rest = path.partition("/")
        if top in renumber or not top.startswith("layers_"):
            params[f"{renumber.get(top, top)}/{rest}"] = leaf
    cfg = dataclasses.replace(lm.cfg, num_layers=count)
    return dataclasses.replace(lm, cfg=cfg, params=unflatten(params)), kept


def _keep_channels(lm: LM, ffn: int, kv_heads: int, tokens_NT: np.ndarray) -> LM:
    cfg = lm.cfg
    if (ffn, kv_heads) == (cfg.ffw_dim, cfg.num_kv_heads):
        return lm
    flat = flatten(lm.params)
    readers = [path for path in flat if re.fullmatch(r"layers_\d+/(mlp/down|attn/o)/w", path)]
    energy = {}  # of what each input channel adds to the residual stream
    for path, mean_square in input_mean_squares(lm, tokens_NT, readers).items():
        energy[path] = mean_square * np.sum(np.square(np.asarray(flat[path], np.float64)), axis=0)
    group = cfg.num_heads // cfg.num_kv_heads
    params = {}
    for path, leaf in flat.items():
        layer = path.split("/")[0]
        for axis, name in enumerate(lm.info[path].axes):
            if name == "ffw" and layer.startswith("layers_"):
                leaf = jnp.take(leaf, _best(energy[f"{layer}/mlp/down/w"], ffn), axis)
            elif name in ("heads", "kv_heads"):
                scores = energy[f"{layer}/attn/o/w"].reshape(cfg.num_kv_heads, -1).sum(axis=1)
                heads = _best(scores, kv_heads)
                if name == "heads":
                    heads = (heads[:, None] * group + np.arange(group)).reshape(-1)
                leaf = jnp.take(leaf, heads, axis)
        params[path] = leaf
    cfg = dataclasses.replace(cfg, ffw_dim=ffn, num_kv_heads=kv_heads, num_heads=kv_heads * group)
    return dataclasses.replace(lm, cfg=cfg, params=unflatten(params))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, in order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
