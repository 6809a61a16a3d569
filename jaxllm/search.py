"""The best mix of precision, channels, heads and layers for a budget: predicted by layer, then measured as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from jaxllm import formats
from jaxllm.calibrate import calibration_tokens
from jaxllm.evaluate import Quality, compare
from jaxllm.generate import compile as compile_lm
from jaxllm.lm import LM, chain
from jaxllm.measure import Workload, measure, read_bandwidth
from jaxllm.params import flatten
from jaxllm.sensitivity import Option, allocate, layer_damage, within
from jaxllm.transforms.compact import compact, keep_layers, kept_counts
from jaxllm.transforms.layerwise import Layerwise, each_alone
from jaxllm.transforms.prune import IN_LAYERS
from jaxllm.transforms.quantize import ENDS, Clip, Method, quantize

_log = logging.getLogger(__name__)

Unit = Literal["bytes", "ms", "params"]
FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Space:
    """What may be done to each layer, in any combination.

    formats: of its weights; "float" leaves them. With another one, embedding and head may become int8.
    ffn: fractions of its channels that may stay. kv_heads: counts of KV heads that may. drop: whether it may go.
    """

    formats: tuple[str, ...] = (FLOAT, "int8", "int4-g32")
    ffn: tuple[float, ...] = (1.0,)
    kv_heads: tuple[int, ...] = ()
    drop: bool = False

    def __post_init__(self):
        if not self.formats or not self.ffn:
            raise ValueError(f'The search has no formats or no ffn; "{FLOAT}" and 1.0 leave a layer as it is.')
        for name in self.formats:
            if name != FLOAT:
                formats.parse(name)
        for fraction in self.ffn:
            if not 0 < fraction <= 1:
                raise ValueError(f"ffn has {fraction}; expected fractions of the channels that stay, in (0, 1].")

    def choices(self) -> list[Choice]:
        """Of a layer that stays."""
        mixes = itertools.product(self.formats, self.ffn, (None, *self.kv_heads))
        return [Choice(name, fraction, count) for name, fraction, count in mixes]

    def parts(self) -> list[Space]:
        """This space and those with less freedom. Damages do not quite add up, least of all those of whole layers, so
        the best of the smaller space may turn out better."""
        out: list[Space] = [self]
        if self.drop:
            out.append(dataclasses.replace(out[-1], drop=False))
        if self.kv_heads and len(self.ffn) > 1:
            out.append(dataclasses.replace(out[-1], kv_heads=()))
        return out


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of one layer. kv_heads None keeps all; format None drops the layer."""

    format: str | None
    ffn: float = 1.0
    kv_heads: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mix that was applied and measured.

    cost: in the search's unit, as measured (bytes, params) or predicted (ms). predicted_kl: the sum of the layers'.
    recipe: Python that makes it, for a file.
    """

    name: str
    cost: float
    weight_bytes: int
    params: int
    predicted_kl: float
    quality: Quality
    recipe: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found. best: index of the candidate that keeps budget and bound with the least KL; None if none."""

    unit: Unit
    budget: float
    original_cost: float
    original: Quality
    candidates: tuple[Candidate, ...]
    best: int | None


