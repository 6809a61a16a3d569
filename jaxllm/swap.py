"""A model against the one that it was made from, place by place: each taken alone from the one into the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import QArray
from jaxllm.calibrate import SITES
from jaxllm.config import ModelConfig
from jaxllm.evaluate import score
from jaxllm.lm import LM, embed_tokens, ends, logits, predict, run_layer
from jaxllm.params import Params, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Part:
    """The reference with nothing but these modules of one place taken from the model.

    modules: "mlp/down" …; several where they only make sense together. why: they do; "" for a module alone.
    kl: nats. flips: fraction of positions where the likeliest token is another one.
    """

    modules: tuple[str, ...]
    why: str
    kl: float
    flips: float


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer of the reference, or its two ends (embedding, final norm and head) as one.

    layer: its number in the reference; None for the ends. model_layer: in the model; None for the ends, and for a layer
        that was removed.
    stream_snr_db: of the residual stream that the model has after this place against the reference's; of the logits for
        the ends.
    local_snr_db: of what this layer alone adds when it is fed the reference's stream; for the ends the lower of the
        embedding's and the head's. Infinite where nothing changed, 0 for a layer that was removed.
    kl, flips: as of `Part`, with the whole place taken from the model.
    parts: of what stands out, or of the worst place where nothing does.
    """

    name: str
    layer: int | None
    model_layer: int | None
    stream_snr_db: float
    local_snr_db: float
    kl: float
    flips: float
    parts: tuple[Part, ...] = ()


Swap = tuple[ModelConfig, Params] | None  # what runs in a place's stead; None: nothing, the layer was removed


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two models. Places are numbered: 0 for the ends, i + 1 for layer i of the reference."""

    reference: LM
    lm: LM
    kept: Sequence[int]

    def of_model(self, place: int) -> Swap:
        if place == 0:
            return self.lm.cfg.layer(0), ends(self.lm.params)
        if place - 1 not in self.kept:
            return None
        i = self.kept.index(place - 1)
        return self.lm.cfg.layer(i), self.lm.params[f"layers_{i}"]

    def of_reference(self, place: int) -> tuple[ModelConfig, Params]:
        params = self.reference.params
        at = max(place - 1, 0)
        return self.reference.cfg.layer(at), ends(params) if place == 0 else params[f"layers_{at}"]

    def places(self, tokens_NT: np.ndarray, log: Callable[[str], None]) -> list[Place]:
        numbers = range(self.reference.cfg.num_layers + 1)
        stream, local = self.noise(tokens_NT)
        effects = self.effects({at: [self.of_model(at)] for at in numbers}, tokens_NT, log)
        out = []
        for at in numbers:
            layer = None if at == 0 else at - 1
            model_layer = self.kept.index(layer) if layer in self.kept else None
            name = "embedding and head" if layer is None else f"layer {layer}"
            name += " (removed)" if layer is not None and model_layer is None else ""
            ((kl, flips),) = effects[at]
            out.append(Place(name, layer, model_layer, _db(stream[at]), _db(local[at]), kl, flips))
        return out

    def noise(self, tokens_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of |error|² / |reference|² by place: of the stream after it, and of what it adds by itself."""
        stream, local = np.zeros((2, self.reference.cfg.num_layers + 1))
        (cfg, theirs), mine = self.of_reference(0), self.of_model(0)
        assert mine is not None
        for tokens_T in jnp.asarray(tokens_NT):
            x = embed_tokens(cfg, theirs["embed"], tokens_T[None])
            own = embed_tokens(mine[0], mine[1]["embed"], tokens_T[None])
            local_ends = float(_relative(own, x))
            for at in range(1, len(stream)):
                after, swapped = _run(self.of_reference(at), x), _run(self.of_model(at), x)
                local[at] += float(_relative(_minus(swapped, x), _minus(after, x)))
                x, own = after, _run(self.of_model(at), own)
                stream[at] += float(_relative(own, x))
            answer = predict(cfg, theirs, x)
            stream[0] += float(_relative(_predict(mine, own), answer))
            local[0] += float(jnp.maximum(local_ends, _relative(_predict(mine, x), answer)))
        return stream / len(tokens_NT), local / len(tokens_NT)

    def effects(
        self,
        swaps: Mapping[int, Sequence[Swap]],
        tokens_NT: np.ndarray,
        log: Callable[[str], None] = lambda _: None,
    ) -> dict[int, list[tuple[float, float]]]:
        """KL and flips of the reference with one place swapped. What comes before the place is computed once."""
        totals = {at: np.zeros((len(each), 2)) for at, each in swaps.items()}
        cfg, theirs = self.reference.cfg.layer(0), ends(self.reference.params)
        layers = self.reference.cfg.num_layers
        for n, tokens_T in enumerate(tokens_NT):
            answer_TV = logits(self.reference, tokens_T[None])[0]

            def judge(x_1TD: jax.Array, after: int, last: tuple[ModelConfig, Params] = (cfg, theirs)) -> np.ndarray:
                for at in range(after + 1, layers + 1):
                    x_1TD = _run(self.of_reference(at), x_1TD)
                found_TV = _predict(last, x_1TD)[0]
                scores = np.asarray(score(found_TV, answer_TV, tokens_T), np.float64)  # noqa: B023
                _, kl, agreed = scores.reshape(-1, 3).sum(0)
                return np.asarray([kl, len(tokens_T) - 1 - agreed])  # noqa: B023

            for k, swap in enumerate(swaps.get(0, ())):
                assert swap is not None
                x_1TD = embed_tokens(swap[0], swap[1]["embed"], jnp.asarray(tokens_T)[None])
                totals[0][k] += judge(x_1TD.astype(cfg.dtype), 0, swap)
            x_1TD = embed_tokens(cfg, theirs["embed"], jnp.asarray(tokens_T)[None])
            for at in range(1, layers + 1):
                for k, swap in enumerate(swaps.get(at, ())):
                    totals[at][k] += judge(_run(swap, x_1TD), at)
                x_1TD = _run(self.of_reference(at), x_1TD)
            log(f"window {n + 1} of {len(tokens_NT)}: {sum(map(len, swaps.values()))} swaps tried")
        count = len(tokens_NT) * (tokens_NT.shape[1] - 1)
        return {at: [(float(kl), float(flips)) for kl, flips in each / count] for at, each in totals.items()}

    def parts(
        self, at: int, tokens_NT: np.ndarray, methods: Sequence[str] | None, log: Callable[[str], None]
    ) -> list[Part]:
        """The modules of one place that changed, together where they cannot be told apart.

        methods: of the transforms between the models, None if those are not known.
        """
        mine, (cfg, theirs) = self.of_model(at), self.of_reference(at)
        if mine is None:
            return []
        old, new = flatten(theirs), flatten(mine[1])
        new |= {path: leaf.astype(cfg.dtype) for path, leaf in new.items() if not isinstance(leaf, QArray)}
        together = _units(new, old, _scaled_sites(theirs, unflatten(new), methods) if at else ())
        swaps: list[Swap] = []
        for modules, _ in together:
            flat = {path: (new if _module(path) in modules else old)[path] for path in old}
            swaps.append((_fitting(cfg, flat) if at else cfg, unflatten(flat)))
        if at and mine[0].kv_dtype != cfg.kv_dtype:
            together.append((("KV cache",), ""))
            swaps.append((dataclasses.replace(cfg, kv_dtype=mine[0].kv_dtype), theirs))
        effects = self.effects({at: swaps}, tokens_NT, log)[at]
        return [Part(*unit, *effect) for unit, effect in zip(together, effects, strict=True)]


