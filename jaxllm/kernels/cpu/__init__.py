"""C++ kernels for CPUs, which XLA calls through its foreign function interface: matmuls of few rows, of quantised
weights, and of bfloat16 where the processor multiplies it; and attention over the cache. XLA's own forms of these read
memory at a tenth of its rate, or wake a thread for each.

Set JAXLLM_CPU_KERNELS to 0 to do without them, or to the file of another build; JAXLLM_ISA to avx512 (without
bfloat16 products), avx2 or portable for kernels of less than this processor has; JAXLLM_THREADS to the number of
threads, by default as many as the process may run on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm import activations, arrays
from jaxllm.activations import Activations
from jaxllm.arrays import Packed, Prepared, QArray
from jaxllm.cache import LayerCache, Rounded

_log = logging.getLogger(__name__)
_TARGETS = {
    "jaxllm_matmul": "JaxllmMatmul",
    "jaxllm_attend": "JaxllmAttend",
    "jaxllm_take": "JaxllmTake",
    "jaxllm_likeliest": "JaxllmLikeliest",
}
_BLOCK = 32  # kBlock of kernels.h
_ALIGNED, _HUGE = 64, 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h
_LARGEST_K = 1 << 16  # of int8: sums of more might leave int32
_DENSE_ROWS = 16  # of more, XLA's matmul of float weights is the faster one, but see _takes_many_rows


@functools.cache
def library() -> Path | None:
    """The kernels' file, registered with XLA; None where they were not built or are not wanted, which the log tells."""
    wanted = os.environ.get("JAXLLM_CPU_KERNELS", "")
    if wanted == "0":
        _log.info("CPU kernels: switched off, XLA does without")
        return None
    spec = importlib.util.find_spec("jaxllm.kernels.cpu._kernels")
    path = wanted or (spec.origin if spec is not None else None)
    if path is None:
        _log.warning(
            "CPU kernels: not built, XLA does without; with a C++ compiler, `pip install` jaxllm again builds them"
        )
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        _log.warning("CPU kernels: %s cannot be loaded (%s), XLA does without", path, error)
        return None
    for target, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    _log.info("CPU kernels: %s", _isa(library))
    return Path(path)


def _isa(library: ctypes.CDLL) -> str:
    """The instruction set in use."""
    library.jaxllm_isa.restype = ctypes.c_char_p
    return library.jaxllm_isa().decode()