def search(
    lm: LM,
    tokens_NT: np.ndarray,
    budget: float,
    unit: Unit = "bytes",
    space: Space | None = None,
    max_kl: float = math.inf,
    method: Method = "rtn",
    clip: Clip = "mse",
    calibration: Any = None,
    windows: int = 1,
) -> Result:
    """Looks for the mix that loses least within a budget.

    Each change is made to each layer alone and its KL measured on the first `windows` of the calibration text. Damages
    are taken to add up, and the budget is spent where it hurts least. The mixes for the budget and some around it are
    then made and measured on tokens_NT, which must be another text.

    budget: a fraction of the original's cost, in (0, 1], or more than 1: bytes of all weights, ms a decode step at
        batch 1 on this machine, or parameters, by `unit`.
    max_kl: the most that the chosen mix may differ from the original, in nats.
    method, clip: of the quantisation; single layers are always rounded to nearest.
    Raises ValueError when no mix of the space is so cheap.
    """
    space = Space() if space is None else space
    if unit not in get_args(Unit):
        raise ValueError(f"unit is {unit!r}; expected one of {', '.join(get_args(Unit))}.")
    if not budget > 0:
        raise ValueError(f"budget is {budget}; expected a fraction of the original's cost, or more than 1 of {unit}.")
    calibration_NT = calibration_tokens(lm, calibration)
    if windows < 1:
        raise ValueError(f"windows is {windows}; sensitivity is measured on at least one.")
    costs = _Costs(lm, unit, space, calibration_NT)
    limit = budget * costs.original if budget <= 1 else budget
    if (least := costs.least(space)) > limit:
        raise ValueError(
            f"The budget is {limit:.4g} {unit}; the cheapest choice of the options given costs {least:.4g}."
        )
    damage = _measure(lm, space, calibration_NT, windows, clip)
    ends = _ends(lm, space, costs, calibration_NT[:windows])

    def front(part: Space) -> list[tuple[Option, ...]]:
        return allocate([ends, *(_options(lm, part, costs, i, damage[i]) for i in range(lm.cfg.num_layers))])

    picks = {f"{unit} <= {limit:.4g}": within(front(space), limit)}
    for part in space.parts()[1:]:
        kinds = "channels" if not part.kv_heads else "channels and heads"
        if _cheapest(front(part)) <= limit:
            picks[f"{unit} <= {limit:.4g}, {kinds} only"] = within(front(part), limit)
    for share in (0.25, 0.5, 0.75):  # the rest of the front, from the cheapest to the original
        other = _cheapest(front(space)) * (1 - share) + costs.original * share
        picks[f"{unit} <= {other:.4g}"] = within(front(space), other)
    how = {"method": method, "clip": clip}
    candidates, seen = [], {}
    for name, chosen in picks.items():
        if chosen in seen:
            continue
        seen[chosen] = name
        _log.info("search: making and measuring %s", name)
        candidates.append(_candidate(lm, name, chosen, costs, tokens_NT, calibration_NT, how))
    allowed = [i for i, c in enumerate(candidates) if c.cost <= limit * (1 + 1e-6) and c.quality.kl <= max_kl]
    best = min(allowed, key=lambda i: candidates[i].quality.kl, default=None)
    original = compare(lm, lm, tokens_NT)
    return Result(unit, limit, costs.original, original, tuple(candidates), best)


def _cheapest(front: Sequence[tuple[Option, ...]]) -> float:
    return sum(option.cost for option in front[-1])


class _Costs:
    """What a layer of a shape and a format, and what is in no layer, cost in the search's unit."""

    def __init__(self, lm: LM, unit: Unit, space: Space, calibration_NT: np.ndarray):
        self.unit, self._lm = unit, lm
        names = {FLOAT, *space.formats}
        in_layers, total = _in_layers(lm, unit), float(lm.num_params if unit == "params" else lm.weight_bytes)
        self.ends = {FLOAT: total - in_layers}
        sizes = {name: in_layers if unit == "params" or name == FLOAT else self._bytes(name) for name in names}
        if space.formats != (FLOAT,):
            small = quantize({ENDS: "int8"})(lm)
            self.ends["int8"] = float(small.num_params if unit == "params" else small.weight_bytes) - in_layers
        if unit == "ms":
            sizes = self._time(names, calibration_NT)
        self._per_param = {name: size / _in_layers(lm, "params") for name, size in sizes.items()}
        self.original = sizes[FLOAT] + self.ends[FLOAT]

    def _bytes(self, name: str) -> float:
        """Of all layers in a format."""
        total = 0.0
        for path, leaf in flatten(self._lm.params).items():
            info = self._lm.info[path]
            if info.contracted and path.startswith("layers_"):
                width = math.prod(info.shape[-info.contracted :])
                total += leaf.size * formats.parse(name).bits_per_weight(width) / 8
            elif path.startswith("layers_"):
                total += leaf.nbytes
        return total

    def _time(self, names: Collection[str], calibration_NT: np.ndarray) -> dict[str, float]:
        """Milliseconds of a decode step in all layers; those outside them go to `ends`.

        A model of one layer tells the two apart, and int8 outside the layers is timed with it.
        """
        models = {
            name: self._lm if name == FLOAT else quantize({IN_LAYERS: name}, calibration=calibration_NT)(self._lm)
            for name in names
        }
        one = keep_layers(self._lm, [0])
        timed = {**models, "one layer": one}
        if "int8" in self.ends:
            timed["one layer, int8 ends"] = quantize({ENDS: "int8"})(one)
        work = Workload(prompt_tokens=16, new_tokens=48, rounds=3, max_len=64)
        engines = {name: compile_lm(model, max_len=work.max_len) for name, model in timed.items()}
        speeds = measure(engines, work, read_bandwidth(), _log.info)
        a_layer = (speeds[FLOAT].step_ms - speeds["one layer"].step_ms) / max(1, self._lm.cfg.num_layers - 1)
        for name, of in zip(self.ends, ("one layer", "one layer, int8 ends"), strict=False):
            self.ends[name] = max(0.0, speeds[of].step_ms - max(0.0, a_layer))  # a small model's times are noise
        return {name: max(0.0, speeds[name].step_ms - self.ends[FLOAT]) for name in models}

    def layer(self, i: int, choice: Choice) -> float:
        if choice.format is None:
            return 0.0
        own = self._lm.cfg.layer(i)
        kept = kept_counts(own, ffn=choice.ffn)["ffn"][0] / own.widths("ffw_dim")[0]
        heads = 1.0 if choice.kv_heads is None else min(1.0, choice.kv_heads / own.widths("num_kv_heads")[0])
        shares = {"mlp": kept, "attn": heads}
        leaves = flatten(self._lm.params[f"layers_{i}"]).items()
        return (
            sum(leaf.size * shares.get(path.split("/")[0], 1.0) for path, leaf in leaves)
            * self._per_param[choice.format]
        )

    def least(self, space: Space) -> float:
        """Of the cheapest mix."""
        if space.drop:
            return min(self.ends.values())
        layers = [min(self.layer(i, choice) for choice in space.choices()) for i in range(self._lm.cfg.num_layers)]
        return min(self.ends.values()) + sum(layers)