def _run(swap: Swap, x_1TD: jax.Array) -> jax.Array:
    """Models may compute in different types; the stream keeps its own."""
    return x_1TD if swap is None else run_layer(*swap, x_1TD.astype(swap[0].dtype)).astype(x_1TD.dtype)


def _predict(last: tuple[ModelConfig, Params], x_1TD: jax.Array) -> jax.Array:
    return predict(*last, x_1TD.astype(last[0].dtype))


@jax.jit
def _minus(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.astype(jnp.float32) - b.astype(jnp.float32)


@jax.jit
def _relative(found: jax.Array, reference: jax.Array) -> jax.Array:
    """Mean over tokens of |found - reference|² / |reference|², over the last axis."""
    reference = reference.astype(jnp.float32)
    noise = jnp.sum(jnp.square(found.astype(jnp.float32) - reference), axis=-1)
    return jnp.mean(jnp.where(noise == 0, 0.0, noise / jnp.sum(jnp.square(reference), axis=-1)))


def _db(noise: float) -> float:
    """Of a ratio of noise to signal."""
    return math.inf if noise == 0 else 10 * math.log10(1 / noise) if noise < math.inf else -noise  # NaN stays


def _scaled_sites(old: Params, new: Params, methods: Sequence[str] | None) -> list[str]:
    """Where an equivalent scaling was folded in, so that a module and those that read it are only right together."""
    norms = [site for site in SITES if site.endswith("norm")]
    if methods is None:  # a norm that changed is a sign
        return [*SITES] if any(not same(old[norm], new[norm]) for norm in norms) else []
    if any("awq" in method for method in methods):
        return [*SITES]
    return norms if any("smoothquant" in method for method in methods) else []


def _units(new: Mapping[str, Any], old: Mapping[str, Any], scaled: Iterable[str]) -> list[tuple[tuple[str, ...], str]]:
    """The modules that changed, those that go together as one, with the reason."""
    order = list(dict.fromkeys(map(_module, old)))
    resized = {_module(path) for path in old if new[path].shape != old[path].shape}
    links = [({name for name in resized if name.startswith(half)}, "narrower") for half in ("attn/", "mlp/")]
    links += [({site, *map(_module, SITES[site])}, "scaled together") for site in scaled]
    changed = {_module(path) for path in old if not same(new[path], old[path])}
    units = [({name}, "") for name in order if name in changed]
    for names, why in links:
        if hit := [unit for unit in units if unit[0] & names]:
            whole = names.union(*(modules for modules, _ in hit))
            reasons = dict.fromkeys(reason for _, reason in (*hit, (names, why)) if reason)
            units = [unit for unit in units if unit not in hit] + [(whole, ", ".join(reasons))]
    return [(tuple(name for name in order if name in modules), why) for modules, why in units]


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _fitting(cfg: ModelConfig, layer: Mapping[str, Any]) -> ModelConfig:
    """The layer's config with the widths that its weights have."""
    widths = {"num_heads": "attn/q/w", "num_kv_heads": "attn/k/w", "ffw_dim": "mlp/up/w"}
    return dataclasses.replace(cfg, **{name: layer[path].shape[0] for name, path in widths.items()})


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are equal bit by bit: a NaN is itself."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )
