"""Pruning in place: zeros where weights matter least. Shapes, and so a dense program's speed, stay as they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

from jaxllm.calibrate import SITE_OF, SITES, Inputs, Kind, Walk, calibration_tokens, describe, sites_of
from jaxllm.lm import LM, Transform, record, require_order
from jaxllm.params import assign, flatten, select, unflatten
from jaxllm.sensitivity import Option, allocate, layer_damage, within
from jaxllm.transforms import obs
from jaxllm.transforms.layerwise import Layerwise, Leaves, Plan, each_alone
from jaxllm.transforms.mask import Pattern, below_threshold, check_pattern, choose, global_threshold, parse_pattern

Method = Literal["magnitude", "wanda", "sparsegpt"]
_SPARSITY_STEP = 0.1  # between those that are tried for a layer
IN_LAYERS = r"layers_\d+/.*"  # leaves embedding and head alone


def prune(
    sparsity: float | Mapping[str, float] | None = None,
    method: Method = "magnitude",
    pattern: str = "unstructured",
    scope: Literal["layer", "global", "sensitivity"] = "layer",
    match: str = IN_LAYERS,
    calibration: Any = None,
) -> Transform:
    """Zeroes the weights that matter least.

    sparsity: fraction of zeros, in [0, 1), exact: floor(sparsity * size) weights, or blocks, become zero, the first of
        equal ones; more only where there are more zeros already (in a channel, for "wanda"), and a little more with
        scope="sensitivity". Or rules, {regular expression for whole weight paths: fraction}, of which the first that
        matches a weight holds. N:M patterns say it themselves.
    method: "magnitude" scores a weight by |w|; "wanda" by |w| times the root mean square of its input, and compares
        within an output channel; "sparsegpt" by what its loss does to the output when the weights that stay are
        corrected, and corrects them.
    pattern: "unstructured", "N:M" (keep N of M neighbouring inputs), or "RxC" (blocks of R outputs by C inputs go).
    scope: "layer" gives each matrix that sparsity. "global" and "sensitivity" give it to all matching ones together:
        "global" by one threshold on the scores, "sensitivity" by a sparsity for each layer, chosen by the KL that
        pruning the layer alone, at several sparsities, causes on the first calibration window.
    match: regular expression for whole weight paths, where sparsity is one number.
    calibration: integer ids [N, T] that "wanda" and "sparsegpt" see; by default the text that ships with the package.

    The layers are pruned in order, each on what the pruned ones before it put out.
    Raises ValueError for a pattern that does not divide a weight, a rule or `match` that matches nothing, and for a
    model that is quantised already.
    Sources: Han et al. 2015; Sun et al. 2024 (Wanda); Frantar & Alistarh 2023 (SparseGPT); Mishra et al. 2021 (2:4).
    """
    shape = parse_pattern(pattern)
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}.")
    if scope not in ("layer", "global", "sensitivity"):
        raise ValueError(f'scope is {scope!r}; expected "layer", "global" or "sensitivity".')
    if shape.sparsity is not None and sparsity in (None, shape.sparsity):
        sparsity = shape.sparsity
    elif shape.sparsity is not None:
        raise ValueError(f"sparsity is {sparsity}; the pattern {pattern} makes it {shape.sparsity}. Leave it out.")
    if sparsity is None:
        raise ValueError("sparsity is missing: the fraction of zeros, in [0, 1).")
    for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if not 0 <= value < 1:
            raise ValueError(f"sparsity is {value}; expected a fraction of zeros in [0, 1).")
    if scope == "global" and (method == "sparsegpt" or pattern != "unstructured" or isinstance(sparsity, Mapping)):
        raise ValueError('scope="global" goes with one sparsity, the unstructured pattern, and magnitude or wanda.')
    rules = sparsity if isinstance(sparsity, Mapping) else {match: float(sparsity)}
    args = {"sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else float(sparsity), "method": method}
    args |= {"pattern": pattern, "scope": scope} | ({} if isinstance(sparsity, Mapping) else {"match": match})
    if scope == "sensitivity" and (shape.of or isinstance(sparsity, Mapping)):
        raise ValueError('scope="sensitivity" goes with one sparsity, not with rules or a pattern that says it.')
    if scope != "layer":
        assert not isinstance(sparsity, Mapping)
        return partial(_prune_globally if scope == "global" else _prune_by_sensitivity, sparsity, args, calibration)

    def plan(lm: LM) -> Plan:
        info, fractions = lm.info, assign(rules, lm.info)
        for path in fractions:
            rows = math.prod(info[path].shape[: -info[path].contracted])
            check_pattern(shape, rows, math.prod(info[path].shape) // rows, path)

        def change(group: str, leaves: Leaves, inputs: Mapping[str, Inputs]) -> Leaves:
            out, factors = dict(leaves), {}
            for name, leaf in leaves.items():
                path = f"{group}/{name}"
                if path not in fractions:
                    continue
                contracted, fraction = info[path].contracted, fractions[path]
                if method == "sparsegpt":
                    site = SITE_OF[name]
                    if site not in factors:
                        factors[site] = obs.inverse_factor(inputs[site].hessian)
                        obs.require_finite(factors[site], path)
                    out[name] = obs.prune(leaf, factors[site], contracted, shape, fraction)
                else:
                    squares = inputs[SITE_OF[name]].mean_square if method == "wanda" else None
                    out[name] = _zero(leaf, squares, contracted, shape, fraction)
            return out

        return _plan(lm, method, list(fractions), change, args, calibration)

    return Layerwise("prune", plan)


def cubic_schedule(
    sparsity: float, begin: int, end: int, initial: float = 0.0
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The sparsity to prune to at each step of a training: fast at first, slower as fewer weights are left.

    Gives step -> float32, which may be traced: `initial` up to step `begin`, `sparsity` from step `end` on, and between
    them s + (s0 - s) (1 - (t - begin) / (end - begin))³.
    Raises ValueError unless 0 <= initial <= sparsity < 1 and 0 <= begin < end.
    Source: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".
    """
    if not 0 <= initial <= sparsity < 1:
        raise ValueError(f"From {initial} to {sparsity}: expected 0 <= initial <= sparsity < 1.")
    if not 0 <= begin < end:
        raise ValueError(f"From step {begin} to {end}: expected 0 <= begin < end.")

    def at(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0.0, 1.0)
        return sparsity + (initial - sparsity) * (1 - done) ** 3

    return at


