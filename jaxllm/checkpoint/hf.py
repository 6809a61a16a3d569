"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import config
from jaxllm.arrays import Weight
from jaxllm.checkpoint import compressed, gptq_awq, names
from jaxllm.checkpoint.leaves import check_leaves, describe
from jaxllm.checkpoint.native import load_tokenizer, new_directory
from jaxllm.checkpoint.pad import pad, widest
from jaxllm.checkpoint.place import Place, target
from jaxllm.checkpoint.reader import Lazy, Reader, float_shapes, in_group
from jaxllm.checkpoint.tensors import (
    FLOATS,
    Header,
    Read,
    Stored,
    Tensor,
    dense,
    open_file,
    read_tensor,
    to_leaf,
    write_file,
)
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Entry, param_info, record
from jaxllm.params import flatten
from jaxllm.transforms.layerwise import layer_number

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 2_000_000_000


def reader(path: Path, *, origin: str, dtype: str | None = None, place: Place | None = None) -> Reader:
    """Opens a Hugging Face directory, whose weights are then read one tensor at a time.

    Weights that another tool quantised stay as they are.

    dtype: of float weights and activations; None takes config.json's.
    place: where weights are put. Of a float weight no more is read than this process's devices hold; of a quantised
        one, everything.
    Raises ValueError, before any weight is read, for an architecture, a file, a tensor or a shape that is not as it
    should be. Pickles (pytorch_model.bin) are not read: they can run code.
    """
    cfg, quantization = read_config(path / "config.json", dtype)
    files: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for shard in _shards(path):
        for name, header in _read_header(shard).items():
            if name in files:
                raise ValueError(f"{name} is in both {files[name]} and {shard}.")
            files[name], headers[name] = shard, header

    def read_stored(name: str) -> np.ndarray:
        return read_tensor(files[name], name)

    modules = _quantised(quantization, cfg, headers, read_stored, path)
    parts = {part for module in modules.values() for part in module.parts}
    found = {name: header for name, header in headers.items() if name not in parts}
    for name, (code, _) in found.items():
        if code not in FLOATS:
            raise ValueError(
                f"{files[name]}: {name} is {code}; expected {', '.join(FLOATS)}. "
                "Nothing in config.json's quantization_config says how it is quantised."
            )
    if twice := [f"{name}.weight" for name in modules if f"{name}.weight" in found]:
        raise ValueError(f"{path} has {names.listing(twice)} in float and quantised.")
    # Rotary frequencies follow from the config; old checkpoints store them all the same.
    ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if cfg.tie_embeddings else set()
    shapes = {name: shape for name, (_, shape) in found.items()}
    shapes |= {f"{name}.weight": module.shape for name, module in modules.items()}
    stored = names.match(cfg, "hf", shapes, path, ignored)
    tokenizer = load_tokenizer(path)
    info = param_info(cfg)

    def load(key: str, name: str) -> Weight:
        if module := modules.get(name.removesuffix(".weight")):
            return to_leaf(module.read(read_stored), info[key], name, place)
        leaf = target(info[key], cfg.dtype, place)
        return names.to_device(functools.partial(read_tensor, files[name], name, leaf.shape), leaf, name)

    def read(group: str) -> Lazy:
        return {name: functools.partial(load, key, stored[key]) for name, key in in_group(group, stored).items()}

    lm = LM(cfg, {}, (Entry("load", {"origin": origin, "format": "safetensors", "dtype": cfg.dtype}),), tokenizer)
    if modules:
        assert quantization is not None
        quantised = [key for key, name in stored.items() if name.removesuffix(".weight") in modules]
        lm = record(lm, "quantize", {"imported": quantization["quant_method"]}, quantised)
    sources = (path / "config.json", *sorted(set(files.values())))
    return Reader(cfg, lm.ledger, tokenizer, sources, read, shapes=None if modules else float_shapes(cfg))


def _quantised(
    quantization: Any, cfg: ModelConfig, headers: Mapping[str, Header], read: Read, path: Path
) -> dict[str, Stored]:
    """{module: its quantised weight}, by config.json's quantization_config; what is wrong with it raises ValueError."""
    if not quantization:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    find = {compressed.METHOD: compressed.find, "gptq": gptq_awq.find_gptq, "awq": gptq_awq.find_awq}.get(str(method))
    if find is None:
        raise ValueError(
            f"{path / 'config.json'} asks for quant_method {method!r}. Supported: {compressed.METHOD}, gptq, awq. "
            "Or take the original checkpoint and quantise it here."
        )
    try:
        modules = find(quantization, cfg, headers, read)
    except ValueError as error:
        raise ValueError(f"{path}, quantised by {method}: {error}") from error
    if not modules:
        raise ValueError(f"{path}: its config.json says that {method} quantised it, and no tensor is quantised.")
    return modules


def export(lm: LM, path: Path) -> None:
    """Writes a directory that transformers loads; see `checkpoint.export_hf`."""
    flat = flatten(lm.params)
    check_leaves(lm.cfg, {key: describe(leaf) for key, leaf in flat.items()}, "This model")
    wide = widest(lm.cfg)
    info, shapes = param_info(lm.cfg), param_info(wide)

    def tensor(key: str, leaf: Weight) -> Tensor:
        plain = dense(leaf, names.stored_shape(shapes[key]), lm.cfg.dtype)
        if info[key].shape == shapes[key].shape:
            return plain
        i = layer_number(key.partition("/")[0]) or 0
        narrow = lm.cfg.layer(i), wide.layer(i)
        return dataclasses.replace(
            plain, make=lambda: pad(plain.make().reshape(leaf.shape), info[key].axes, *narrow).reshape(-1)
        )

    _write(lm, wide, path, {names.stored_name(key, "hf"): tensor(key, leaf) for key, leaf in flat.items()}, {})


def export_compressed(lm: LM, path: Path, log: Callable[[str], None] | None) -> None:
    """Writes a directory that vLLM loads; see `checkpoint.export_compressed`."""
    config.to_hf(lm.cfg)  # what no architecture has is refused first
    tensors, quantization = compressed.plan(lm, log)
    _write(lm, lm.cfg, path, tensors, {"quantization_config": quantization})


def _write(lm: LM, cfg: ModelConfig, path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    hf = config.to_hf(cfg) | dict(extra)
    # Llama's defaults are 1 and 2, whatever the tokenizer.
    hf["bos_token_id"] = lm.tokenizer.bos_id if lm.tokenizer else None
    hf["eos_token_id"] = (sorted(lm.tokenizer.stop_ids) or None) if lm.tokenizer else None
    shards: list[dict[str, Tensor]] = [{}]
    room = _SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(path, total) as temp:
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = _SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            write_file(temp / file, shard)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temp / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if lm.tokenizer:
            lm.tokenizer.save(temp)
        (temp / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def read_config(file: Path, dtype: str | None) -> tuple[ModelConfig, Any]:
    """A config.json, with its quantization_config as it is. Raises ValueError, naming the file, for any other."""
    hf = names.read_json(file) | ({} if dtype is None else {"dtype": dtype})
    quantization = hf.pop("quantization_config", None)
    try:
        return config.from_hf(hf), quantization
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


def _read_header(file: Path) -> dict[str, Header]:
    """{tensor name: type and shape}."""
    with open_file(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
