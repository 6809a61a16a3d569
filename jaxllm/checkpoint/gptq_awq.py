"""GPTQ and AWQ checkpoints in, as AutoGPTQ and GPTQModel, and AutoAWQ, write them.

Both have, for a weight [out, in] in groups of g inputs, w = scales * (q - z) with unsigned q and z of 4 bits (GPTQ: or
8), packed into int32, lowest bits first:

    GPTQ  qweight [in / n, out] along inputs,  qzeros [G, out / n] along outputs,  scales [G, out],  g_idx [in]
    AWQ   qweight [in, out / n] along outputs, qzeros [G, out / n] along outputs,  scales [G, out]

where n = 32 / bits. AWQ packs eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's first format stores z - 1.
Sources: github.com/ModelCloud/GPTQModel, github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.arrays import QArray
from jaxllm.checkpoint import tensors
from jaxllm.checkpoint.names import listing
from jaxllm.checkpoint.tensors import Header, Read, Stored
from jaxllm.config import ModelConfig

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where each of eight outputs lies in its int32


@dataclasses.dataclass(frozen=True)
class _Kind:
    """group: None for all inputs. along_inputs: whether qweight is packed so. zero_offset: z less what is stored."""

    bits: int
    group: int | None
    along_inputs: bool
    zero_offset: int = 0

    def shape(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """[out, in]."""
        rows, columns = qweight
        per_word = 32 // self.bits
        return (columns, rows * per_word) if self.along_inputs else (columns * per_word, rows)

    def headers(self, shape: tuple[int, int], scale: str) -> dict[str, Header]:
        out, inputs = shape
        per_word, groups = 32 // self.bits, inputs // (self.group or inputs)
        qweight = (inputs // per_word, out) if self.along_inputs else (inputs, out // per_word)
        return {
            "qweight": ("I32", qweight),
            "qzeros": ("I32", (groups, out // per_word)),
            "scales": (scale, (groups, out)),
            "g_idx": ("I32", (inputs,)),
        }

    def weights(self, qweight: np.ndarray) -> np.ndarray:
        """uint8 [out, in]."""
        if not self.along_inputs:
            return np.ascontiguousarray(self._outputs(qweight).T)
        numbers = tensors.unpack(qweight, self.bits).transpose(1, 0, 2)
        return np.ascontiguousarray(numbers).reshape(qweight.shape[1], -1)

    def zeros(self, qzeros: np.ndarray) -> np.ndarray:
        """uint8 [out, G]. Modulo 2^bits, the inverse of how they were packed."""
        return np.ascontiguousarray(self._outputs(qzeros).T + np.uint8(self.zero_offset)) & np.uint8(2**self.bits - 1)

    def _outputs(self, words: np.ndarray) -> np.ndarray:
        """uint8 [rows, out]."""
        numbers = tensors.unpack(words, self.bits)
        return (numbers if self.along_inputs else numbers[..., _AWQ_PLACES]).reshape(words.shape[0], -1)


def find_gptq(
    config: Mapping[str, Any], cfg: ModelConfig, headers: Mapping[str, Header], read: Read
) -> dict[str, Stored]:
    """{module: its quantised weight}, from headers, g_idx and biases.

    Raises ValueError for other bits than 4 and 8, another layout than "gptq" and "gptq_v2", bits that differ by module
    ("dynamic"), an order of inputs that makes groups of scattered ones (desc_act), and tensors that do not fit.
    """
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise ValueError(f"checkpoint_format is {layout!r}, or Marlin's; supported: 'gptq', 'gptq_v2'.")
    if config.get("dynamic"):
        raise ValueError("quantization_config has 'dynamic', bits that differ from module to module: not supported.")
    kind = _Kind(_bits(config, (4, 8)), _group(config), along_inputs=True, zero_offset=int(layout == "gptq"))
    needed = _PARTS if config.get("desc_act") and kind.group else _PARTS[:3]
    return {
        module: _stored(module, kind, needed, cfg, headers, read)
        for module in sorted({name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in _PARTS})
    }


def find_awq(
    config: Mapping[str, Any], cfg: ModelConfig, headers: Mapping[str, Header], read: Read
) -> dict[str, Stored]:
    """{module: its quantised weight}, from headers.

    Raises ValueError for other bits than 4, another layout than "gemm", and tensors that do not fit.
    """
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"version is {version!r}; supported: 'gemm'.")
    kind = _Kind(_bits(config, (4,)), _group(config), along_inputs=False)
    return {
        module: _stored(module, kind, _PARTS[:3], cfg, headers, read)
        for module in sorted({name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in _PARTS[:3]})
    }


def _bits(config: Mapping[str, Any], allowed: tuple[int, ...]) -> int:
    bits = config.get("bits", config.get("w_bit"))
    if not isinstance(bits, int) or bits not in allowed:
        raise ValueError(f"bits is {bits!r}; supported: {', '.join(map(str, allowed))}.")
    return bits


def _group(config: Mapping[str, Any]) -> int | None:
    size = config.get("group_size", config.get("q_group_size"))
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or 0 < size < 2**31):
        raise ValueError(f"group_size is {size!r}; expected a positive integer, or -1 for a whole channel.")
    return None if size == -1 else size


def _stored(
    module: str, kind: _Kind, needed: tuple[str, ...], cfg: ModelConfig, headers: Mapping[str, Header], read: Read
) -> Stored:
    found = {part: headers[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in headers}
    if missing := [f"{module}.{part}" for part in needed if part not in found]:
        raise ValueError(f"It lacks {listing(missing)}. Is the download complete?")
    qweight = found["qweight"][1]
    if len(qweight) != 2 or 0 in qweight:
        raise ValueError(f"{module}.qweight has shape {qweight}; expected two dimensions.")
    out, inputs = shape = kind.shape(qweight)
    if inputs % (kind.group or 1) or out % (32 // kind.bits):
        raise ValueError(
            f"{module} has {inputs} inputs and {out} outputs, which groups of {kind.group} and "
            f"int32 of {32 // kind.bits} numbers do not divide."
        )
    scale = found["scales"][0]
    if scale not in tensors.FLOATS:
        raise ValueError(f"{module}.scales is {scale}; expected {', '.join(tensors.FLOATS)}.")
    for part, expected in kind.headers(shape, scale).items():
        if part in found and found[part] != expected:
            raise ValueError(f"{module}.{part} is {found[part]}; its config makes it {expected}.")
    if "g_idx" in found:
        order = read(f"{module}.g_idx")
        if not np.array_equal(order, np.arange(inputs) // (kind.group or inputs)):
            raise ValueError(
                f"{module}.g_idx puts inputs that are not neighbours into one group (desc_act), which would need the "
                "activations permuted. Take a checkpoint with desc_act=false, or quantise the original here."
            )
    parts = [f"{module}.{part}" for part in found]
    bias = f"{module}.bias"
    if bias in headers and not (cfg.qkv_bias and module.endswith((".q_proj", ".k_proj", ".v_proj"))):
        # AutoGPTQ wrote a bias of zeros for every layer that has none.
        if headers[bias][0] not in tensors.FLOATS or headers[bias][1] != (out,) or read(bias).any():
            raise ValueError(f"{bias} is not all zeros, and this architecture has no such bias.")
        parts.append(bias)

    def unpack(read: Read) -> QArray:
        middle = 2 ** (kind.bits - 1)
        zeros = kind.zeros(read(f"{module}.qzeros"))
        zero_point = None if (zeros == middle).all() else tensors.signed(zeros, kind.bits)
        values = tensors.signed(kind.weights(read(f"{module}.qweight")), kind.bits).astype(f"int{kind.bits}")
        scale = np.ascontiguousarray(read(f"{module}.scales").T)
        return QArray(values, scale, zero_point)  # pyright: ignore[reportArgumentType]

    return Stored(shape, tuple(parts), unpack)
