"""What other formats call our weights, how they shape them, and the checks that both readers share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxllm import lm
from jaxllm.checkpoint.place import Box, put
from jaxllm.config import ModelConfig
from jaxllm.params import ParamInfo

Format = Literal["hf", "gguf"]

BEYOND_FLOAT16 = "{} has values beyond float16's range of ±65504. Load it with dtype='bfloat16' or 'float32'."

# Our module, Hugging Face's, GGUF's. A module's weight is ".../w" here and "....weight" there, its bias "b" and "bias".
_TABLE = (
    ("embed", "model.embed_tokens", "token_embd"),
    ("layers_{i}/attn_norm", "model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    ("layers_{i}/attn/q", "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    ("layers_{i}/attn/k", "model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    ("layers_{i}/attn/v", "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    ("layers_{i}/attn/o", "model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    ("layers_{i}/attn/q_norm", "model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
    ("layers_{i}/attn/k_norm", "model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
    ("layers_{i}/mlp_norm", "model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    ("layers_{i}/mlp/gate", "model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    ("layers_{i}/mlp/up", "model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    ("layers_{i}/mlp/down", "model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
    ("final_norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)
_MODULES: dict[Format, dict[str, str]] = {
    "hf": {ours: hf for ours, hf, _ in _TABLE},
    "gguf": {ours: gguf for ours, _, gguf in _TABLE},
}


def stored_name(path: str, fmt: Format) -> str:
    """stored_name("layers_3/attn/q/w", "gguf") == "blk.3.attn_q.weight"."""
    module, _, kind = path.rpartition("/")
    layer, _, rest = module.partition("/")
    number = ""
    if layer.startswith("layers_"):
        number = layer.removeprefix("layers_")
        module = f"layers_{{i}}/{rest}"
    return _MODULES[fmt][module].format(i=number) + {"w": ".weight", "b": ".bias"}[kind]


def stored_shape(info: ParamInfo) -> tuple[int, ...]:
    """Both formats keep matrices as [out, in] and all else flat: [D, N, H] is stored as [D, N*H]."""
    kept = len(info.shape) - info.contracted
    if not info.contracted:
        return (math.prod(info.shape),)
    return math.prod(info.shape[:kept]), math.prod(info.shape[kept:])


def match(
    cfg: ModelConfig,
    fmt: Format,
    found: Mapping[str, tuple[int, ...]],
    source: Path,
    ignored: Collection[str] = (),
) -> dict[str, str]:
    """{our path: stored name} for every weight of the model.

    found: {stored name: stored shape}, from headers alone. ignored: names that may be there besides.
    Raises ValueError that names what is missing, unexpected or of another shape.
    """
    if cfg.num_layers > len(found):  # before anything is built layer by layer: the number is a stranger's word
        raise ValueError(f"{source} holds {len(found)} tensors but claims {cfg.num_layers} layers.")
    info = lm.param_info(cfg)
    names = {path: stored_name(path, fmt) for path in info}
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(f"{source} lacks {listing(missing)}. Is the download complete, and the config its own?")
    if unexpected := sorted(found.keys() - set(names.values()) - set(ignored)):
        raise ValueError(
            f"{source} has {listing(unexpected)}, which the model that its config describes does not have."
        )
    for path, name in names.items():
        if found[name] != (expected := stored_shape(info[path])):
            raise ValueError(f"{source}: {name} has shape {found[name]}; its config makes it {expected}.")
    return names


def to_device(read: Callable[[Box], np.ndarray], leaf: jax.ShapeDtypeStruct, name: str) -> jax.Array:
    """The weight in the type and shape, and where, `leaf` says; on the default device where it has no sharding.

    read: a part of it, in any float type. It does not keep what it returns: the weight may alias it.
    Raises ValueError when float16 cannot hold a value.
    """

    def cast(box: Box) -> np.ndarray:
        host = read(box)
        if leaf.dtype == np.float16 and host.dtype != leaf.dtype:
            try:
                with np.errstate(over="raise"):
                    return host.astype(np.float32, copy=False).astype(leaf.dtype)
            except FloatingPointError:
                raise ValueError(BEYOND_FLOAT16.format(name)) from None
        return host.astype(leaf.dtype, copy=False)

    return put(leaf.shape, leaf.sharding, cast)


def listing(names: Collection[str]) -> str:
    """The first few names and how many there are."""
    shown = list(names)[:4]
    return ", ".join(shown) + (f" … ({len(names)} in all)" if len(names) > len(shown) else "")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ValueError naming the file when it holds none, FileNotFoundError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}. Is it complete?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}; expected an object.")
    return value
