"""Tensors of safetensors files: what a header says, one read, all written, and small integers packed into int32.

Format: 8 bytes of header size, the header in JSON, the tensors. huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxllm.arrays import QArray, Weight, dequantize
from jaxllm.formats import Format
from jaxllm.params import ParamInfo

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPES = FLOATS | {"I8": "int8", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn"}
_CODES = {jnp.dtype(dtype): code for code, dtype in _DTYPES.items()}

Header = tuple[str, tuple[int, ...]]  # safetensors' code of the type, and the shape
Read = Callable[[str], np.ndarray]  # a tensor by its stored name


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written. `make` is called when its turn comes, so that one is in memory at a time."""

    code: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(_DTYPES[self.code]).itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """A quantised weight [out, in] in another tool's file.

    parts: the names of its tensors.
    read: makes it, on the host: values [out, in], scale and zero point [out, G].
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]
    read: Callable[[Read], QArray]


def code(dtype: DTypeLike) -> str:
    """safetensors' name of a type."""
    return _CODES[jnp.dtype(dtype)]


def dense(leaf: Weight, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A weight in `dtype`, dequantised where it is quantised."""
    # A jax.Array keeps the host copy it once made; that of the reshaped one dies with it.
    return Tensor(code(dtype), shape, lambda: np.asarray(dequantize(leaf).astype(dtype).reshape(-1)))


def open_file(file: Path):
    """The library's reader. Raises ValueError when the file is cut off or its header is not as it should be."""
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file: {error}.") from error


def read_tensor(file: Path, name: str, code: str) -> np.ndarray:
    """One tensor. A mapping of its own for each: pages that were read count as memory in use until it is closed."""
    with open_file(file) as opened:  # checks every offset in the header
        if code != "F8_E4M3":
            return opened.get_tensor(name)
    with open(file, "rb") as raw:  # NumPy alone has no such type, and the library gives up
        size = int.from_bytes(raw.read(8), "little")
        entry = json.loads(raw.read(size))[name]
        start, end = entry["data_offsets"]
        raw.seek(8 + size + start)
        return np.frombuffer(raw.read(end - start), jnp.dtype("float8_e4m3fn")).reshape(entry["shape"])


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, tensor by tensor: the library's own writer copies all of them first."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            host = np.ascontiguousarray(tensor.make()).reshape(-1).view(np.uint8)
            if host.size != tensor.nbytes:
                raise AssertionError(f"{name} is {host.size} bytes; its header says {tensor.nbytes}.")
            out.write(host.data)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., ceil(n * bits / 32)] from uint8 [..., n] below 2^bits, the first in the lowest bits. bits: 4 or 8."""
    spare = -numbers.shape[-1] % (32 // bits)
    numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, spare)])
    octets = numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., 32 / bits]: the numbers in each int32, that in its lowest bits first. bits: 4 or 8."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, 4)
    return octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, 8)


def signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int8 in [-2^(bits-1), 2^(bits-1)): uint8 below 2^bits less the middle of their range."""
    return (numbers - np.uint8(2 ** (bits - 1))).view(np.int8)


def unsigned(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `signed`."""
    return numbers.view(np.uint8) + np.uint8(2 ** (bits - 1))


def format_of(w: QArray) -> Format:
    """What the weight is quantised to. Groups as wide as the weight are a channel."""
    width = math.prod(w.shape[w.scale.ndim - 1 :])
    inputs = "float" if not w.int8_inputs else "dynamic" if w.x_scale is None else "static"
    values: Any = str(w.values.dtype)
    return Format(values, None if w.groups == 1 else width // w.groups, w.zero_point is not None, inputs)


def to_leaf(w: QArray, info: ParamInfo, name: str) -> QArray:
    """The weight in the model's shape, on the default device.

    Raises ValueError for scales that are no positive numbers: they would make every logit NaN.
    """
    for part, scale in (("scale", w.scale), ("input scale", w.x_scale)):
        if scale is not None and not (np.isfinite(scale) & (np.asarray(scale) >= 0)).all():
            raise ValueError(f"{name}: the {part} has values that are negative or not finite. Is the file damaged?")
    if w.x_scale is not None and not np.all(np.asarray(w.x_scale) > 0):
        raise ValueError(f"{name}: the input scale is 0, which nothing can be divided by.")
    kept = info.shape[: len(info.shape) - info.contracted]
    per_group = (None if part is None else part.reshape(*kept, -1) for part in (w.scale, w.zero_point))
    moved = QArray(w.values.reshape(info.shape), *per_group, w.x_scale, w.int8_inputs)  # pyright: ignore
    return jax.tree.map(lambda part: jax.device_put(part).block_until_ready(), moved)
