"""Which transform, layer and weight broke a model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from jaxllm import evaluate
from jaxllm.evaluate import Quality
from jaxllm.lm import LM, Entry, check_tokens
from jaxllm.replay import ORIGINS, transforms_of
from jaxllm.swap import Pair, Place, same

NOTICEABLE_KL = 1e-4  # nats; below, a model predicts what its reference does, but for rounding
SHARE, GAP = 0.2, 2.5  # what stands out has this share of all damage and is this many times what comes next, or
MAJORITY = 0.5  # has more than this share alone
UNRECORDED = "not in the ledger"


@dataclasses.dataclass(frozen=True)
class Step:
    """The model after one transform of its ledger, done again from the reference.

    name: of the transform; UNRECORDED for the model itself where the ledger, done again, gives another one.
    perplexity, kl, top1: see `evaluate.Quality`. kl_increase: over the step before.
    culprits_kl: of the reference with nothing but this place taken from the model at this step, by the place's name.
    """

    name: str
    args: Mapping[str, Any]
    perplexity: float
    kl: float
    top1: float
    kl_increase: float
    culprits_kl: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `bisect` found.

    quality: the model's. reference_perplexity: what it was before.
    steps: in the ledger's order; no_steps: why there are none, "" otherwise.
    places: the ends first, then the layers.
    culprits: names of the places that stand out. verdict: all of it in one sentence.
    """

    quality: Quality
    reference_perplexity: float
    steps: tuple[Step, ...]
    no_steps: str
    places: tuple[Place, ...]
    culprits: tuple[str, ...]
    verdict: str


