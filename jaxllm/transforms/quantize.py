"""Quantisation: fewer bits a weight, and where asked for, a token's activations or the cache's entries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import formats
from jaxllm.arrays import INT8_MAX, QArray
from jaxllm.calibrate import BIN_EDGES, SITE_OF, SITES, Inputs, Kind, calibration_tokens, describe, sites_of
from jaxllm.formats import Format
from jaxllm.lm import LM, Transform
from jaxllm.params import assign, flatten
from jaxllm.transforms import obs, scaling
from jaxllm.transforms.layerwise import Layerwise, Leaves, Plan

Method = Literal["rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq"]
Clip = Literal["absmax", "mse", "percentile"]

ENDS = r"embed/w|head/w"
_SHRINKS = [1 - step / 40 for step in range(25)]  # what the MSE-optimal clip tries: down to 0.4 of the range
_PERCENTILE = 99.9  # of |w| in a channel, or of |x| in a site, that the range covers
_CHUNK = 1 << 24  # weights rounded at a time: the temporaries are several times as large


def quantize(
    format: str | Mapping[str, str | None] = "int8",
    method: Method = "rtn",
    clip: Clip = "absmax",
    alpha: float = 0.5,
    calibration: Any = None,
) -> Transform:
    """Stores weights in fewer bits.

    format: "int8" and "int4" have a scale for each output channel, "int8-g64", "int4-g32" … one for each group of that
        many inputs; with "-affine" there are zero points as well. "fp8" is float8_e4m3fn by channel. "w8a8" rounds
        activations to int8 too, each token by its own range, "w8a8-static" by one that calibration fixes. Or rules,
        {regular expression for whole weight paths: format, or None to stay float}, of which the first that matches a
        weight holds. A format alone is for all weights but embedding and head, which are "int8" unless it is "fp8".
        Norms and biases are never quantised.
    method: "rtn" rounds to nearest. "gptq" rounds column by column, those of loud inputs first, and corrects the rest.
        "awq" and "smoothquant" first rescale channels, which leaves the float model what it was: "awq" by the scale
        that loses least, "smoothquant" so that activations are easier to round. Embedding and head are always rounded
        to nearest.
    clip: the range of each group that the grid covers: all of it; that of the least square error; or 99.9 % of the
        weights. For "w8a8-static" that of the activations as well. "fp8" among other formats keeps all of it.
    alpha: how far "smoothquant" moves the difficulty from activations (1) to weights (0).
    calibration: integer ids [N, T] for all but "rtn" with dynamic activations; by default the text that is shipped.

    Layers are quantised in order, each on what the quantised ones before it put out. Zeros stay zeros.
    Raises ValueError for rules that match nothing, groups that do not divide a weight, and a weight that is quantised.
    Sources: Jacob et al. 2018; Frantar et al. 2023 (GPTQ); Lin et al. 2024 (AWQ); Xiao et al. 2023 (SmoothQuant).
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}.")
    if clip not in get_args(Clip):
        raise ValueError(f"clip is {clip!r}; expected one of {', '.join(get_args(Clip))}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number from 0 to 1.")
    rules = default_rules(format) if isinstance(format, str) else dict(format)
    parsed = {pattern: None if name is None else formats.parse(name) for pattern, name in rules.items()}
    if clip != "absmax" and {fmt.values for fmt in parsed.values() if fmt is not None} == {"float8_e4m3fn"}:
        raise ValueError(f'clip="{clip}" goes with integer formats; fp8 has range to spare.')
    how = _How(method, clip, alpha)

    def plan(lm: LM) -> Plan:
        info, chosen = lm.info, assign(parsed, lm.info)
        for path, fmt in chosen.items():
            formats.check_group(fmt, info[path].shape, info[path].contracted, path)
            if fmt.inputs != "float" and not path.startswith("layers_"):
                raise ValueError(
                    f"{fmt.name} does not reach {path}: a looked-up table has no activations. Give it int8."
                )
        _refuse_quantised({path: leaf for path, leaf in flatten(lm.params).items() if path in chosen})
        contracted = {path: entry.contracted for path, entry in info.items()}
        widths = {path: math.prod(info[path].shape[-contracted[path] :]) for path in chosen}
        bits = {path: fmt.bits_per_weight(widths[path]) for path, fmt in chosen.items()}

        def change(group: str, leaves: Leaves, inputs: Mapping[str, Inputs]) -> Leaves:
            own = {name: chosen[path] for name in leaves if (path := f"{group}/{name}") in chosen}
            _refuse_quantised({f"{group}/{name}": leaves[name] for name in own})
            axes = {name: contracted[f"{group}/{name}"] for name in leaves}
            layer_cfg = lm.cfg.layer(0 if not group.startswith("layers_") else int(group.removeprefix("layers_")))
            return _quantize_group(layer_cfg, leaves, inputs, own, axes, how)

        args: dict[str, Any] = {"format": rules if not isinstance(format, str) else format, "method": method}
        args |= {"clip": clip} | ({"alpha": alpha} if "smoothquant" in method else {})
        layers = {path: fmt for path, fmt in chosen.items() if path.startswith("layers_")}
        if not (kinds := how.kinds(layers.values())):
            return Plan(lm.cfg, change, args, list(chosen), bits=bits)
        tokens_NT = calibration_tokens(lm, calibration)
        args["calibration"] = describe(tokens_NT)
        return Plan(lm.cfg, change, args, list(chosen), tokens_NT, kinds, sites_of(layers), bits)

    return Layerwise("quantize", plan)


