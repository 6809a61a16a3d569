"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm import config
from jaxllm.arrays import Weight, dequantize
from jaxllm.checkpoint import names
from jaxllm.checkpoint.leaves import check_leaves, describe
from jaxllm.checkpoint.native import load_tokenizer, new_directory
from jaxllm.checkpoint.pad import pad, widest
from jaxllm.checkpoint.reader import Lazy, Reader, in_group
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Entry, param_info
from jaxllm.params import flatten
from jaxllm.transforms.layerwise import layer_number

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 2_000_000_000
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def reader(path: Path, *, origin: str, dtype: str | None = None) -> Reader:
    """Opens a Hugging Face directory, whose weights are then read one tensor at a time.

    dtype: None takes config.json's.
    Raises ValueError, before any weight is read, for an architecture, a file, a tensor or a shape that is not as it
    should be. Pickles (pytorch_model.bin) are not read: they can run code.
    """
    cfg = _read_config(path / "config.json", dtype)
    files = {}
    for shard in _shards(path):
        for name, shape in _read_header(shard).items():
            if name in files:
                raise ValueError(f"{name} is in both {files[name][0]} and {shard}.")
            files[name] = shard, shape
    # Rotary frequencies follow from the config; old checkpoints store them all the same.
    ignored = {name for name in files if name.endswith(".rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if cfg.tie_embeddings else set()
    found = {name: shape for name, (_, shape) in files.items()}
    stored = names.match(cfg, "hf", found, path, ignored)
    tokenizer = load_tokenizer(path)
    info = param_info(cfg)

    def load(key: str, name: str) -> jax.Array:
        # A mapping of its own for each tensor: pages that were read count as memory in use until it is closed.
        with _open(files[name][0]) as file:
            host = file.get_tensor(name)
        return names.to_device(host, info[key].shape, cfg.dtype, name)

    def read(group: str) -> Lazy:
        return {name: functools.partial(load, key, stored[key]) for name, key in in_group(group, stored).items()}

    args = {"origin": origin, "format": "safetensors", "dtype": cfg.dtype}
    shards = {file for file, _ in files.values()}
    return Reader(cfg, (Entry("load", args),), tokenizer, (path / "config.json", *sorted(shards)), read)


def export(lm: LM, path: Path) -> None:
    """Writes a directory that transformers loads; see `checkpoint.export_hf`."""
    flat = flatten(lm.params)
    check_leaves(lm.cfg, {key: describe(leaf) for key, leaf in flat.items()}, "This model")
    wide = widest(lm.cfg)
    hf, shapes = config.to_hf(wide), param_info(wide)
    # Llama's defaults are 1 and 2, whatever the tokenizer.
    hf["bos_token_id"] = lm.tokenizer.bos_id if lm.tokenizer else None
    hf["eos_token_id"] = (sorted(lm.tokenizer.stop_ids) or None) if lm.tokenizer else None
    sizes = {key: math.prod(shapes[key].shape) * jnp.dtype(lm.cfg.dtype).itemsize for key in flat}
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for key, nbytes in sizes.items():
        if nbytes > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(key)
        room -= nbytes
    total = sum(sizes.values())
    with new_directory(path, total) as temp:
        weight_map = {}
        for i, keys in enumerate(shards, 1):
            file = _SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            _write(temp / file, lm.cfg, {key: flat[key] for key in keys})
            weight_map |= {names.stored_name(key, "hf"): file for key in keys}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temp / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if lm.tokenizer:
            lm.tokenizer.save(temp)
        (temp / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def _read_config(file: Path, dtype: str | None) -> ModelConfig:
    hf = names.read_json(file) | ({} if dtype is None else {"dtype": dtype})
    try:
        return config.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} has a field of the wrong type: {type(error).__name__}: {error}.") from error


def _shards(path: Path) -> Iterable[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.is_file():
        pickles = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise ValueError(
                f"{path} holds {names.listing(sorted(pickles))}: pickles, which can run code and are not loaded. "
                "Convert them: transformers' from_pretrained() and save_pretrained() write model.safetensors."
            )
        raise ValueError(f"{path} holds neither {_SINGLE} nor {_INDEX}. Is the download complete?")
    weight_map = names.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} lacks weight_map, an object of tensor name: file name.")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise ValueError(f"{index} names the shard {name!r}; a shard lies in the same directory.")
        if not (path / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is not there. Is the download complete?")
    return [path / name for name in shards]


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file: {error}.") from error


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape}."""
    shapes = {}
    with _open(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            tensor = opened.get_slice(name)
            shapes[name] = tuple(tensor.get_shape())
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{file}: {name} is {tensor.get_dtype()}; expected {', '.join(_DTYPES)}. "
                    "Checkpoints that another tool quantised are not read: take the original and quantise it here."
                )
    return shapes


def _write(file: Path, cfg: ModelConfig, flat: Mapping[str, Weight]) -> None:
    """A safetensors file, tensor by tensor: the library's own writer copies all of them first.

    Format: 8 bytes of header size, the header in JSON, the tensors. huggingface.co/docs/safetensors.
    """
    wide = widest(cfg)
    narrow, info, item_bytes = param_info(cfg), param_info(wide), jnp.dtype(cfg.dtype).itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in flat:
        end = start + math.prod(info[key].shape) * item_bytes
        header[names.stored_name(key, "hf")] = {
            "dtype": _CODES[cfg.dtype],
            "shape": names.stored_shape(info[key]),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, leaf in flat.items():
            host = _to_host(leaf, cfg.dtype)
            if narrow[key].shape != info[key].shape:
                i = layer_number(key.partition("/")[0]) or 0
                host = pad(host.reshape(leaf.shape), info[key].axes, cfg.layer(i), wide.layer(i)).reshape(-1)
            out.write(host.view(np.uint8).data)


def _to_host(leaf: Weight, dtype: str) -> np.ndarray:
    # A jax.Array keeps the host copy it once made; that of the reshaped one dies with it.
    flat: jax.Array = dequantize(leaf).astype(dtype).reshape(-1)
    return np.ascontiguousarray(flat)
