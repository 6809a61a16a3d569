"""Structured pruning: channels, heads and layers leave, the shapes shrink, and every program of the model is faster."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import Weight
from jaxllm.calibrate import Inputs, calibration_tokens, describe
from jaxllm.config import WIDTHS, ModelConfig
from jaxllm.lm import LM, Transform, ends, record, require_order
from jaxllm.params import flatten, unflatten
from jaxllm.sensitivity import layer_damage
from jaxllm.transforms.layerwise import Layerwise, Leaves, Plan, Stage, joined, run, split

_log = logging.getLogger(__name__)

TILE = 128  # a TPU's matmul works on multiples of this; a width in between costs as much as the next one
LAYER_WINDOWS = 1  # of the calibration text that layers are judged on; each costs a forward a layer and removal
_DAMPING = 0.01  # of each input's mean square: how much its corrected weight stays near the old one
_SILENT = 1e-30  # mean square of an input that is nothing
Keep = int | float | Sequence[int] | None


def compact(
    ffn: Keep = None, kv_heads: Keep = None, layers: Keep = None, correct: bool = True, calibration: Any = None
) -> Transform:
    """Removes the FFN channels, KV heads (each with its query heads) and whole layers that matter least.

    ffn, kv_heads: what each layer keeps: an int is a count, a float in (0, 1] a fraction, a sequence has a count for
        each layer; None keeps all. A fraction of the FFN channels is rounded to a multiple of 128 where there are that
        many.
    layers: how many to keep, as a count or a fraction, or a sequence of those to keep.
    correct: whether the weights that read a layer's remaining channels are fitted anew, by least squares on the
        calibration text, to put out what all channels put out.
    calibration: integer ids [N, T] of the text that decides, T >= 2; by default the one that ships with the package.
        Layers are judged on its first window.

    A channel's score is the part of the output that is lost with it: the mean square of its activation times the
    squared norm of the weights that read it (the "down" column), or with `correct` what is lost after the others have
    made up for it. A KV head's is the same summed over its query heads and "o". A layer's is how far the predictions
    move (KL) without it. Weights alone do not do: a few channels with small weights carry most of the signal.

    Raises ValueError for a count that is not there and for a model that is quantised already.
    Sources: Sun et al. 2024 (Wanda: weight times activation); Luo et al. 2017 (ThiNet: least squares on what is left);
    Men et al. 2024 (ShortGPT: whole layers).
    """
    keep = {"ffn": ffn, "kv_heads": kv_heads, "layers": layers}
    if all(value is None for value in keep.values()):
        raise ValueError("compact was asked for nothing; give at least one of ffn, kv_heads and layers.")
    given = {
        name: value if isinstance(value, int | float) or value is None else [*value] for name, value in keep.items()
    }
    channels = Layerwise("compact", functools.partial(_plan, given, correct, calibration))
    if layers is None:
        return channels

    def transform(lm: LM) -> LM:
        require_order(lm, "compact")
        if isinstance(layers, Sequence) or not any(isinstance(getattr(lm.cfg, name), tuple) for name in WIDTHS):
            kept_counts(lm.cfg, ffn, kv_heads, layers)  # what cannot be is refused before slow work
        tokens_NT = calibration_tokens(lm, calibration)
        kept = [*layers] if isinstance(layers, Sequence) else _choose_layers(lm, kept_layers(lm.cfg, layers), tokens_NT)
        small = keep_layers(lm, kept)
        plan = dataclasses.replace(channels, plan=functools.partial(_plan, given, correct, tokens_NT)).prepare(small)
        flat: dict[str, Weight] = {}
        for group, leaves in run([Stage("compact", small.cfg, plan)], split(small.params)):
            flat |= joined(group, leaves)
        touched = [path for path in flatten(lm.params) if path.startswith("layers_")]
        args = {**plan.args, "layers": kept, "calibration": describe(tokens_NT)}
        return record(lm, "compact", args, touched, cfg=plan.cfg, params=unflatten(flat))

    return transform


def kept_counts(cfg: ModelConfig, ffn: Keep = None, kv_heads: Keep = None, layers: Keep = None) -> dict[str, Any]:
    """What `compact` would keep of a model of this shape. Raises ValueError for a count that is not there."""
    kept = kept_layers(cfg, layers)
    # Which layers a count leaves is not known yet; those of one width stand for one another.
    rows = range(kept) if isinstance(kept, int) else kept
    return {
        "ffn": _counts("ffn", ffn, [cfg.widths("ffw_dim")[i] for i in rows], TILE),
        "kv_heads": _counts("kv_heads", kv_heads, [cfg.widths("num_kv_heads")[i] for i in rows]),
        "layers": kept,
    }


def kept_layers(cfg: ModelConfig, layers: Keep) -> int | list[int]:
    """How many layers stay, or which."""
    if layers is None or isinstance(layers, int | float):
        return _count("layers", layers, cfg.num_layers)
    kept = [*layers]
    if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= cfg.num_layers:
        raise ValueError(f"layers={kept}: expected rising numbers from 0 to {cfg.num_layers - 1}.")
    return kept


def _counts(name: str, keep: Keep, have: Sequence[int], tile: int = 1) -> tuple[int, ...]:
    if keep is None or isinstance(keep, int | float):
        return tuple(_count(name, keep, width, tile) for width in have)
    if len(keep) != len(have):
        raise ValueError(f"{name} has {len(keep)} counts; there are {len(have)} layers.")
    return tuple(_count(name, each, width, tile) for each, width in zip(keep, have, strict=True))


def _count(name: str, keep: int | float | None, have: int, tile: int = 1) -> int:
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


def _choose_layers(lm: LM, kept: int | list[int], tokens_NT: np.ndarray) -> list[int]:
    """The most needed layers: that whose absence moves the predictions least goes first, then the next of the rest."""
    assert isinstance(kept, int)
    remaining = list(range(lm.cfg.num_layers))
    while len(remaining) > kept:
        without = layer_damage(keep_layers(lm, remaining), tokens_NT[:LAYER_WINDOWS], lambda _: {"gone": None}, lm)
        divergence = [found["gone"] for found in without]
        gone = int(np.argmin(divergence))
        _log.info("compact: layer %d goes, %d stay; KL %.3f", remaining[gone], len(remaining) - 1, divergence[gone])
        del remaining[gone]
    return remaining


def keep_layers(lm: LM, kept: Sequence[int]) -> LM:
    """The model with these layers only, in their order."""
    widths = {name: tuple(lm.cfg.widths(name)[i] for i in kept) for name in WIDTHS}
    cfg = dataclasses.replace(lm.cfg, num_layers=len(kept), **widths)
    params = {**ends(lm.params), **{f"layers_{new}": lm.params[f"layers_{old}"] for new, old in enumerate(kept)}}
    return dataclasses.replace(lm, cfg=cfg, params=params)


def _plan(given: Mapping[str, Any], correct: bool, calibration: Any, lm: LM) -> Plan:
    """For channels and heads; the layers are those that stay."""
    counts = kept_counts(lm.cfg, given["ffn"], given["kv_heads"])
    before = zip(lm.cfg.widths("num_heads"), lm.cfg.widths("num_kv_heads"), strict=True)
    heads = [kept * (n // k) for kept, (n, k) in zip(counts["kv_heads"], before, strict=True)]
    cfg = dataclasses.replace(lm.cfg, ffw_dim=counts["ffn"], num_kv_heads=counts["kv_heads"], num_heads=tuple(heads))
    sites: dict[str, tuple[str, ...]] = {}
    for i in range(cfg.num_layers):
        narrower = ("mlp/up",) if cfg.widths("ffw_dim")[i] < lm.cfg.widths("ffw_dim")[i] else ()
        narrower += ("attn/v",) if cfg.widths("num_kv_heads")[i] < lm.cfg.widths("num_kv_heads")[i] else ()
        if narrower:
            sites[f"layers_{i}"] = narrower
    touched = [path for path in lm.info if path.partition("/")[0] in sites]
    tokens_NT = calibration_tokens(lm, calibration)
    args = {"ffn": cfg.ffw_dim, "kv_heads": cfg.num_kv_heads, "correct": correct, "calibration": describe(tokens_NT)}

    def change(group: str, leaves: Leaves, inputs: Mapping[str, Inputs]) -> Leaves:
        if group not in sites:
            return leaves
        i = int(group.removeprefix("layers_"))
        out: dict[str, Any] = dict(leaves)
        if "mlp/up" in inputs:
            kept = _narrow(out, "mlp/down/w", inputs["mlp/up"], 1, cfg.widths("ffw_dim")[i], correct)
            out |= {name: jnp.take(out[name], kept, axis=0) for name in ("mlp/gate/w", "mlp/up/w")}
        if "attn/v" in inputs:
            before, after = lm.cfg.widths("num_kv_heads")[i], cfg.widths("num_kv_heads")[i]
            share = lm.cfg.widths("num_heads")[i] // before
            kept = _narrow(out, "attn/o/w", inputs["attn/v"], share * cfg.head_dim, after, correct)
            query = (kept[:, None] * share + np.arange(share)).reshape(-1)
            for name, rows in {"attn/q": query, "attn/k": kept, "attn/v": kept}.items():
                for part in ("w", "b"):
                    if f"{name}/{part}" in out:
                        out[f"{name}/{part}"] = jnp.take(out[f"{name}/{part}"], rows, axis=0)
        return out

    # Without correction one would do with mean squares; the Hessian's diagonal has them.
    return Plan(cfg, change, args, touched, tokens_NT, ("hessian",), sites)


def _narrow(leaves: dict[str, Any], reader: str, inputs: Inputs, unit: int, count: int, correct: bool) -> np.ndarray:
    """Keeps `count` runs of `unit` inputs of the reader, in `leaves`; returns which runs."""
    w, hessian = leaves[reader], inputs.hessian
    assert hessian is not None
    w_NK = w.astype(jnp.float32).reshape(w.shape[0], -1)
    lost_K = np.asarray(_lost(w_NK, hessian, correct), np.float64)
    kept = best(lost_K.reshape(-1, unit).sum(axis=1), count)
    columns = (kept[:, None] * unit + np.arange(unit)).reshape(-1)
    new = _corrected(w_NK, hessian, columns) if correct else w_NK[:, columns]
    if not bool(jnp.all(jnp.isfinite(new))):
        raise ValueError(f"{reader}: its inputs on the calibration text are not finite, or too large to be inverted.")
    leaves[reader] = new.astype(w.dtype).reshape(w.shape[0], *((-1, *w.shape[2:]) if w.ndim > 2 else (-1,)))
    return kept


@functools.partial(jax.jit, static_argnums=2)
def _lost(w_NK: jax.Array, hessian_KK: jax.Array, correct: bool) -> jax.Array:
    """[K]: the mean square of the output that goes with an input; with `correct`, what others cannot make up for."""
    norms_K = jnp.sum(jnp.square(w_NK), axis=0)
    if not correct:
        return norms_K * jnp.diagonal(hessian_KK)
    damped = _damped(hessian_KK)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(damped.shape[0]))
    return jnp.where(jnp.diagonal(hessian_KK) > _SILENT, norms_K / jnp.diagonal(inverse), 0.0)


@jax.jit
def _corrected(w_NK: jax.Array, hessian_KK: jax.Array, columns: jax.Array) -> jax.Array:
    """The weights of the kept inputs that put out, in the mean square, what all did: W H_{:,S} (H_SS)⁻¹, damped."""
    damped = _damped(hessian_KK)
    target_NS = jnp.matmul(w_NK, damped[:, columns], precision=jax.lax.Precision.HIGHEST)
    factor = jnp.linalg.cholesky(damped[columns][:, columns])
    return jax.scipy.linalg.cho_solve((factor, True), target_NS.T).T


def _damped(hessian_KK: jax.Array) -> jax.Array:
    """Each input by its own size, not by that of all: a quiet input that is read by large weights is not a loud one."""
    diagonal_K = jnp.diagonal(hessian_KK)
    return hessian_KK + jnp.diag(jnp.where(diagonal_K > _SILENT, _DAMPING * diagonal_K, 1.0))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, in order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
