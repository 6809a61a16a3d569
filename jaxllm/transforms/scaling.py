"""Equivalent scalings: an input channel made smaller by the module before and its weights larger, or the other way.

The float model stays what it was; the quantised one does not, because what is hard to round moves between activations
and weights. Each scale is folded into the module that puts the channel out, so nothing is added to the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp

from jaxllm.arrays import QArray, Weight, dequantize
from jaxllm.calibrate import SITES, Inputs
from jaxllm.config import ModelConfig
from jaxllm.formats import Format, quantize
from jaxllm.transforms.layerwise import Leaves

SMOOTHQUANT_SITES = ("attn_norm", "mlp_norm")  # those of the paper: a norm's weight takes the scale
_AWQ_STEPS = 20


def smoothquant_scale(absmax_K: jax.Array, weight_absmax_K: jax.Array, alpha: float) -> jax.Array:
    """What a site's activations are divided by: max|x|^α / max|w|^(1 - α), 1 where either is nothing.

    Source: Xiao et al. 2023, "SmoothQuant", equation 4.
    """
    scale_K = absmax_K**alpha / jnp.maximum(weight_absmax_K, 1e-5) ** (1 - alpha)
    return jnp.where((absmax_K > 0) & (weight_absmax_K > 0), jnp.maximum(scale_K, 1e-5), 1.0)


def awq_scales(mean_abs_K: jax.Array) -> list[jax.Array]:
    """The scales that AWQ tries: mean|x|^α for α in 0, 1/20, … 19/20, normalised to a geometric middle of 1.

    Source: Lin et al. 2024, "AWQ", section 3.2, and the normalisation of the authors' code.
    """
    out = []
    for step in range(_AWQ_STEPS):
        scale_K = jnp.maximum(jnp.maximum(mean_abs_K, 1e-8) ** (step / _AWQ_STEPS), 1e-4)
        out.append(scale_K / jnp.sqrt(jnp.max(scale_K) * jnp.min(scale_K)))
    return out


@functools.partial(jax.jit, static_argnums=(3, 4))
def output_error(w: jax.Array, scale_K: jax.Array, hessian_KK: jax.Array, contracted: int, fmt: Format) -> jax.Array:
    """Mean square error over the calibration text, summed over the outputs, of a weight that is scaled and rounded.

    With d the change of an output channel's weights it is d H dᵀ: no activation has to be seen again.
    """
    w_NK = w.astype(jnp.float32).reshape(-1, scale_K.size)
    scaled = (w_NK * scale_K[None]).reshape(w.shape)
    error_NK = dequantize(quantize(scaled, contracted, fmt)).reshape(w_NK.shape) / scale_K[None] - w_NK
    return jnp.sum(jnp.matmul(error_NK, hessian_KK, precision=jax.lax.Precision.HIGHEST) * error_NK)


def smoothquant(
    cfg: ModelConfig, leaves: Leaves, inputs: Mapping[str, Inputs], chosen: Collection[str], alpha: float
) -> tuple[dict[str, Weight], dict[str, Inputs]]:
    """The layer's weights and inputs with the activations after each norm evened out.

    chosen: the weights that are about to be quantised.
    """

    def scale_of(site: str, found: Inputs, readers: dict[str, jax.Array]) -> jax.Array:
        assert found.absmax is not None
        largest = [jnp.max(jnp.abs(w.reshape(-1, found.absmax.size)), axis=0) for w in readers.values()]
        return smoothquant_scale(found.absmax, functools.reduce(jnp.maximum, largest).astype(jnp.float32), alpha)

    sites = {site: inputs[site] for site in SMOOTHQUANT_SITES if site in inputs}
    return _rescale(cfg, leaves, sites, inputs, chosen, scale_of)


def awq(
    cfg: ModelConfig,
    leaves: Leaves,
    inputs: Mapping[str, Inputs],
    formats: Mapping[str, Format],
    contracted: Mapping[str, int],
) -> tuple[dict[str, Weight], dict[str, Inputs]]:
    """The layer's weights and inputs with the weights of loud channels enlarged, by the scale that loses least.

    formats: of each reader; a site is scaled where all its readers have one.
    """

    def scale_of(site: str, found: Inputs, readers: dict[str, jax.Array]) -> jax.Array:
        assert found.mean_abs is not None
        assert found.hessian is not None
        tried = [_foldable(cfg, site, scale_K) for scale_K in awq_scales(found.mean_abs)]
        losses = [
            sum(output_error(w, s, found.hessian, contracted[name], formats[name]) for name, w in readers.items())
            for s in tried
        ]
        return tried[int(jnp.argmin(jnp.stack(losses)))]  # pyright: ignore[reportArgumentType]

    sites = {site: found for site, found in inputs.items() if all(reader in formats for reader in SITES[site])}
    return _rescale(cfg, leaves, sites, inputs, formats, scale_of)


def _foldable(cfg: ModelConfig, site: str, scale_K: jax.Array) -> jax.Array:
    """The scale that the module before can take: query heads of a group share their value head's channels."""
    if site != "attn/v":
        return scale_K
    (kv_heads,) = cfg.widths("num_kv_heads")
    scale_KGH = scale_K.reshape(kv_heads, -1, cfg.head_dim)
    middle = jnp.exp(jnp.mean(jnp.log(scale_KGH), axis=1, keepdims=True))
    return jnp.broadcast_to(middle, scale_KGH.shape).reshape(-1)


def _rescale(
    cfg: ModelConfig,
    leaves: Leaves,
    sites: Mapping[str, Inputs],
    inputs: Mapping[str, Inputs],
    chosen: Collection[str],
    scale_of: Callable[[str, Inputs, dict[str, jax.Array]], jax.Array],
) -> tuple[dict[str, Weight], dict[str, Inputs]]:
    """Weights that are `chosen` stay float32 until they are quantised, so that they are rounded once."""
    out, new_inputs = dict(leaves), dict(inputs)
    for site, found in sites.items():
        if isinstance(out[f"{site}/w"], QArray):
            continue  # it cannot take a scale
        # The weights as they are now: scaling the value projection's outputs is seen by none of its site's readers.
        readers: dict[str, jax.Array] = {name: out[name] for name in SITES[site]}  # pyright: ignore
        scale_K = scale_of(site, found, readers)
        for name, w in readers.items():
            kept = [1] * (w.ndim - (2 if name == "attn/o/w" else 1))
            inner = w.shape[len(kept) :]
            out[name] = w.astype(jnp.float32) * scale_K.reshape(*kept, *inner)
        for name in (f"{site}/w", f"{site}/b"):
            if name in out:
                divided = _divide_outputs(out[name], scale_K, site, cfg)  # pyright: ignore[reportArgumentType]
                out[name] = divided if name in chosen else divided.astype(leaves[name].dtype)  # pyright: ignore
        new_inputs[site] = found.divided(scale_K)
    return out, new_inputs


def _divide_outputs(w: jax.Array, scale_K: jax.Array, site: str, cfg: ModelConfig) -> jax.Array:
    if site == "attn/v":  # one query head of each group stands for its value head
        (kv_heads,) = cfg.widths("num_kv_heads")
        scale_K = scale_K.reshape(kv_heads, -1, cfg.head_dim)[:, 0].reshape(-1)
    rows = scale_K.size
    assert math.prod(w.shape) % rows == 0
    return (w.astype(jnp.float32).reshape(rows, -1) / scale_K[:, None]).reshape(w.shape)
