"""Tensors of safetensors files: what a header says, one read, all written, and small integers packed into int32.

Format: 8 bytes of header size, the header in JSON, the tensors. huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxllm.arrays import QArray, Weight, dequantize
from jaxllm.checkpoint.place import Box, Place, put_host, whole
from jaxllm.formats import Format
from jaxllm.params import ParamInfo

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPES = FLOATS | {"I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn"}
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


def read_tensor(file: Path, name: str, shape: tuple[int, ...] | None = None, box: Box | None = None) -> np.ndarray:
    """One tensor, or a part of it, of which no other byte is read.

    shape: to take it as; its own by default. box: of that shape; all of it by default.
    """
    open_file(file)  # checks every offset in the header
    with open(file, "rb", buffering=0) as raw:  # a buffer reads ahead; a mapping counts as memory in use
        size = int.from_bytes(raw.read(8), "little")
        entry = json.loads(raw.read(size))[name]
        shape = tuple(entry["shape"]) if shape is None else shape
        box = whole(shape) if box is None else box
        out = np.empty([part.stop - part.start for part in box], jnp.dtype(_DTYPES[entry["dtype"]]))
        first = 8 + size + entry["data_offsets"][0]
        for at, piece in _runs(shape, box, out):
            _read_into(raw, first + at, piece, f"{file} ends before {name} does. Is the download complete?")
    return out


def read_all(file: Path, into: Mapping[str, np.ndarray]) -> None:
    """Fills arrays with the tensors of their names, all of the file. Raises ValueError where the file has others."""
    open_file(file)  # checks every offset in the header
    with open(file, "rb", buffering=0) as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
        header.pop("__metadata__", None)
        found = {name: (jnp.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])) for name, entry in header.items()}
        if found != {name: (room.dtype, room.shape) for name, room in into.items()}:
            raise ValueError(f"{file} has other tensors than expected: {len(found)}, where {len(into)} are.")
        for name, room in into.items():
            at = 8 + size + header[name]["data_offsets"][0]
            _read_into(raw, at, room.reshape(-1).view(np.uint8).data, f"{file} ends before {name} does.")


def _read_into(raw: io.FileIO, at: int, piece: memoryview, otherwise: str) -> None:
    raw.seek(at)
    while piece:  # one call reads 2 GB at most
        if not (count := raw.readinto(piece)):
            raise ValueError(otherwise)
        piece = piece[count:]


def _runs(shape: tuple[int, ...], box: Box, out: np.ndarray) -> Iterator[tuple[int, memoryview]]:
    """Where each stretch of a box begins, in bytes from the tensor's start, and where in `out` it is to go."""
    cut = [i for i, part in enumerate(box) if part.stop - part.start < shape[i]]
    axis = cut[-1] if cut else 0  # what lies behind the last one that is cut is read in one
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = np.int64(box[axis].start * strides[axis] if shape else 0)
    for part, stride in zip(box[:axis], strides, strict=False):
        starts = np.add.outer(starts, np.arange(part.start, part.stop) * stride)
    starts = starts.reshape(-1) * out.itemsize
    pieces = out.reshape(len(starts), -1).view(np.uint8)
    return ((int(start), piece.data) for start, piece in zip(starts, pieces, strict=True))


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


def to_leaf(w: QArray, info: ParamInfo, name: str, place: Place | None = None) -> QArray:
    """The weight in the model's shape, on the default device where no place is given.

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
    if place is None:
        return jax.tree.map(lambda part: put_host(part, None), moved)
    return jax.tree.map(put_host, moved, place(info, moved))