def _in_layers(lm: LM, unit: Unit) -> float:
    leaves = [leaf for path, leaf in flatten(lm.params).items() if path.startswith("layers_")]
    return float(sum(leaf.size if unit == "params" else leaf.nbytes for leaf in leaves))


def _measure(lm: LM, space: Space, tokens_NT: np.ndarray, windows: int, clip: Clip) -> list[dict[Hashable, float]]:
    """For each layer the damage of each single change."""
    changes: dict[Hashable, Layerwise] = {}
    for name in space.formats:
        if name != FLOAT:
            how: Clip = "absmax" if name == "fp8" else clip
            changes["format", name] = cast(Layerwise, quantize({IN_LAYERS: name}, "rtn", how, calibration=tokens_NT))
    for fraction in space.ffn:
        if fraction < 1:
            changes["ffn", fraction] = cast(Layerwise, compact(ffn=fraction, calibration=tokens_NT))
    own = lm.cfg.widths("num_kv_heads")
    for heads in space.kv_heads:
        if heads < max(own):
            fewer = [min(heads, count) for count in own]
            changes["kv_heads", heads] = cast(Layerwise, compact(kv_heads=fewer, calibration=tokens_NT))
    alone = each_alone(lm, changes, tokens_NT)
    gone = {("drop",): None} if space.drop else {}
    _log.info("search: %d changes of each of %d layers", len(changes) + len(gone), lm.cfg.num_layers)
    return layer_damage(lm, tokens_NT[:windows], lambda i: {**alone(i), **gone})


def _options(lm: LM, space: Space, costs: _Costs, i: int, damage: Mapping[Hashable, float]) -> list[Option]:
    out = []
    for choice in space.choices():
        if choice.kv_heads is not None and choice.kv_heads >= lm.cfg.widths("num_kv_heads")[i]:
            continue
        lost = damage["format", choice.format] if choice.format != FLOAT else 0.0
        lost += damage["ffn", choice.ffn] if choice.ffn < 1 else 0.0
        lost += damage["kv_heads", choice.kv_heads] if choice.kv_heads is not None else 0.0
        out.append(Option(choice, costs.layer(i, choice), lost))
    if space.drop:
        out.append(Option(Choice(None), 0.0, damage[("drop",)]))
    return out


def _ends(lm: LM, space: Space, costs: _Costs, tokens_NT: np.ndarray) -> list[Option]:
    out = [Option(FLOAT, costs.ends[FLOAT], 0.0)]
    if "int8" in costs.ends:
        out.append(Option("int8", costs.ends["int8"], compare(quantize({ENDS: "int8"})(lm), lm, tokens_NT).kl))
    return out


def _candidate(
    lm: LM,
    name: str,
    chosen: tuple[Option, ...],
    costs: _Costs,
    tokens_NT: np.ndarray,
    calibration_NT: np.ndarray,
    how: Mapping[str, Any],
) -> Candidate:
    steps = _steps(lm, cast(str, chosen[0].name), [cast(Choice, option.name) for option in chosen[1:]], how)
    made = chain(*(_TRANSFORMS[step](**args, calibration=calibration_NT) for step, args in steps))(lm)
    cost = {"bytes": made.weight_bytes, "params": made.num_params, "ms": sum(option.cost for option in chosen)}
    return Candidate(
        name=name,
        cost=float(cost[costs.unit]),
        weight_bytes=made.weight_bytes,
        params=made.num_params,
        predicted_kl=sum(option.damage for option in chosen),
        quality=compare(made, lm, tokens_NT),
        recipe=_recipe(steps),
    )


_TRANSFORMS = {"compact": compact, "quantize": quantize}


def _steps(lm: LM, ends: str, choices: Sequence[Choice], how: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of a mix, with their arguments."""
    kept = [i for i, choice in enumerate(choices) if choice.format is not None]
    stay = [choices[i] for i in kept]
    steps: list[tuple[str, dict[str, Any]]] = []
    if len(kept) < len(choices):
        steps.append(("compact", {"layers": kept}))
    widths: dict[str, Any] = {}
    if any(choice.ffn < 1 for choice in stay):
        widths["ffn"] = [choice.ffn for choice in stay]
    if any(choice.kv_heads is not None for choice in stay):
        own = [lm.cfg.widths("num_kv_heads")[i] for i in kept]
        widths["kv_heads"] = [count if c.kv_heads is None else c.kv_heads for c, count in zip(stay, own, strict=True)]
    if widths:
        steps.append(("compact", widths))
    rules = {ENDS: ends} if ends != FLOAT else {}
    for name in dict.fromkeys(choice.format for choice in stay):
        if name != FLOAT:
            numbers = [str(at) for at, choice in enumerate(stay) if choice.format == name]
            some = rf"layers_({'|'.join(numbers)})/.*"
            rules[some if len(numbers) < len(stay) else IN_LAYERS] = cast(str, name)
    if rules:
        steps.append(("quantize", {"format": rules, **how}))
    return steps


def _recipe(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = []
    for name, args in steps:
        given = "".join(f"            {key}={value!r},\n" for key, value in args.items())
        lines.append(f"        jaxllm.{name}(\n{given}            calibration=calibration,\n        ),\n")
    return f"import jaxllm\n\n\ndef transforms(calibration=None):\n    return [\n{''.join(lines)}    ]\n"


def write_recipe(result: Result, path: Path, model: str, options: str = "") -> None:
    """The best candidate as a Python file for `jaxllm optimize --recipe`, what was measured on top.

    options: for the command line, such as those of the calibration text, where it is not the shipped one; the recipe
        then insists on getting a text.
    """
    assert result.best is not None
    found, before = result.candidates[result.best], result.original
    made_how = found.recipe
    if options:
        head = "def transforms(calibration=None):\n"
        insist = f'    if calibration is None:\n        raise ValueError("Found on another text; add{options}.")\n'
        made_how = made_how.replace(head, head + insist)
    path.write_text(
        f'"""{model}: {found.name} (from {result.original_cost:.4g}).\n\n'
        f"Measured: {found.params / 1e6:.1f} M parameters, {found.weight_bytes / 1e6:.1f} MB, perplexity "
        f"{found.quality.perplexity:.2f} from {before.perplexity:.2f}, KL {found.quality.kl:.4f}, top-1 agreement "
        f"{found.quality.top1:.1%}.\n"
        f'Run: jaxllm optimize {model} --recipe {path.name}{options} --out DIR\n"""\n\n{made_how}',
        encoding="utf-8",
    )


def plot(result: Result, path: Path) -> None:
    """Writes a PNG: KL against cost, one point a candidate, the front of them joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = sorted((c.cost, c.quality.kl, i) for i, c in enumerate(result.candidates))
    front = [p for p in points if not any(q[0] <= p[0] and q[1] < p[1] for q in points)]
    axes.plot([p[0] for p in front], [p[1] for p in front], "-", alpha=0.4)
    for cost, kl, i in points:
        axes.scatter(cost, kl, s=90 if i == result.best else 40, marker="*" if i == result.best else "o")
    axes.axvline(result.budget, linestyle=":", alpha=0.5)
    axes.set_xlabel(f"{result.unit} (original {result.original_cost:.4g}); dotted: the budget")
    axes.set_ylabel("KL from the original, nats")
    axes.set_yscale("log")
    axes.set_title("Mixes that were made and measured; the star is the recipe")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
