"""Transforms that change a model a layer at a time, so that they also run where the model does not fit into memory."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.arrays import Weight
from jaxllm.calibrate import Inputs, Kind, Walk
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Transform, record, require_order
from jaxllm.params import flatten, unflatten

_log = logging.getLogger(__name__)

Leaves = Mapping[str, Weight]  # of one group, by path within it: "attn/q/w"; "w" for the embedding
Change = Callable[[str, Leaves, Mapping[str, Inputs]], Leaves]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a transform does to a model of which it has seen the config, but no weight.

    cfg: of the result.
    change(group, leaves, inputs) -> leaves: the new weights of a group. inputs: by site; empty unless asked for.
    args, touched: for the ledger.
    tokens_NT, kinds, sites: calibration text, the statistics that are needed on it, and of which layers' sites; None
        and empty where none is.
    bits: a weight, scales included, by path, of those that change it; for estimates.
    """

    cfg: ModelConfig
    change: Change
    args: Mapping[str, Any]
    touched: Sequence[str]
    tokens_NT: np.ndarray | None = None
    kinds: tuple[Kind, ...] = ()
    sites: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    bits: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """A Transform that works layer by layer.

    plan(lm): looks at the config, ledger and tokenizer only, and raises ValueError for what cannot be.
    """

    name: str
    plan: Callable[[LM], Plan]

    def __call__(self, lm: LM) -> LM:
        plan = self.prepare(lm)
        out: dict[str, Weight] = {}
        for group, leaves in run([Stage(self.name, lm.cfg, plan)], split(lm.params)):
            out |= joined(group, leaves)
        return record(lm, self.name, plan.args, plan.touched, cfg=plan.cfg, params=unflatten(out))

    def prepare(self, lm: LM) -> Plan:
        """The plan for this model. Raises ValueError when the transform may not follow the model's ledger."""
        require_order(lm, self.name)
        return self.plan(lm)


def check(lm: LM, transforms: Sequence[Transform]) -> None:
    """Raises what the transforms would raise for this model, before any of them changes a weight.

    Looks no further than the first that has to see the weights before it knows what it makes of them.
    """
    for transform in transforms:
        if not isinstance(transform, Layerwise):
            return
        plan = transform.prepare(lm)
        lm = record(lm, transform.name, plan.args, plan.touched, cfg=plan.cfg)


class Stage:
    """One transform on its way through a model: its plan, and the residual stream that its statistics come from."""

    def __init__(self, name: str, cfg: ModelConfig, plan: Plan):
        self.name, self.plan = name, plan
        self._cfg = cfg  # of the model before
        self.walk = None if plan.tokens_NT is None else Walk(plan.tokens_NT)

    def change(self, group: str, leaves: Leaves) -> Leaves:
        """The group's new weights. Groups come in the order of `groups`."""
        layer = layer_number(group)
        if self.walk is None or layer is None:
            new = self.plan.change(group, leaves, {})
            if self.walk is not None and group == "embed":
                self.walk.embed(self.plan.cfg, new)
            return new
        inputs = {}
        if sites := self.plan.sites.get(group):
            inputs = self.walk.inputs(self._cfg.layer(layer), unflatten(leaves), self.plan.kinds, sites)
        new = self.plan.change(group, leaves, inputs)
        if self.walks_past(group):
            self.walk.advance(self.plan.cfg.layer(layer), unflatten(new))
        return new

    def walks_past(self, group: str) -> bool:
        """Whether later groups need the residual stream as it is after this one."""
        at = {"embed": -1}.get(group, layer_number(group))
        sites = map(layer_number, self.plan.sites)
        return self.walk is not None and at is not None and any(later > at for later in sites if later is not None)


def run(stages: Sequence[Stage], source: Iterable[tuple[str, Leaves]]) -> Iterable[tuple[str, Leaves]]:
    """Passes each group through all stages; logs progress once a second at most."""
    start = last = time.monotonic()
    for group, leaves in source:
        for stage in stages:
            leaves = stage.change(group, leaves)
        jax.block_until_ready(leaves)
        if time.monotonic() - last > 1:
            last = time.monotonic()
            _log.info("%s: %s done, %.0f s", " + ".join(stage.name for stage in stages), group, last - start)
        yield group, leaves


def each_alone(
    lm: LM, transforms: Mapping[Hashable, Layerwise], tokens_NT: np.ndarray
) -> Callable[[int], dict[Hashable, tuple[ModelConfig, Mapping[str, Any]]]]:
    """What each transform makes of a layer when all layers before it are as they were.

    transforms: by name, none of which leaves a layer alone; calibrated on tokens_NT or not at all.
    Returns a function of the layer's number, to be called once for each in order: by name, its config and weights.
    """
    plans = {name: transform.prepare(lm) for name, transform in transforms.items()}
    kinds: tuple[Kind, ...] = tuple(dict.fromkeys(kind for plan in plans.values() for kind in plan.kinds))
    walk = Walk(tokens_NT)
    if kinds:
        walk.embed(lm.cfg, lm.params["embed"])

    def variants(i: int) -> dict[Hashable, tuple[ModelConfig, Mapping[str, Any]]]:
        group = f"layers_{i}"
        sites = {site for plan in plans.values() for site in plan.sites.get(group, ())}
        inputs = walk.inputs(lm.cfg.layer(i), lm.params[group], kinds, sites) if sites else {}
        if kinds:
            walk.advance(lm.cfg.layer(i), lm.params[group])
        leaves = flatten(lm.params[group])
        out = {}
        for name, plan in plans.items():
            own = {site: inputs[site] for site in plan.sites.get(group, ())}
            out[name] = plan.cfg.layer(i), unflatten(plan.change(group, leaves, own))
        return out

    return variants


def layer_number(group: str) -> int | None:
    return int(group.removeprefix("layers_")) if group.startswith("layers_") else None


def groups(cfg: ModelConfig) -> list[str]:
    """The parts of a model in the order of the forward pass; each has weights below its name."""
    head = [] if cfg.tie_embeddings else ["head"]
    return ["embed", *(f"layers_{i}" for i in range(cfg.num_layers)), "final_norm", *head]


def split(params: Mapping[str, Any]) -> Iterable[tuple[str, Leaves]]:
    layers = sorted((name for name in params if name.startswith("layers_")), key=lambda name: layer_number(name) or 0)
    for name in ["embed", *layers, *(name for name in ("final_norm", "head") if name in params)]:
        yield name, flatten(params[name])


def joined(group: str, leaves: Leaves) -> dict[str, Weight]:
    """By path in the model."""
    return {f"{group}/{path}": leaf for path, leaf in leaves.items()}