@functools.cache
def version() -> str:
    """What tells builds of the kernels apart; "" without them."""
    path = library()
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def in_huge_pages(arrays: Sequence[Any], fill: Callable[[Sequence[np.ndarray]], None]) -> list[jax.Array]:
    """Arrays in memory of huge pages, which is read at up to 1.8 times the rate.

    arrays: their shapes and types. fill: puts the values into NumPy's arrays, which are given in that order.
    """
    offsets, end = [], 0
    for x in arrays:
        offsets.append(end)
        end += -(-x.size * x.dtype.itemsize // _ALIGNED) * _ALIGNED
    if sys.platform == "linux" and end >= _HUGE:
        memory = mmap.mmap(-1, end + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        room = np.frombuffer(memory, np.uint8)
        room = room[-room.ctypes.data % _HUGE :]
    else:
        room = np.empty(end + _ALIGNED, np.uint8)
        room = room[-room.ctypes.data % _ALIGNED :]
    rooms = [
        room[offset : offset + x.size * x.dtype.itemsize].view(x.dtype).reshape(x.shape)
        for x, offset in zip(arrays, offsets, strict=True)
    ]
    fill(rooms)
    # Aligned as XLA wants it: the device's array is this memory.
    return [jax.device_put(x, may_alias=True) for x in rooms]


def ask_for_huge_pages(arrays: Iterable[jax.Array]) -> None:
    """The same for arrays where they are: a hint, which Linux before 6.1 follows slowly, if at all."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def ask(first: int, end: int) -> bool:
        size = (end - first) * _HUGE
        return size > 0 and all(not madvise(first * _HUGE, size, how) for how in (_MADV_HUGEPAGE, _MADV_COLLAPSE))

    ranges: list[tuple[int, int]] = []  # of addresses; small arrays lie side by side, and share pages
    for x in sorted(arrays, key=lambda x: x.unsafe_buffer_pointer()):
        start = x.unsafe_buffer_pointer()
        if ranges and start // _HUGE <= ranges[-1][1] // _HUGE:
            ranges[-1] = ranges[-1][0], max(start + x.nbytes, ranges[-1][1])
        else:
            ranges.append((start, start + x.nbytes))
    for start, end in ranges:
        # A page at either end may reach beyond what is there.
        ask(start // _HUGE, -(-end // _HUGE)) or ask(-(-start // _HUGE), end // _HUGE)


def refuses(w: Prepared) -> str:
    """Why `contract` cannot take a weight as it is; "" where it can."""
    if isinstance(w, Packed):
        return ""
    if isinstance(w, QArray):
        return unfit(w) or "not packed"
    return "" if w.dtype in (jnp.float32, jnp.bfloat16) else f"{w.dtype} weights"


def unfit(w: QArray) -> str:
    """Why a weight cannot be packed; "" where it can."""
    width = math.prod(w.shape[w.scale.ndim - 1 :])
    if w.values.dtype not in (jnp.int8, jnp.int4):
        return f"{w.values.dtype} values"
    if width % _BLOCK or (width // w.groups) % _BLOCK:
        return f"groups of {width // w.groups} of {width} values, which {_BLOCK} does not divide"
    return "" if width <= _LARGEST_K else f"{width} contracted values"


def pack(w: QArray, numpy: Any = jnp) -> Packed:
    """As the kernels read it; see kernels.h.

    numpy: NumPy itself for a weight of NumPy arrays: nothing is compiled.
    """
    flat = arrays.as_matrix(w)
    rows, width = flat.shape
    fill = -rows % arrays.PANEL

    def panels(part: Any) -> Any:  # [N, …] to [panel, 16, …]
        if fill:
            part = numpy.pad(part, ((0, fill), *((0, 0),) * (part.ndim - 1)))
        return part.reshape(-1, arrays.PANEL, *part.shape[1:])

    values = panels(flat.values.astype(numpy.int8))
    if w.values.dtype == jnp.int4:
        halves = (values + 8).astype(numpy.uint8).reshape(-1, arrays.PANEL, width // 8, 2, 4)
        values = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    else:
        values = values.reshape(-1, arrays.PANEL, width // 4, 4)
    values = values.swapaxes(1, 2).reshape(values.shape[0], -1, 4 * arrays.PANEL)
    zero_point = None if flat.zero_point is None else panels(flat.zero_point).swapaxes(1, 2)
    return Packed(
        values,
        panels(flat.scale).swapaxes(1, 2),
        zero_point,
        w.x_scale,
        int8_inputs=w.int8_inputs,
        shape=w.shape,
        contracted=w.contracted,
    )


def contract(
    contracted: int, x: Activations, weights: Sequence[Prepared], add: jax.Array | None, out: DTypeLike
) -> list[jax.Array]:
    """Activations [b..., K...] times each of several weights [n..., K...]: [b..., n...] of type `out`.

    add: is added to the result of a single weight. Quantised weights must be Packed.
    """
    steps = [w.x_scale for w in weights if isinstance(w, Packed) and w.x_scale is not None]
    kinds = {w.values.dtype for w in weights if isinstance(w, Packed)}
    if len(weights) > 1 and (steps or len(kinds) > 1):  # each is applied to activations rounded for it
        return [contract(contracted, x, [w], None, out)[0] for w in weights]
    given = activations.shape(x)
    batch = given[: len(given) - contracted]
    rows = math.prod(batch)
    if rows > _DENSE_ROWS and not _takes_many_rows(x, weights):
        value = activations.value(x)
        results = [arrays.contract_cpu(contracted, value, w).astype(out) for w in weights]
        return results if add is None else [add + y for y in results]

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(rows, -1)

    match x:
        case activations.Normed():
            before, arguments, eps = "norm", [flat(x.x), x.w], x.eps
        case activations.Gated():
            before, arguments, eps = "gate", [flat(x.x), flat(x.up)], 0.0
        case _:
            before, arguments, eps = "nothing", [flat(x)], 0.0
    arguments += [] if add is None else [flat(add)]
    arguments += steps
    int8_inputs = any(isinstance(w, Packed) and w.int8_inputs for w in weights)
    buffers = []
    for w in weights:
        parts = _parts(w, contracted)
        buffers.append(len(parts))
        arguments += parts
    kept = [w.shape[: len(w.shape) - contracted] for w in weights]
    call = jax.ffi.ffi_call(
        "jaxllm_matmul", [jax.ShapeDtypeStruct((rows, math.prod(n)), out) for n in kept], vmap_method="sequential"
    )
    y = call(
        *arguments,
        before=before,
        eps=np.float32(eps),
        add=add is not None,
        inputs="static" if steps else "dynamic" if int8_inputs else "float",
        buffers=np.asarray(buffers, np.int32),
    )
    return [y_MN.reshape(*batch, *n) for y_MN, n in zip(y, kept, strict=True)]


def _takes_many_rows(x: Activations, weights: Sequence[Prepared]) -> bool:
    """Whether the kernels are faster than XLA for any number of rows."""
    if any(isinstance(w, Packed) for w in weights):
        return True
    types = {activations.dtype(x), *(w.dtype for w in weights if isinstance(w, jax.Array))}
    return types == {jnp.dtype(jnp.bfloat16)} and _isa(ctypes.CDLL(str(library()))) == "avx512bf16"


def _parts(w: Prepared, contracted: int) -> list[jax.Array]:
    """A weight's buffers."""
    if isinstance(w, Packed):
        return [part for part in (w.values, w.scale, w.zero_point) if part is not None]
    assert isinstance(w, jax.Array)
    return [w.reshape(-1, math.prod(w.shape[w.ndim - contracted :]))]


def take(w: Prepared, rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    """As `arrays.take`. XLA would make the whole of a bfloat16 table float32."""
    width = w.shape[1]
    if dtype not in (jnp.float32, jnp.bfloat16):
        return take(w, rows, jnp.float32).astype(dtype)
    call = jax.ffi.ffi_call("jaxllm_take", jax.ShapeDtypeStruct((rows.size, width), dtype), vmap_method="sequential")
    return call(rows.reshape(-1).astype(jnp.int32), *_parts(w, 1)).reshape(*rows.shape, width)


def attend(
    past: LayerCache,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    angles_BTh: jax.Array,
    window: int | None,
) -> tuple[jax.Array, LayerCache]:
    """What `models.decoder.Attend` says, over a cache that is not split and is updated in place: see `ffi.cc`."""
    entries, structure = jax.tree.flatten((past.k, past.v))
    if isinstance(past.k, Rounded):  # values first, then scales
        entries = [entries[0], entries[2], entries[1], entries[3]]
    call = jax.ffi.ffi_call(
        "jaxllm_attend",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNH, *entries)],
        input_output_aliases={6 + i: 1 + i for i in range(len(entries))},
        vmap_method="sequential",
    )
    cos, sin = jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    y_BTNH, *cache = call(q_BTNH, k_BTKH, v_BTKH, positions_BT, cos, sin, *entries, window=np.int64(window or 0))
    if isinstance(past.k, Rounded):
        cache = [cache[0], cache[2], cache[1], cache[3]]
    k, v = jax.tree.unflatten(structure, cache)
    return y_BTNH, LayerCache(k, v, past.split)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """As `sample.likeliest`: XLA on CPU has no vectors for pairs of value and index."""
    row = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.int32)
    return jax.ffi.ffi_call("jaxllm_likeliest", row, vmap_method="sequential")(logits_BV)