def default_rules(format: str) -> dict[str, str | None]:
    """What a format alone means."""
    return {ENDS: format if format == "fp8" else "int8", ".*": format}


def _refuse_quantised(leaves: Leaves) -> None:
    if done := [path for path, leaf in leaves.items() if isinstance(leaf, QArray)]:
        raise ValueError(f"{done[0]} is quantised already; start from the original checkpoint.")


@dataclasses.dataclass(frozen=True)
class _How:
    method: Method
    clip: Clip
    alpha: float

    def kinds(self, chosen: Any) -> tuple[Kind, ...]:
        kinds: list[Kind] = []
        if "gptq" in self.method or "awq" in self.method:
            kinds.append("hessian")
        if "awq" in self.method:
            kinds.append("mean_abs")
        static = any(fmt.inputs == "static" for fmt in chosen)
        if "smoothquant" in self.method or static:
            kinds.append("absmax")
        if static and self.clip != "absmax":
            kinds.append("histogram")
        return tuple(kinds)


def _quantize_group(
    cfg: Any,
    leaves: Leaves,
    inputs: Mapping[str, Inputs],
    chosen: Mapping[str, Format],
    contracted: Mapping[str, int],
    how: _How,
) -> Leaves:
    out = dict(leaves)
    if inputs and "smoothquant" in how.method:
        whole = {site: found for site, found in inputs.items() if all(reader in chosen for reader in SITES[site])}
        out, changed = scaling.smoothquant(cfg, out, whole, chosen, how.alpha)
        inputs = {**inputs, **changed}
    if inputs and "awq" in how.method:
        out, changed = scaling.awq(cfg, out, inputs, chosen, contracted)
        inputs = {**inputs, **changed}
    factors: dict[str, tuple[jax.Array, jax.Array]] = {}
    for name, fmt in chosen.items():
        w = out[name]
        assert isinstance(w, jax.Array)
        if "gptq" in how.method and name in SITE_OF:
            site = SITE_OF[name]
            if site not in factors:
                factors[site] = obs.loudest_first(inputs[site].hessian)
                obs.require_finite(factors[site][1], name)
            q = obs.quantize(w, *factors[site], contracted[name], fmt, _shrink(w, contracted[name], fmt, how.clip))
        else:
            q = _round(w, contracted[name], fmt, how.clip)
        if fmt.inputs == "static":
            q = dataclasses.replace(q, x_scale=jnp.float32(static_range(inputs[SITE_OF[name]], how.clip) / INT8_MAX))
        out[name] = q
    return out


def _round(w: jax.Array, contracted: int, fmt: Format, clip: Clip) -> QArray:
    """A few rows at a time where the weight is large."""
    rows = max(1, _CHUNK // max(1, w.size // w.shape[0]))
    if rows >= w.shape[0]:
        return _round_rows(w, contracted, fmt, clip)
    parts = [_round_rows(w[start : start + rows], contracted, fmt, clip) for start in range(0, w.shape[0], rows)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round_rows(w: jax.Array, contracted: int, fmt: Format, clip: Clip) -> QArray:
    return formats.quantize(w, contracted, fmt, _shrink(w, contracted, fmt, clip))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _shrink(w: jax.Array, contracted: int, fmt: Format, clip: Clip) -> jax.Array:
    """How much of each group's range is kept: [n..., G], or one number."""
    if clip == "absmax" or fmt.values == "float8_e4m3fn":
        return jnp.float32(1)
    w_nGg = formats.as_groups(w, fmt, contracted)
    if clip == "mse":
        return best_shrink(w_nGg, fmt)
    absmax = jnp.max(jnp.abs(w_nGg), axis=-1)
    covered = jnp.percentile(jnp.abs(w_nGg), _PERCENTILE, axis=-1, method="higher")
    return jnp.where(absmax > 0, covered / absmax, 1.0)


def best_shrink(w_nGg: jax.Array, fmt: Format) -> jax.Array:
    """[n..., G]: how much of each group's range to keep for the least square error, of 25 choices from 1 to 0.4."""
    tried = jnp.asarray(_SHRINKS, jnp.float32)

    def error(shrink: jax.Array) -> jax.Array:
        scale, zero_point = formats.grid(w_nGg, fmt, shrink)
        values = formats.round_to(w_nGg, fmt, scale, zero_point)
        shift = 0.0 if zero_point is None else zero_point[..., None].astype(jnp.float32)
        return jnp.sum(jnp.square((values - shift) * scale[..., None].astype(jnp.float32) - w_nGg), axis=-1)

    def better(best: tuple[jax.Array, jax.Array], shrink: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, at = best
        now = error(shrink)
        return (jnp.minimum(now, least), jnp.where(now < least, shrink, at)), None

    first = error(tried[0])
    (_, at), _ = jax.lax.scan(better, (first, jnp.ones_like(first)), tried[1:])
    return at


def static_range(inputs: Inputs, clip: Clip) -> float:
    """The largest |x| that int8 activations with one step for all tokens can stand for."""
    assert inputs.absmax is not None
    absmax = float(jnp.max(inputs.absmax))
    if clip == "absmax" or absmax == 0:
        return absmax or 1.0
    counts = np.asarray(inputs.histogram, np.float64)
    if clip == "percentile":
        bin_ = int(np.searchsorted(np.cumsum(counts), counts.sum() * _PERCENTILE / 100))
        return min(absmax, float(BIN_EDGES[min(bin_, len(BIN_EDGES) - 1)]))
    # Each bin by its middle: what is inside the range is rounded (step² / 12), what is outside is clipped.
    middle = np.concatenate([[0.0], np.sqrt(BIN_EDGES[1:] * BIN_EDGES[:-1]), [absmax]])
    ranges = absmax * np.asarray(_SHRINKS)
    errors = [
        np.sum(counts * np.where(middle <= r, np.minimum((r / INT8_MAX) ** 2 / 12, middle**2), (middle - r) ** 2))
        for r in ranges
    ]
    return float(ranges[int(np.argmin(errors))])


def quantize_kv() -> Transform:
    """Keeps keys and values of the cache as int8, with a float32 scale for each head of each token.

    Perplexity sees it too: keys and values are rounded as soon as they are made, with a cache or without.
    """

    def plan(lm: LM) -> Plan:
        if lm.cfg.kv_dtype is not None:
            raise ValueError(f"The model's KV cache is {lm.cfg.kv_dtype} already.")
        return Plan(dataclasses.replace(lm.cfg, kv_dtype="int8"), lambda group, leaves, inputs: leaves, {}, [])

    return Layerwise("quantize_kv", plan)
