"""GGUF files: metadata and tensors, dequantised.

The header is read here and not by the library's GGUFReader, which believes every count in it and takes four seconds
for a vocabulary of 49152. Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, cast

import gguf
import jax
import numpy as np

from jaxllm.checkpoint import names
from jaxllm.checkpoint.place import Box, Place, target
from jaxllm.checkpoint.reader import Lazy, Reader, float_shapes, in_group
from jaxllm.config import LinearRope, Llama3Rope, ModelConfig
from jaxllm.lm import Entry, param_info
from jaxllm.models.layers import rope_frequencies
from jaxllm.text import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say "llama"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK = 1024**2  # weights dequantised at a time: the library's temporaries are several times as large
_ROPE_FACTORS = "rope_freqs.weight"

_MAX_ITEMS = 4_000_000  # of all metadata arrays together; a vocabulary of 256k has 1.3 million
_MAX_COUNT = 65536  # of fields, of tensors, and of characters in a name
_SCALARS = dict(zip(range(13), ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "", "", "u8", "i8", "f8"), strict=True))
_STRING, _ARRAY = 8, 9  # the metadata types that are no scalars


class _Tensor(NamedTuple):
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first
    start: int  # byte in the file
    nbytes: int


def reader(path: Path, *, origin: str, dtype: str | None = None, place: Place | None = None) -> Reader:
    """Opens a .gguf file, whose weights are then read a piece of a tensor at a time.

    dtype: None takes float32 when matrices are quantised or of several types, else the one float type they have.
    place: where weights are put. Of a matrix only the rows are read that this process's devices have a part of.
    Raises ValueError, before any weight is read, for an architecture, a quantisation, a tensor or a shape that is
    not as it should be, and for a damaged file.
    """
    try:
        metadata, tensors = _read_header(path)
        matrices = Counter(t.kind.name for t in tensors.values() if len(t.shape) > 1)
        only = next(iter(matrices)) if len(matrices) == 1 else ""
        cfg = _config(metadata, tensors, dtype or _FLOATS.get(only, "float32"))
        for tensor in tensors.values():
            _check_kind(tensor)
        if _ROPE_FACTORS in tensors:
            cfg = dataclasses.replace(cfg, rope_scaling=_llama3_scaling(cfg, path, tensors[_ROPE_FACTORS]))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    stored = names.match(cfg, "gguf", {name: t.shape for name, t in tensors.items()}, path, {_ROPE_FACTORS})
    tokenizer = _tokenizer(metadata)
    info, interleaved = param_info(cfg), metadata["general.architecture"] == "llama"

    def read_part(key: str, name: str, box: Box) -> np.ndarray:
        shape, stored_rows = info[key].shape, math.prod(tensors[name].shape[:-1])
        # A matrix has one or more rows for each index on the first axis; a vector is one row.
        per_index, first, last = stored_rows // shape[0], box[0].start, box[0].stop
        if not per_index:
            per_index, first, last = 1, 0, 1
        with open(path, "rb") as file:  # not by a memory map: pages that were read count as memory in use
            host = _dequantize(file, tensors[name], first * per_index, last * per_index)
        if not np.isfinite(host).all():
            raise ValueError(f"{path}: {name} has weights that are not finite; the file is damaged.")
        if interleaved and key.endswith(("attn/q/w", "attn/k/w")):
            # Rotation turns neighbours, [N, H/2, 2, D], in these files, and halves here: [N, 2, H/2, D].
            _, H, D = shape
            host = host.reshape(-1, H // 2, 2, D).swapaxes(1, 2)
        host = host.reshape(-1, *shape[1:])
        return host[slice(box[0].start - first, box[0].stop - first), *box[1:]]

    def load(key: str, name: str) -> jax.Array:
        leaf = target(info[key], cfg.dtype, place)
        return names.to_device(functools.partial(read_part, key, name), leaf, name)

    def read(group: str) -> Lazy:
        return {name: functools.partial(load, key, stored[key]) for name, key in in_group(group, stored).items()}

    kinds = ", ".join(kind for kind, _ in matrices.most_common())
    args = {"origin": origin, "format": f"gguf {kinds}", "dtype": cfg.dtype}
    return Reader(cfg, (Entry("load", args),), tokenizer, (path,), read, shapes=float_shapes(cfg))


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, _Tensor], dtype: str) -> ModelConfig:
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {arch!r} is not supported. Supported: {', '.join(ARCHITECTURES)}.")

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"its metadata has {arch}.{key} = {value!r}; expected {kind.__name__}.")
        return value

    def number(key: str, default: Any = None) -> float:
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(get(key, float, default))))

    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError("this is one part of several. Join them: llama-gguf-split --merge FIRST_PART OUTPUT.")
    if "token_embd.weight" not in tensors:
        raise ValueError("it lacks token_embd.weight: it is no language model.")
    num_heads, embed_dim = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, embed_dim // max(num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise ValueError(f"{arch}.{key} differs from the head size {head_dim}, which is not supported.")
    scaling = get("rope.scaling.type", str, "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
    if scaling not in ("none", "linear") or not 0 <= factor < math.inf:
        raise ValueError(f"RoPE scaling {scaling!r} by {factor} is not supported. Supported: none, linear, Llama 3's.")
    return ModelConfig(
        vocab_size=get("vocab_size", int, tensors["token_embd.weight"].shape[0]),
        embed_dim=embed_dim,
        num_layers=get("block_count", int),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        ffw_dim=get("feed_forward_length", int),
        max_len=get("context_length", int),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
        rope_scaling=LinearRope(factor) if scaling == "linear" and factor not in (0.0, 1.0) else None,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        sliding_window=get("attention.sliding_window", int, 0) or None,
        dtype=dtype,
    )


def _llama3_scaling(cfg: ModelConfig, path: Path, tensor: _Tensor) -> Llama3Rope:
    """The four numbers behind the factors that divide each frequency, which are all that GGUF keeps.

    The largest is `factor`; the other numbers are the same in Llama 3.1, 3.2 and 3.3, and checked against the rest.
    """
    if tensor.shape == (cfg.head_dim // 2,) and cfg.rope_scaling is None:
        with open(path, "rb") as file:
            factors = _dequantize(file, tensor)[0]
        scaling = Llama3Rope(float(factors.max()), 1.0, 4.0, 8192)
        plain, scaled = (np.asarray(rope_frequencies(cfg.head_dim, cfg.rope_theta, s)) for s in (None, scaling))
        if 1 <= factors.min() < math.inf and np.allclose(plain, factors * scaled, rtol=1e-4, atol=0):
            return scaling
    raise ValueError(
        f"its {_ROPE_FACTORS} is not the RoPE scaling of Llama 3.1 to 3.3, and no other is read from GGUF. "
        "Take the original model, whose config.json has the numbers."
    )


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in metadata.items()}
    return Tokenizer.from_gguf(cast(gguf.GGUFReader, SimpleNamespace(fields=fields)))


def _check_kind(tensor: _Tensor) -> None:
    """Raises ValueError when the tensor's type cannot be dequantised, or its rows are no whole blocks."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    if tensor.shape[-1] % block:
        raise ValueError(f"{tensor.name} has shape {tensor.shape}; {tensor.kind.name} needs rows of {block}.")
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
    except NotImplementedError:
        raise ValueError(f"{tensor.name} is {tensor.kind.name}, which the gguf library cannot dequantise.") from None


