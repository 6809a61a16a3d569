"""What the weights of a model meet: statistics of activations on a text, gathered a layer at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import Tap, Weight
from jaxllm.config import ModelConfig
from jaxllm.evaluate import calibration_text, token_windows
from jaxllm.lm import LM, apply_layer, check_tokens, embed_tokens, run_layer
from jaxllm.params import flatten, unflatten

Kind = Literal["absmax", "mean_abs", "mean_square", "hessian", "histogram"]

# Weights of a layer that read the same activations, by the module whose output those are: scaling an output channel of
# that module scales an input of each reader.
SITES: Mapping[str, tuple[str, ...]] = {
    "attn_norm": ("attn/q/w", "attn/k/w", "attn/v/w"),
    "attn/v": ("attn/o/w",),
    "mlp_norm": ("mlp/gate/w", "mlp/up/w"),
    "mlp/up": ("mlp/down/w",),
}
SITE_OF = {reader: site for site, readers in SITES.items() for reader in readers}

# Bins of |x|: eight to the octave, the first for everything below 2^-16, the last for everything from 2^16 on.
BIN_EDGES = 2.0 ** np.linspace(-16, 16, 257)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a weight is contracted with, over all tokens of the calibration text. K: its contracted axes, as one.

    None where it was not asked for.
    """

    absmax: jax.Array | None = None  # [K]
    mean_abs: jax.Array | None = None  # [K]
    mean_square: jax.Array | None = None  # [K]
    hessian: jax.Array | None = None  # [K, K], the mean of x xᵀ
    histogram: jax.Array | None = None  # [258] counts of |x|, between BIN_EDGES and outside

    def divided(self, scale_K: jax.Array) -> Inputs:
        """Of x / scale. The histogram is lost."""

        def by(part: jax.Array | None, divisor: jax.Array) -> jax.Array | None:
            return None if part is None else part / divisor

        return Inputs(
            absmax=by(self.absmax, scale_K),
            mean_abs=by(self.mean_abs, scale_K),
            mean_square=by(self.mean_square, scale_K**2),
            hessian=by(self.hessian, scale_K[:, None] * scale_K[None]),
        )


class Walk:
    """A text's residual stream on its way through a model, a layer at a time.

    Memory: the stream, [N, T, D] in the model's dtype, one layer's activations of one window, and its statistics.
    """

    def __init__(self, tokens_NT: np.ndarray):
        self._tokens_NT = tokens_NT
        self.x_NTD: list[jax.Array] = []  # one [1, T, D] for each window

    def embed(self, cfg: ModelConfig, embed: Mapping[str, Weight]) -> None:
        self.x_NTD = [embed_tokens(cfg.layer(0), embed, tokens_T[None]) for tokens_T in self._tokens_NT]

    def inputs(
        self, cfg: ModelConfig, layer: Mapping[str, Any], kinds: Collection[Kind], sites: Collection[str] = tuple(SITES)
    ) -> dict[str, Inputs]:
        """Statistics of what each site's readers in this layer meet, by site. Does not move on.

        cfg: of that layer alone. layer: its weights, nested.
        """
        wanted, totals = (tuple(sorted(kinds)), tuple(sorted(sites))), None
        for x_1TD in self.x_NTD:
            totals = _gather(cfg, wanted, layer, x_1TD, totals)
        assert totals is not None
        tokens = self._tokens_NT.size
        sums = ("mean_abs", "mean_square", "hessian")
        return {
            site: Inputs(**{kind: part / tokens if kind in sums else part for kind, part in found.items()})
            for site, found in totals.items()
        }

    def advance(self, cfg: ModelConfig, layer: Mapping[str, Any]) -> None:
        """Goes through a layer."""
        for n, x_1TD in enumerate(self.x_NTD):
            self.x_NTD[n] = run_layer(cfg, layer, x_1TD)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _gather(
    cfg: ModelConfig,
    wanted: tuple[tuple[Kind, ...], tuple[str, ...]],
    layer: Mapping[str, Any],
    x_BTD: jax.Array,
    totals: Mapping[str, Mapping[Kind, jax.Array]] | None,
) -> dict[str, dict[Kind, jax.Array]]:
    """`totals` with one more batch: sums, and maxima of "absmax"."""
    kinds, sites = wanted
    found: dict[str, dict[Kind, jax.Array]] = {}

    def record(site: str, x: jax.Array, y: jax.Array) -> None:
        tokens = x_BTD.shape[0] * x_BTD.shape[1]
        x_MK = x.reshape(tokens, -1).astype(jnp.float32)
        of: dict[Kind, Any] = {
            "absmax": lambda: jnp.max(jnp.abs(x_MK), axis=0),
            "mean_abs": lambda: jnp.sum(jnp.abs(x_MK), axis=0),
            "mean_square": lambda: jnp.sum(jnp.square(x_MK), axis=0),
            "hessian": lambda: jnp.matmul(x_MK.T, x_MK, precision=jax.lax.Precision.HIGHEST),
            "histogram": lambda: _histogram(x_MK),
        }
        found[site] = {kind: of[kind]() for kind in kinds}

    flat = flatten(layer)
    for site in sites:
        reader = SITES[site][0]
        flat[reader] = Tap(flat[reader], functools.partial(record, site))
    apply_layer(cfg, unflatten(flat), x_BTD)
    if totals is None:
        return found
    return {
        site: {
            kind: jnp.maximum(part, totals[site][kind]) if kind == "absmax" else part + totals[site][kind]
            for kind, part in parts.items()
        }
        for site, parts in found.items()
    }


def _histogram(x_MK: jax.Array) -> jax.Array:
    bins = jnp.searchsorted(jnp.asarray(BIN_EDGES, jnp.float32), jnp.abs(x_MK).reshape(-1), side="right")
    return jnp.zeros(len(BIN_EDGES) + 1, jnp.float32).at[bins].add(1.0)


def calibration_tokens(lm: LM, calibration: Any) -> np.ndarray:
    """The ids [N, T] that a transform was given, checked; those of the text that ships with the package for None."""
    tokens_NT = token_windows(lm, calibration_text()) if calibration is None else calibration
    tokens_NT = check_tokens(lm.cfg, tokens_NT)
    if tokens_NT.shape[1] < 2:
        raise ValueError("Calibration windows of one token have nothing to predict; give at least two a window.")
    return tokens_NT


def describe(tokens_NT: np.ndarray) -> dict[str, Any]:
    """What a ledger says of a calibration text."""
    return {"windows": list(tokens_NT.shape), "sha256": hashlib.sha256(tokens_NT.tobytes()).hexdigest()[:16]}


def sites_of(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By layer ("layers_3"), the sites that these weights of it read."""
    out: dict[str, tuple[str, ...]] = {}
    for path in paths:
        group, _, name = path.partition("/")
        if name in SITE_OF:
            out[group] = tuple(dict.fromkeys((*out.get(group, ()), SITE_OF[name])))
    return out
