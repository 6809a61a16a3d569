"""A language model as data, and the algebra of functions on it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.models.decoder import Block, Decoder
from jaxllm.models.layers import Embed
from jaxllm.params import Boxed, ParamInfo, Params, flatten, unflatten

if TYPE_CHECKING:
    from jaxllm.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a ledger: what was done to a model.

    args: the transform's arguments and what it decided, as JSON values.
    touched: {path with layer numbers as N: how many leaves}.
    parent: hash of the config and the ledger before this entry; "" for the first.
    """

    name: str
    args: Mapping[str, Any]
    touched: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parent: str = ""


@dataclasses.dataclass(frozen=True)
class LM:
    """A model as data. Transforms return a new one.

    params: nested dict of jax.Array | QArray.
    ledger: how it came about; begins with where the weights were loaded from.
    tokenizer: None for a model that only takes token ids.
    """

    cfg: ModelConfig
    params: Params
    ledger: tuple[Entry, ...] = ()
    tokenizer: Tokenizer | None = None

    @property
    def info(self) -> dict[str, ParamInfo]:
        """What each weight's axes mean, by path."""
        return param_info(self.cfg)

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in flatten(self.params).values())

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in flatten(self.params).values())


Transform = Callable[[LM], LM]


def chain(*transforms: Transform) -> Transform:
    """One transform that applies these from left to right."""
    return lambda lm: functools.reduce(lambda model, transform: transform(model), transforms, lm)


# (the stage that a transform leaves a model in, the last one that it may follow). Distillation changes nothing that
# compacting, pruning or quantising would have to know of, but it trains float weights; a cache's precision is nobody's.
_STAGES = {
    "load": (0, 0),
    "init": (0, 0),
    "compact": (1, 1),
    "prune": (2, 2),
    "distill": (0, 2),
    "quantize": (3, 3),
    "quantize_kv": (0, 3),
}


def require_order(lm: LM, name: str) -> None:
    """Raises ValueError when transform `name` may not follow what the ledger holds."""
    check_order([entry.name for entry in lm.ledger], name)


def check_order(done: Sequence[str], name: str) -> None:
    """Raises ValueError when transform `name` may not follow the transforms `done`, naming those that may."""
    if unknown := [other for other in (*done, name) if other not in _STAGES]:
        raise ValueError(f"The ledger has {unknown[0]!r}, which this version does not know; known: {[*_STAGES]}.")
    if late := [other for other in done if _STAGES[other][0] > _STAGES[name][1]]:
        raise ValueError(
            f"{name} cannot follow {late[0]}: what one decided the other would undo. The order is compact, prune, "
            "quantize, with distill anywhere before quantize; start from the original checkpoint."
        )


def record(lm: LM, name: str, args: Mapping[str, Any], touched: Iterable[str], **changes: Any) -> LM:
    """The model with `changes` and one more line in its ledger."""
    counts = Counter(re.sub(r"\d+", "N", path) for path in touched)
    args = json.loads(json.dumps(args))  # equal to what a saved ledger is read back as: a tuple is a list
    return dataclasses.replace(lm, ledger=(*lm.ledger, Entry(name, args, dict(counts), fingerprint(lm))), **changes)


