"""jaxllm's own format: a directory with jaxllm.json, the tokenizer's files and arrays/, written by Orbax.

jaxllm.json holds the format version, the config, the ledger, each weight's kind, shape and type, and the size and
hash of every file in arrays/: Orbax itself does not notice a changed byte in a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.arrays import QArray, Weight
from jaxllm.checkpoint.names import BEYOND_FLOAT16, listing, read_json
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Entry, param_info
from jaxllm.params import ParamInfo, flatten, unflatten
from jaxllm.text import Tokenizer

MANIFEST = "jaxllm.json"
_VERSION = 1
_ARRAYS = "arrays"
_ORBAX_BYTES = 128 * 1024**2  # what Orbax may hold on the host at once, or one array if that is larger
_CHUNK_BYTES = 8 * 1024**2  # whole arrays would be compressed and decompressed in one piece each
_SPARE_BYTES = 32 * 1024**2  # room for everything that is not a weight


def save(lm: LM, path: Path) -> None:
    """See `checkpoint.save`."""
    flat = flatten(lm.params)
    leaves = {key: describe(leaf) for key, leaf in flat.items()}
    check_leaves(lm.cfg, leaves, "This model")
    with new_directory(path, lm.weight_bytes) as temp:
        _write_arrays(temp / _ARRAYS, {key: _fields(leaf) for key, leaf in flat.items()})
        if lm.tokenizer:
            lm.tokenizer.save(temp)
        manifest = {
            "version": _VERSION,
            "config": dataclasses.asdict(lm.cfg),
            "ledger": [dataclasses.asdict(entry) for entry in lm.ledger],
            "leaves": leaves,
            "files": _digests(temp / _ARRAYS),
        }
        (temp / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load(path: Path, *, dtype: str | None = None) -> LM:
    """Reads a directory that `save` wrote. The ledger is the saved one, unchanged.

    dtype: casts float weights and the type computed in; int8 values and their scales stay as they are.
    Raises ValueError, naming the directory, when anything in it is missing, changed or of another version.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{path} is in version {manifest.get('version')!r} of jaxllm's format; this jaxllm reads {_VERSION}."
        )
    try:
        cfg = ModelConfig.from_json(manifest["config"])
        target = cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)
        ledger = tuple(Entry(**entry) for entry in manifest["ledger"])
        leaves, files = dict(manifest["leaves"]), dict(manifest["files"])
        check_leaves(cfg, leaves, "It")
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} is not as `save` wrote it: {type(error).__name__}: {error}.") from error
    tokenizer = load_tokenizer(path)
    stored = _digests(path / _ARRAYS)
    if missing := [name for name in files if name not in stored]:
        raise ValueError(f"{path / _ARRAYS} lacks {listing(missing)}. Copy or save the model again.")
    if changed := [name for name, digest in files.items() if stored[name] != digest]:
        raise ValueError(f"{path / _ARRAYS} was damaged: {listing(changed)} changed. Copy or save the model again.")
    info = param_info(cfg)
    expected = {key: _abstract(target, info[key], leaf["kind"]) for key, leaf in leaves.items()}
    arrays = _read_arrays(path, expected)
    if target.dtype == "float16" != cfg.dtype:
        for key, fields in arrays.items():
            if "array" in fields and not jnp.isfinite(fields["array"]).all():
                raise ValueError(f"{path}: {BEYOND_FLOAT16.format(key)}")
    flat = {key: QArray(**f) if leaves[key]["kind"] == "qarray" else f["array"] for key, f in arrays.items()}
    return LM(target, unflatten(flat), ledger, tokenizer)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer in a directory, None when it holds none."""
    return Tokenizer.from_dir(path) if (path / "tokenizer.json").is_file() else None


@contextlib.contextmanager
def new_directory(path: Path, weight_bytes: int) -> Iterator[Path]:
    """A directory to write to, which becomes `path` when the block ends and vanishes when it fails.

    weight_bytes: about what will be written.
    Raises FileExistsError when `path` is there and not an empty directory, OSError when the disk lacks room.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is no empty directory. Remove it, or write to another path.")
    home = next(parent for parent in path.parents if parent.exists())
    free, needed = shutil.disk_usage(home).free, weight_bytes + _SPARE_BYTES
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No room for the model: it needs {needed / 1e9:.2f} GB and {home} has {free / 1e9:.2f} GB",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        temp.mkdir()
        yield temp
        if path.exists():
            path.rmdir()
        os.rename(temp, path)
    except BaseException:  # an interrupt as well
        shutil.rmtree(temp, ignore_errors=True)
        raise