def _dequantize(file: BinaryIO, tensor: _Tensor, first: int = 0, last: int | None = None) -> np.ndarray:
    """Float32 [rows, columns] of the rows from `first` to `last`, all by default; a vector is one row."""
    columns, all_rows = tensor.shape[-1], math.prod(tensor.shape[:-1])
    rows = (all_rows if last is None else last) - first
    row_bytes = tensor.nbytes // all_rows
    out = np.empty((rows, columns), np.float32)
    step = max(1, _CHUNK // columns)
    file.seek(tensor.start + first * row_bytes)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        stored = np.fromfile(file, np.uint8, count * row_bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # told below, by name
            out[start : start + count] = gguf.quants.dequantize(stored.reshape(count, row_bytes), tensor.kind)
    return out


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensors by name. Raises ValueError when a count, a length or an offset is more than there is."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := _read(file, "I")) not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are read, in little-endian order")
        num_tensors, num_fields = _read(file, "Q"), _read(file, "Q")
        if num_tensors > _MAX_COUNT or num_fields > _MAX_COUNT:
            raise ValueError(f"it claims {num_tensors} tensors and {num_fields} fields; {_MAX_COUNT} are allowed")
        metadata: dict[str, Any] = {}
        items = 0
        for _ in range(num_fields):
            key = _read_string(file, _MAX_COUNT)
            kind, count = _read(file, "I"), 1
            if is_array := kind == _ARRAY:
                kind, count = _read(file, "I"), _read(file, "Q")
            items += count
            if kind not in _SCALARS or kind == _ARRAY or items > _MAX_ITEMS or key in metadata:
                raise ValueError(f"field {key!r} is of type {kind}, has too many items ({count}), or is there twice")
            if kind == _STRING:
                values = [_read_string(file, size) for _ in range(count)]
            else:
                form = np.dtype(f"<{_SCALARS[kind]}")
                values = np.frombuffer(_take(file, form.itemsize * count), form).tolist()
            metadata[key] = values if is_array else values[0]
        raw = []
        for _ in range(num_tensors):
            name, rank = _read_string(file, _MAX_COUNT), _read(file, "I")
            if not 1 <= rank <= 4:
                raise ValueError(f"tensor {name!r} has {rank} dimensions")
            shape = tuple(_read(file, "Q") for _ in range(rank))[::-1]
            raw.append((name, shape, gguf.GGMLQuantizationType(_read(file, "I")), _read(file, "Q")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}; expected a power of two")
        start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in raw:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tensor = _Tensor(name, kind, shape, start + offset, math.prod(shape) // block * block_bytes)
        if not math.prod(shape) or name in tensors:
            raise ValueError(f"tensor {name!r} is empty or there twice")
        if tensor.start + tensor.nbytes > size:
            end = tensor.start + tensor.nbytes
            raise ValueError(f"tensor {name!r} ends at byte {end}, the file at {size}; is the download complete?")
        tensors[name] = tensor
    return metadata, tensors


def _read(file: BinaryIO, form: str) -> int:
    return struct.unpack(f"<{form}", _take(file, struct.calcsize(form)))[0]


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError(f"it ends {count - len(data)} bytes early; is the download complete?")
    return data


def _read_string(file: BinaryIO, limit: int) -> str:
    length = _read(file, "Q")
    if length > limit:
        raise ValueError(f"a string of {length} bytes at byte {file.tell()}")
    return _take(file, length).decode("utf-8")