def fingerprint(lm: LM) -> str:
    """What tells models apart by their config and how they came about: 16 hexadecimal digits. Weights are not read."""
    state = [dataclasses.asdict(lm.cfg), [dataclasses.asdict(entry) for entry in lm.ledger]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def init(cfg: ModelConfig, seed: int = 0) -> LM:
    """A model with random weights: of matmuls normal, of variance 1 / fan-in; norms are 1, biases 0."""
    rng = np.random.default_rng(seed)  # on the host: XLA would take seconds to compile a generator for each shape
    params = {}
    for path, info in param_info(cfg).items():
        if info.contracted:
            fan_in = math.prod(info.shape[-info.contracted :])
            value = rng.standard_normal(info.shape, np.float32) * np.float32(fan_in**-0.5)
        else:
            value = np.full(info.shape, path.endswith("/w"), np.float32)
        params[path] = jnp.asarray(value, cfg.dtype)
    return LM(cfg, unflatten(params), (Entry("init", {"seed": seed}),))


@functools.lru_cache(maxsize=64)
def param_info(cfg: ModelConfig) -> dict[str, ParamInfo]:
    """By path, in the order of the model."""
    ends = _info_of_one_layer(cfg.layer(0))
    out = {"embed/w": ends["embed/w"]}
    for i in range(cfg.num_layers):
        layer = _info_of_one_layer(cfg.layer(i)).items()
        out |= {path.replace("_0/", f"_{i}/", 1): info for path, info in layer if path.startswith("layers_0/")}
    return out | {path: info for path, info in ends.items() if not path.startswith("layers_")}


@functools.lru_cache(maxsize=64)
def _info_of_one_layer(cfg: ModelConfig) -> dict[str, ParamInfo]:
    """Of a model with this layer only: tracing is slow."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxes: Mapping[str, Boxed] = flatten(jax.eval_shape(Decoder(cfg).init, jax.random.key(0), tokens, tokens)["params"])
    return {path: box.info for path, box in boxes.items()}


def forward(cfg: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] of whole sequences from position 0, no cache. Pure; to be traced."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return Decoder(cfg).apply({"params": params}, tokens_BT, positions_BT)[0]


def logits(lm: LM, tokens_BT: Any) -> jax.Array:
    """What the model predicts after each token.

    tokens_BT: integers in [0, V), [B, T]. Returns float32 [B, T, V]. The layers run one by one, those of one shape and
    precision by one compiled program: quick to compile, however many models are compared.
    """
    return predict(lm.cfg.layer(0), ends(lm.params), run_layers(lm, tokens_BT))


def run_layers(lm: LM, tokens_BT: Any) -> jax.Array:
    """The residual stream [B, T, D] after the last layer; tokens as for `logits`."""
    x_BTD = embed_tokens(lm.cfg.layer(0), lm.params["embed"], jnp.asarray(check_tokens(lm.cfg, tokens_BT)))
    for i in range(lm.cfg.num_layers):
        x_BTD = run_layer(lm.cfg.layer(i), lm.params[f"layers_{i}"], x_BTD)
    return x_BTD


def ends(params: Params) -> Params:
    """What is not a layer: embedding, final norm and head."""
    return {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(cfg: ModelConfig, embed: Params, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream [B, T, D] before the first layer. Of cfg, only what layers share is looked at."""
    return Embed(cfg.vocab_size, cfg.embed_dim, cfg.dtype).apply({"params": embed}, tokens_BT)  # pyright: ignore


@functools.partial(jax.jit, static_argnums=0)
def run_layer(cfg: ModelConfig, layer: Params, x_BTD: jax.Array) -> jax.Array:
    """The residual stream after one layer, of whole sequences from position 0. cfg: `ModelConfig.layer` of it."""
    return apply_layer(cfg, layer, x_BTD)


def apply_layer(cfg: ModelConfig, layer: Params, x_BTD: jax.Array) -> jax.Array:
    """`run_layer`, to be traced."""
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    return Block(cfg).apply({"params": layer}, x_BTD, positions_BT, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def predict(cfg: ModelConfig, ends: Params, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] from the residual stream after the last layer."""
    return Decoder(cfg).apply({"params": ends}, x_BTD, method="predict")  # pyright: ignore[reportReturnType]


def check_tokens(cfg: ModelConfig, tokens: Any) -> np.ndarray:
    """The tokens as an int32 array [B, T]; ValueError when they are not ids of this model's vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}; expected integers of shape [B, T], not empty.")
    if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}; the model has 0 to {cfg.vocab_size - 1}. "
            "Was the text encoded with another model's tokenizer?"
        )
    return tokens.astype(np.int32)
