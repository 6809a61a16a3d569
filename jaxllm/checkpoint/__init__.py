"""Weights in and out: Hugging Face and GGUF in, Hugging Face out, and jaxllm's own format both ways.

Checkpoints that are quantised already come in as compressed-tensors, GPTQ and AWQ, and go out as compressed-tensors.

The only code that reads or writes weights. Files are a stranger's: names, shapes, types and sizes are checked from
headers before a weight is read, and nothing here runs code that came with them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from jaxllm import hub, shard
from jaxllm.checkpoint import hf, native
from jaxllm.checkpoint.estimate import Estimate
from jaxllm.checkpoint.source import open_path
from jaxllm.checkpoint.stream import optimize_checkpoint
from jaxllm.compile import use_compilation_cache
from jaxllm.lm import LM
from jaxllm.params import unflatten

__all__ = [
    "Estimate",
    "export_compressed",
    "export_hf",
    "load",
    "load_header",
    "load_path",
    "optimize_checkpoint",
    "save",
]


def load(
    name_or_path: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    mesh: Mesh | None = None,
    rules: shard.Rules = shard.RULES,
    log: Callable[[str], None] | None = None,
) -> LM:
    """Loads a model by name or path: finds it with `hub.resolve`, then reads it with `load_path`.

    name_or_path, log: see `hub.resolve`; a Hugging Face id, a directory, a .gguf file or a known name.
    dtype, mesh, rules: see `load_path`.
    Raises hub.HubError when it cannot be had, and what `load_path` raises.
    """
    use_compilation_cache()  # whatever comes next compiles
    source = hub.resolve(name_or_path, log=log)
    return load_path(source.path, origin=source.origin, dtype=dtype, mesh=mesh, rules=rules)


def load_header(
    name_or_path: str | os.PathLike[str], dtype: str | None = None, *, log: Callable[[str], None] | None = None
) -> LM:
    """The model without its weights: config, ledger and tokenizer. Arguments as of `load`.

    `params` holds their shapes as jax.ShapeDtypeStruct; it is empty for a checkpoint of another tool's quantisation,
    of which only the weights tell.
    """
    found = hub.resolve(name_or_path, log=log)
    reader = open_path(found.path, origin=found.origin, dtype=dtype)
    return LM(reader.cfg, unflatten(reader.shapes or {}), reader.ledger, reader.tokenizer)


def load_path(
    path: str | os.PathLike[str],
    *,
    origin: str,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: shard.Rules = shard.RULES,
) -> LM:
    """Loads what is at `path`: a directory of `save`, a Hugging Face directory, or a .gguf file.

    origin: where the files come from, in a line, for the ledger. A directory of `save` has a ledger already.
    dtype: of float weights and activations: "float32", "bfloat16" or "float16". None keeps the checkpoint's, and
        means float32 for a quantised GGUF, whose weights are dequantised. Weights that compressed-tensors, GPTQ or
        AWQ quantised stay as they are stored.
    mesh, rules: as of `generate.compile`: each weight goes straight to where they want it, and no device holds another
        part. A process, of several that share the mesh, reads the parts that its own devices hold: of float weights in
        safetensors no other byte, of a GGUF matrix its rows, of jaxllm's own format its chunks, all of whose files are
        hashed, and of weights that other tools quantised, and of int4 and sparse ones, everything, one by one.
    Memory: the weights, one tensor more, and what Python and JAX take.
    Raises FileNotFoundError when nothing is there, ValueError when it cannot be read or the mesh does not divide it,
    before reading weights where headers tell.
    """
    if mesh is None or mesh.shape["stages"] > 1:  # stages place their weights themselves
        return open_path(Path(path), origin=origin, dtype=dtype).lm()
    place = functools.partial(shard.leaf_shardings, mesh=mesh, rules=rules)
    reader = open_path(Path(path), origin=origin, dtype=dtype, place=place)
    shard.check_mesh(reader.cfg, mesh, batch=mesh.size, rules=rules)  # a batch that fits; the true one is not known yet
    return reader.lm()


def save(lm: LM, path: str | os.PathLike[str]) -> None:
    """Writes a model in jaxllm's own format, which `load_path` restores bit for bit, ledger and tokenizer included.

    All or nothing: it is written beside `path` and renamed at the end.
    Raises FileExistsError when `path` exists and is not an empty directory, OSError when the disk is too full.
    """
    native.save(lm, Path(path))


def export_hf(lm: LM, path: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face directory that transformers loads: config, safetensors in shards of 2 GB, tokenizer.

    Quantised weights are written dequantised, in `lm.cfg.dtype`: see `export_compressed`. Layers narrower than others
    get heads and channels of zeros, which change no output. The ledger is left out, as is the rounding of
    activations and of the KV cache.
    All or nothing, and raises as `save` does; ValueError when no Hugging Face architecture is this model.
    """
    hf.export(lm, Path(path))


def export_compressed(lm: LM, path: str | os.PathLike[str], *, log: Callable[[str], None] | None = None) -> None:
    """Writes a Hugging Face directory whose weights stay quantised, as compressed-tensors, which vLLM reads.

    int4 and int8, by channel or group, symmetric or affine, become "pack-quantized"; "w8a8" and "w8a8-static"
    "int-quantized"; "fp8" "float-quantized". Values, scales and zero points are written as they are: `load_path` gives
    the same weights back, bit for bit.
    log: told what the format leaves out or changes. Embedding and head are written dequantised, in `lm.cfg.dtype`, for
        vLLM quantises linear layers only. An int8 KV cache is left out: the format has no scale for each token. So is
        the ledger.
    vLLM casts the scales of packed weights to the type it computes in: float32 scales lose bits there, bfloat16 ones in
    a bfloat16 model do not. Its int8 activations reach -128, ours -127. Its kernels may want channels and groups in
    multiples of 64 or 128.
    All or nothing, and raises as `save` does; ValueError when no layer is quantised, when the format has no such
    quantisation, and when q, k and v, or gate and up, which vLLM runs as one matmul, are not quantised alike.
    """
    hf.export_compressed(lm, Path(path), log)
