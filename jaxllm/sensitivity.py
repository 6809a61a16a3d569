"""How much each layer's change moves the predictions, and the choice of changes that a budget allows."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.evaluate import score
from jaxllm.lm import LM, embed_tokens, ends, logits, predict, run_layer
from jaxllm.params import Params

_log = logging.getLogger(__name__)

Layer = tuple[ModelConfig, Params]  # `ModelConfig.layer` of it and its weights


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to make a place of the model: what it costs, in bytes, milliseconds or parameters, and what it loses.

    damage: KL in nats from the whole model when only this place is so.
    """

    name: Hashable
    cost: float
    damage: float


def layer_damage(
    lm: LM,
    tokens_NT: np.ndarray,
    variants: Callable[[int], Mapping[Hashable, Layer | None]],
    reference: LM | None = None,
) -> list[dict[Hashable, float]]:
    """For each layer and each of its variants, the mean KL a prediction when only that layer is replaced.

    variants(i): by name, the layer to put in place of layer i; None leaves it out. Called once for each, in order.
    reference: whose predictions the KL is from; by default the model's own.
    Only the layers that come after are run again. Memory: float32 logits [N, T, V] of the model, and N streams.
    """
    shared, cfg = lm.cfg.layer(0), lm.cfg
    tokens = [jnp.asarray(tokens_T) for tokens_T in tokens_NT]
    expected = [logits(reference or lm, tokens_T[None])[0] for tokens_T in tokens]
    streams = [embed_tokens(shared, lm.params["embed"], tokens_T[None]) for tokens_T in tokens]
    last = ends(lm.params)
    predictions = tokens_NT.shape[0] * (tokens_NT.shape[1] - 1)
    out: list[dict[Hashable, float]] = []
    reported = time.monotonic()
    for i in range(cfg.num_layers):
        totals: dict[Hashable, float] = {}
        for name, layer in variants(i).items():
            total = 0.0
            for x_1TD, expected_TV, tokens_T in zip(streams, expected, tokens, strict=True):
                if layer is not None:
                    x_1TD = run_layer(*layer, x_1TD)
                for later in range(i + 1, cfg.num_layers):
                    x_1TD = run_layer(cfg.layer(later), lm.params[f"layers_{later}"], x_1TD)
                total += float(jnp.sum(score(predict(shared, last, x_1TD)[0], expected_TV, tokens_T)[:, 1]))
            totals[name] = total / predictions
        if not np.isfinite([*totals.values()]).all():
            raise ValueError(f"The predictions with layer {i} changed are not finite: {totals}.")
        out.append(totals)
        streams = [run_layer(cfg.layer(i), lm.params[f"layers_{i}"], x_1TD) for x_1TD in streams]
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            _log.info("sensitivity: layer %d of %d", i + 1, cfg.num_layers)
    return out


def allocate(places: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """The best choices for every budget: one option a place, from the least damage to the least cost.

    Damages are taken to add up. Each step makes the change that saves most cost for the damage it adds, along the lower
    convex hull of each place: what a Lagrange multiplier for the budget would choose.
    """
    hulls = [_hull(options) for options in places]
    at = [0] * len(hulls)
    front = [tuple(hull[0] for hull in hulls)]
    while True:
        steps = []
        for place, hull in enumerate(hulls):
            if at[place] + 1 < len(hull):
                now, then = hull[at[place]], hull[at[place] + 1]
                steps.append(((then.damage - now.damage) / (now.cost - then.cost), place))
        if not steps:
            return front
        _, place = min(steps)
        at[place] += 1
        front.append(tuple(hull[i] for hull, i in zip(hulls, at, strict=True)))


def within(front: Sequence[tuple[Option, ...]], budget: float) -> tuple[Option, ...]:
    """The least damage that costs at most `budget`. Raises ValueError when nothing is so cheap."""
    for choice in front:
        if sum(option.cost for option in choice) <= budget * (1 + 1e-9):  # of costs added in another order
            return choice
    least = sum(option.cost for option in front[-1])
    raise ValueError(f"The budget is {budget:.4g}; the cheapest choice of the options given costs {least:.4g}.")


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of damage over cost, by falling cost."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.cost, o.damage)):
        if hull and option.cost == hull[-1].cost:
            continue
        # Cheaper and no worse: the dearer ones are never chosen.
        while hull and hull[-1].damage >= option.damage:
            hull.pop()
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) >= _rate(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _rate(dear: Option, cheap: Option) -> float:
    return (cheap.damage - dear.damage) / (dear.cost - cheap.cost)