def _plan(lm: LM, method: str, paths: list[str], change: Any, args: Mapping[str, Any], calibration: Any) -> Plan:
    if method == "magnitude":
        return Plan(lm.cfg, change, args, paths)
    if beyond := [path for path in paths if not path.startswith("layers_")]:
        raise ValueError(f"{method} does not reach {beyond[0]}, whose inputs are not calibrated; use magnitude for it.")
    tokens_NT = calibration_tokens(lm, calibration)
    kinds: tuple[Kind, ...] = ("hessian",) if method == "sparsegpt" else ("mean_square",)
    args = {**args, "calibration": describe(tokens_NT)}
    return Plan(lm.cfg, change, args, paths, tokens_NT, kinds, sites_of(paths))


@partial(jax.jit, static_argnums=2)
def _score(w: jax.Array, mean_square_K: jax.Array | None, contracted: int) -> jax.Array:
    """float32 [N, K]."""
    kept = math.prod(w.shape[: w.ndim - contracted])
    score_NK = jnp.abs(w.astype(jnp.float32)).reshape(kept, -1)
    return score_NK if mean_square_K is None else score_NK * jnp.sqrt(mean_square_K)[None]


@partial(jax.jit, static_argnums=(2, 3, 4))
def _zero(
    w: jax.Array, mean_square_K: jax.Array | None, contracted: int, pattern: Pattern, sparsity: float
) -> jax.Array:
    score_NK = _score(w, mean_square_K, contracted)
    rows, columns = score_NK.shape
    by_row = mean_square_K is not None and pattern.block == (1, 1)
    row, column = pattern.block
    count: Any = int(sparsity * (w.size // (row * column)))
    if by_row:  # as evenly as the exact total allows
        ends = [int(sparsity * columns * r) for r in range(rows + 1)]
        count = jnp.asarray([[b - a] for a, b in itertools.pairwise(ends)], jnp.int32)
    gone_NK = choose(score_NK, pattern, count, by_row)
    return jnp.where(gone_NK.reshape(w.shape), jnp.zeros((), w.dtype), w)


def _prune_globally(sparsity: float, args: Mapping[str, Any], calibration: Any, lm: LM) -> LM:
    """One threshold for all weights; "wanda" scores them on what the unpruned layers put out."""
    require_order(lm, "prune")
    paths, info, flat = select(lm.info, args["match"]), lm.info, flatten(lm.params)
    squares: dict[str, jax.Array | None] = {}
    if args["method"] == "wanda":
        plan = _plan(lm, args["method"], paths, lambda group, leaves, inputs: leaves, args, calibration)
        assert plan.tokens_NT is not None
        args, walk = plan.args, Walk(plan.tokens_NT)
        walk.embed(lm.cfg, lm.params["embed"])
        for i in range(lm.cfg.num_layers):
            group, layer = f"layers_{i}", lm.params[f"layers_{i}"]
            found = walk.inputs(lm.cfg.layer(i), layer, plan.kinds, plan.sites.get(group, ()))
            squares |= {f"{group}/{name}": of.mean_square for site, of in found.items() for name in SITES[site]}
            walk.advance(lm.cfg.layer(i), layer)
    scores = [partial(_score, flat[path], squares.get(path), info[path].contracted) for path in paths]
    threshold, ties = global_threshold(scores, int(sparsity * sum(flat[path].size for path in paths)))
    for path, score in zip(paths, scores, strict=True):
        leaf: jax.Array = flat[path]
        gone, used = below_threshold(score(), threshold, min(ties, leaf.size))
        flat[path] = jnp.where(gone.reshape(leaf.shape), jnp.zeros((), leaf.dtype), leaf)
        ties -= int(used)
    return record(lm, "prune", args, paths, params=unflatten(flat))


def _prune_by_sensitivity(sparsity: float, args: Mapping[str, Any], calibration: Any, lm: LM) -> LM:
    """A sparsity for each layer, of several around the one asked for; the layers are then pruned in order."""
    require_order(lm, "prune")
    match, tokens_NT = args["match"], calibration_tokens(lm, calibration)
    paths = select(lm.info, match)
    if outside := [path for path in paths if not path.startswith("layers_")]:
        raise ValueError(f'scope="sensitivity" is measured layer by layer; {outside[0]} is in none.')
    sizes = [
        sum(math.prod(lm.info[path].shape) for path in paths if path.startswith(f"layers_{i}/"))
        for i in range(lm.cfg.num_layers)
    ]
    step = min(_SPARSITY_STEP, (1 - sparsity) / 3)
    tried = [s for n in range(-2, 3) if 0 <= (s := round(sparsity + n * step, 4)) < 1]
    options: dict[Hashable, Layerwise] = {
        s: cast(Layerwise, prune(s, args["method"], args["pattern"], match=match, calibration=tokens_NT)) for s in tried
    }
    damage = layer_damage(lm, tokens_NT[:1], each_alone(lm, options, tokens_NT))
    places = [
        [Option(s, (1 - s) * size, found[s]) for s in tried] for size, found in zip(sizes, damage, strict=True) if size
    ]
    chosen = iter(within(allocate(places), (1 - sparsity) * sum(sizes)))
    each = {i: cast(float, next(chosen).name) for i, size in enumerate(sizes) if size}
    rules = {rf"(?=layers_{i}/)(?:{match})": s for i, s in each.items()}
    # The ledger gets the rules that were found: replaying them needs no measuring.
    return prune(rules, args["method"], args["pattern"], calibration=tokens_NT)(lm)