def bisect(
    lm: LM, reference: LM, tokens_NT: Any, calibration: Any = None, log: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Names the transform, the layer and the weight that broke a model.

    lm: what was made of `reference`, as its ledger says. Layers may have been removed or made narrower.
    tokens_NT: integer ids [N, T], T >= 2, that damage is measured on; one or two windows will do.
    calibration: for doing the ledger again; see `replay.transforms_of`.

    A place's damage is that of the reference with only this place taken from the model. The other way round, the model
    with one place restored, shows nothing when two places are each enough to ruin it, and mixes what a layer does with
    how it bears what others did. A place stands out that has more than half of the sum of all damages, or a fifth
    of it and 2.5 times what any other has; so may several that are alike, but no more than half of all places. Damages
    do not add up to the model's: layers make it worse, or better, for each other.

    Signal-to-noise ratios are those of the mean over tokens of |error|² / |reference|²: with sums over tokens, the few
    of huge activations that language models have would be all that is seen.

    Cost: with L layers about L² / 2 runs of a layer and L of the head, for each window. Memory: both models, one more
    while the ledger is done again, and a few residual streams and logits of one window.
    Raises ValueError when the models do not fit together, or the reference's own predictions are not finite.
    """
    tokens_NT = check_tokens(reference.cfg, tokens_NT)
    for name in ("vocab_size", "embed_dim"):
        if (mine := getattr(lm.cfg, name)) != (theirs := getattr(reference.cfg, name)):
            raise ValueError(f"The model's {name} is {mine} and the reference's {theirs}; it was not made from it.")
    try:
        entries, no_steps = _since(reference, lm), ""
    except ValueError as error:
        entries, no_steps = None, str(error)
    kept = _kept(lm, reference, entries or ())

    log(f"evaluating on {tokens_NT.size} tokens")
    quality = evaluate.compare(lm, reference, tokens_NT)
    reference_perplexity = evaluate.perplexity(reference, tokens_NT)
    if not math.isfinite(reference_perplexity):
        raise ValueError("The reference's own predictions are not finite; name a model that works.")
    pair = Pair(reference, lm, kept)
    places = pair.places(tokens_NT, log)
    methods = None if entries is None else [str(entry.args.get("method")) for entry in entries]
    damaged = not quality.kl < NOTICEABLE_KL  # NaN is damage
    culprits = stand_out([place.kl for place in places]) if damaged else []
    for at in culprits or [int(np.argmax([_badness(place.kl) for place in places]))]:
        places[at] = dataclasses.replace(places[at], parts=tuple(pair.parts(at, tokens_NT, methods, log)))
    steps: tuple[Step, ...] = ()
    if entries is not None:
        try:
            found = {at: places[at] for at in culprits}
            steps = tuple(_steps(lm, reference, entries, tokens_NT, quality, found, calibration, log))
        except ValueError as error:
            no_steps = str(error)
    names = tuple(places[at].name for at in culprits)
    verdict = _verdict(quality, steps, places, culprits)
    return Diagnosis(quality, reference_perplexity, steps, no_steps, tuple(places), names, verdict)


def stand_out(damages: Sequence[float]) -> list[int]:
    """Which damages stand out, the worst first; see `bisect`. All that are not finite do."""
    order = sorted(range(len(damages)), key=lambda i: -_badness(damages[i]))
    if broken := [i for i in order if _badness(damages[i]) == math.inf]:
        return broken
    total, values = sum(damages), [*(damages[i] for i in order), 0.0]
    for count in range(1, max(1, len(order) // 2) + 1):
        if count <= len(order) and values[count - 1] > max(0.0, SHARE * total, GAP * values[count]):
            return order[:count]
    return order[:1] if values[0] > MAJORITY * total > 0 else []


def _badness(damage: float) -> float:
    return damage if math.isfinite(damage) else math.inf


def _since(reference: LM, lm: LM) -> list[Entry]:
    """What the model's ledger has beyond the reference's. Raises ValueError when it does not begin with that."""
    mine, theirs = ([e for e in model.ledger if e.name not in ORIGINS] for model in (lm, reference))
    if [(e.name, e.args) for e in mine[: len(theirs)]] != [(e.name, e.args) for e in theirs]:
        raise ValueError("The model's ledger does not begin with the reference's, so its steps are not known.")
    return mine[len(theirs) :]


def _kept(lm: LM, reference: LM, entries: Iterable[Entry]) -> list[int]:
    """For each layer of the model its number in the reference."""
    kept = list(range(reference.cfg.num_layers))
    for entry in entries:
        if entry.name == "compact" and (layers := entry.args.get("layers")):
            try:
                kept = [kept[i] for i in layers]
            except (TypeError, IndexError):
                raise ValueError(f"The ledger says that the layers {layers} were kept of {len(kept)}.") from None
    if len(kept) != lm.cfg.num_layers:
        raise ValueError(
            f"The model has {lm.cfg.num_layers} layers and the reference {reference.cfg.num_layers}; "
            f"the ledger between them makes it {len(kept)}. Is this the model that it was made from?"
        )
    return kept


def _steps(
    lm: LM,
    reference: LM,
    entries: Sequence[Entry],
    tokens_NT: np.ndarray,
    quality: Quality,
    culprits: Mapping[int, Place],
    calibration: Any,
    log: Callable[[str], None],
) -> Iterable[Step]:
    """culprits: the places to follow, by their number in `Pair`."""
    model, before = reference, 0.0
    for n, transform in enumerate(transforms_of(entries, calibration)):
        name, args = entries[n].name, entries[n].args
        log(f"step {n + 1} of {len(entries)}: {name} again")
        model = transform(model)
        now = evaluate.compare(model, reference, tokens_NT)
        pair = Pair(reference, model, _kept(model, reference, entries[: n + 1]))
        effects = pair.effects({at: [pair.of_model(at)] for at in culprits}, tokens_NT) if culprits else {}
        alone = {culprits[at].name: kl for at, ((kl, _),) in effects.items()}
        yield Step(name, args, now.perplexity, now.kl, now.top1, _increase(before, now.kl), alone)
        before = now.kl
    if model.cfg != lm.cfg or not same(model.params, lm.params):
        alone = {place.name: place.kl for place in culprits.values()}
        rise = _increase(before, quality.kl)
        yield Step(UNRECORDED, {}, quality.perplexity, quality.kl, quality.top1, rise, alone)


def _increase(before: float, after: float) -> float:
    """What becomes infinite or NaN did so once."""
    return after - before if math.isfinite(before) else 0.0


def _verdict(quality: Quality, steps: Sequence[Step], places: Sequence[Place], culprits: Sequence[int]) -> str:
    if quality.kl < NOTICEABLE_KL:
        return f"Nothing is broken: the model predicts what the reference does (KL {quality.kl:.2g})."
    if culprits:
        found = [f"{_named(places[at])}{_by(steps, places[at].name)}: {_alone(places[at].kl)}" for at in culprits]
        return f"{'; '.join(found)}. The model: {_alone(quality.kl).removesuffix(' alone')}."
    worst = max(places, key=lambda place: place.kl)
    share = worst.kl / (sum(place.kl for place in places) or 1.0)
    step = max(steps, key=lambda each: _badness(each.kl_increase), default=None)
    cost = f" Of the steps, {_number(steps, step)} costs most: {step.kl_increase:.2g}." if step else ""
    return (
        f"Nothing stands out: the model's KL of {quality.kl:.2g} has many sources. The largest share of "
        f"{len(places)} is {share:.0%}, of {_named(worst)}.{cost}"
    )


def _by(steps: Sequence[Step], name: str) -> str:
    """The step in which the place's damage rose most."""
    if not steps:
        return ""
    damages = [0.0, *(step.culprits_kl[name] for step in steps)]
    rises = [_badness(_increase(before, after)) for before, after in itertools.pairwise(damages)]
    step = steps[int(np.argmax(rises))]
    if step.name == UNRECORDED:
        return " by something that the ledger does not have"
    return f" by {_number(steps, step)}"


def _number(steps: Sequence[Step], step: Step) -> str:
    """Its name, with its number where that alone would not do."""
    alike = [each.name for each in steps].count(step.name) > 1
    return f"{step.name} (step {steps.index(step) + 1})" if alike else step.name


def _alone(kl: float) -> str:
    return f"KL {kl:.2g} alone" if math.isfinite(kl) else "predictions that are not finite"


def _named(place: Place) -> str:
    found = stand_out([part.kl for part in place.parts])
    modules = [name for at in found for name in place.parts[at].modules]
    number = "" if place.model_layer in (None, place.layer) else f", {place.model_layer} in the model"
    inside = f" ({', '.join(modules)}{number})" if modules else f" ({number[2:]})" if number else ""
    return place.name + inside


def table(diagnosis: Diagnosis) -> Group:
    """The diagnosis for a terminal: steps, places and parts, and the verdict."""
    out: list[Any] = []
    if diagnosis.steps:
        steps = _table("step", "perplexity", "KL", "+KL", "top-1")
        steps.add_row("reference", f"{diagnosis.reference_perplexity:.2f}", "", "", "")
        for step in diagnosis.steps:
            cells = f"{step.perplexity:.2f}", f"{step.kl:.4f}", f"{step.kl_increase:+.4f}", f"{step.top1:.1%}"
            steps.add_row(step.name, *cells)
        out.append(steps)
    places = _table("taken alone from the model", "KL", "flips", "own dB", "stream dB")
    for place in diagnosis.places:
        style = "bold" if place.name in diagnosis.culprits else None
        ratios = f"{place.local_snr_db:.1f}", f"{place.stream_snr_db:.1f}"
        places.add_row(place.name, f"{place.kl:.4f}", f"{place.flips:.1%}", *ratios, style=style)
        for part in place.parts:
            why = f" ({part.why})" if part.why else ""
            places.add_row(f"  {', '.join(part.modules)}{why}", f"{part.kl:.4f}", f"{part.flips:.1%}", "", "")
    out.append(places)
    if diagnosis.no_steps:
        out.append(f"No steps: {diagnosis.no_steps}")
    return Group(*out, diagnosis.verdict)


def _table(first: str, *names: str) -> Table:
    out = Table()
    out.add_column(first)
    for name in names:
        out.add_column(name, justify="right", no_wrap=True)
    return out