def describe(leaf: Weight) -> dict[str, Any]:
    """A weight's kind, shape and type, as JSON."""
    kind, dtype = ("qarray", leaf.values.dtype) if isinstance(leaf, QArray) else ("array", leaf.dtype)
    return {"kind": kind, "shape": list(leaf.shape), "dtype": str(dtype)}


def check_leaves(cfg: ModelConfig, leaves: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Raises ValueError when the weights described are not those of `cfg`."""
    if cfg.num_layers > len(leaves):
        raise ValueError(f"{source} holds {len(leaves)} weights but claims {cfg.num_layers} layers.")
    info = param_info(cfg)
    if missing := [key for key in info if key not in leaves]:
        raise ValueError(f"{source} lacks {listing(missing)}.")
    if unexpected := [key for key in leaves if key not in info]:
        raise ValueError(f"{source} has {listing(unexpected)}, which its config does not.")
    for key, leaf in leaves.items():
        quantised = leaf["kind"] == "qarray"
        if quantised and not info[key].contracted:
            raise ValueError(f"{source}: {key} is quantised, and is no matmul weight.")
        dtype = "int8" if quantised else cfg.dtype
        expected = {
            "kind": "qarray" if quantised else "array",
            "shape": list(info[key].shape),
            "dtype": dtype,
        }
        if leaf != expected:
            raise ValueError(f"{source}: {key} is {dict(leaf)}; its config makes it {expected}.")


def _fields(leaf: Weight) -> dict[str, jax.Array]:
    return {"values": leaf.values, "scale": leaf.scale} if isinstance(leaf, QArray) else {"array": leaf}


def _abstract(cfg: ModelConfig, info: ParamInfo, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    if kind == "array":
        return {"array": array(info.shape, cfg.dtype)}
    kept = len(info.shape) - info.contracted
    return {
        "values": array(info.shape, "int8"),
        "scale": array(info.shape[:kept] + (1,) * info.contracted, "float32"),
    }


def _digests(path: Path) -> dict[str, str]:
    """{file below path: "size:sha256"}."""
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            digests[file.relative_to(path).as_posix()] = f"{file.stat().st_size}:{digest}"
    return digests


def _checkpointer(tree: Any) -> Any:
    import orbax.checkpoint as ocp  # takes half a second

    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    limit = 1.01 * max(largest, _ORBAX_BYTES) / 1e9
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit))


def _write_arrays(path: Path, flat: Mapping[str, Mapping[str, jax.Array]]) -> None:
    import orbax.checkpoint as ocp

    tree = unflatten(flat)
    with _checkpointer(tree) as checkpointer:
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=chunks))


def _read_arrays(path: Path, expected: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> dict[str, dict[str, jax.Array]]:
    import orbax.checkpoint as ocp

    def args(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape)

    tree = unflatten(expected)
    try:
        with _checkpointer(tree) as checkpointer:
            restored = checkpointer.restore(
                path / _ARRAYS, args=ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(args, tree))
            )
    except Exception as error:  # whatever Orbax and TensorStore raise
        raise ValueError(f"The arrays in {path} cannot be read: {error}") from error
    flat = flatten(restored)
    arrays: dict[str, dict[str, jax.Array]] = {key: {} for key in expected}
    for key in expected:
        for field, leaf in expected[key].items():
            array = arrays[key][field] = flat.pop(f"{key}/{field}")
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                raise ValueError(f"{path}: {key} is stored as {array.dtype}{array.shape}, not {leaf}.")
    return arrays
