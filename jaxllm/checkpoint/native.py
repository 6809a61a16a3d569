"""jaxllm's own format: a directory with jaxllm.json, the tokenizer's files and arrays/<group>/, written by Orbax.

A group is the embedding, a layer, the final norm or the head: a model can be written and read a layer at a time.
jaxllm.json holds the format version, the config, the ledger, each weight's kind, shape and type (see leaves.py), and
the size and hash of every file in arrays/: Orbax itself does not notice a changed byte in a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.arrays import Weight
from jaxllm.checkpoint.leaves import Description, Fields, check_leaves, decode, describe, encode, expected, stored
from jaxllm.checkpoint.names import BEYOND_FLOAT16, listing, read_json
from jaxllm.checkpoint.place import Place
from jaxllm.checkpoint.reader import Lazy, Reader, in_group
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Entry, param_info
from jaxllm.params import flatten, unflatten
from jaxllm.text import Tokenizer
from jaxllm.transforms.layerwise import Leaves, split

MANIFEST = "jaxllm.json"
ARRAYS = "arrays"
_VERSION = 2
_ORBAX_BYTES = 128 * 1024**2  # what Orbax may hold on the host at once, or one array if that is larger
_CHUNK_BYTES = 8 * 1024**2  # whole arrays would be compressed and decompressed in one piece each
_SPARE_BYTES = 32 * 1024**2  # room for everything that is not a weight


def save(lm: LM, path: Path) -> None:
    """See `checkpoint.save`."""
    check_leaves(lm.cfg, {key: describe(leaf) for key, leaf in flatten(lm.params).items()}, "This model")
    with new_directory(path, lm.weight_bytes) as temp:
        leaves: dict[str, Description] = {}
        files: dict[str, str] = {}
        for group, own in split(lm.params):
            leaves |= write_group(temp / ARRAYS / group, group, own)
            files |= digests(temp / ARRAYS / group, group)
        write_manifest(temp, lm, leaves, files)


def write_group(path: Path, group: str, leaves: Leaves) -> dict[str, Description]:
    """Writes the weights of a group to the directory `path`, all or nothing. Returns what describes them, by path."""
    described: dict[str, Description] = {}
    flat: dict[str, Fields] = {}
    for name, leaf in leaves.items():
        described[f"{group}/{name}"], flat[name] = encode(leaf)
    write_arrays(path, flat)
    return described


def write_manifest(path: Path, lm: LM, leaves: Mapping[str, Description], files: Mapping[str, str]) -> None:
    """Writes all that makes groups in `path` a checkpoint. lm: its params are not looked at."""
    if lm.tokenizer:
        lm.tokenizer.save(path)
    manifest = {
        "version": _VERSION,
        "config": dataclasses.asdict(lm.cfg),
        "ledger": [dataclasses.asdict(entry) for entry in lm.ledger],
        "leaves": leaves,
        "files": files,
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def reader(path: Path, *, dtype: str | None = None, place: Place | None = None) -> Reader:
    """Opens a directory that `save` wrote. The ledger is the saved one, unchanged.

    dtype: casts float weights and the type computed in; quantised values and their scales stay as they are.
    place: where weights are put. Only the chunks are read that this process's devices have a part of; of int4 and
        sparse weights everything. But every process hashes all of the files.
    Raises ValueError, naming the directory, when anything in it is missing, changed or of another version.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{path} is in version {manifest.get('version')!r} of jaxllm's format; this jaxllm reads {_VERSION}. "
            "Make it again from the original checkpoint, or use the jaxllm that wrote it."
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
    if missing := [name for name in files if not (path / ARRAYS / name).is_file()]:
        raise ValueError(f"{path / ARRAYS} lacks {listing(missing)}. Copy or save the model again.")

    def require_unchanged(changed: list[str]) -> None:
        if changed:
            raise ValueError(f"{path / ARRAYS} was damaged: {listing(changed)} changed. Copy or save the model again.")

    sizes = {name: str((path / ARRAYS / name).stat().st_size) for name in files}
    require_unchanged([name for name, digest in files.items() if digest.partition(":")[0] != sizes[name]])

    def read(group: str) -> Lazy:
        found = {f"{group}/{name}": digest for name, digest in digests(path / ARRAYS / group).items()}
        require_unchanged([name for name in files if name.startswith(f"{group}/") and found.get(name) != files[name]])
        own, info = in_group(group, leaves), param_info(target)
        weights = {name: expected(leaves[key], info[key], target.dtype, place) for name, key in own.items()}
        arrays = read_arrays(path / ARRAYS / group, {name: stored(leaves[own[name]], weights[name]) for name in own})
        return {name: functools.partial(load, key, arrays[name], weights[name]) for name, key in own.items()}

    def load(key: str, fields: Fields, weight: Any) -> Weight:
        try:
            leaf = decode(leaves[key], fields, weight)
        except ValueError as error:
            raise ValueError(f"{path}: {key} cannot be read: {error}.") from error
        if target.dtype == "float16" != cfg.dtype and isinstance(leaf, jax.Array) and not jnp.isfinite(leaf).all():
            raise ValueError(f"{path}: {BEYOND_FLOAT16.format(key)}")
        return leaf

    bits = {
        key: 8 * sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values()) / math.prod(leaf["shape"])
        for key, leaf in leaves.items()
        if leaf["kind"] == "qarray" and (parts := stored(leaf, expected(leaf, param_info(cfg)[key], cfg.dtype)))
    }
    names = (path / MANIFEST, *(path / ARRAYS / name for name in files))
    shapes = {key: expected(leaf, param_info(target)[key], target.dtype) for key, leaf in leaves.items()}
    return Reader(target, ledger, tokenizer, names, read, bits, shapes)


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
    check_free(path)
    check_room(path, weight_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        temp.mkdir()
        yield temp
        move(temp, path)
    except BaseException:  # an interrupt as well
        shutil.rmtree(temp, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    """Raises FileExistsError when `path` is there and not an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is no empty directory. Remove it, or write to another path.")


def check_room(path: Path, weight_bytes: int) -> int:
    """Bytes free where `path` is or will be. Raises OSError when the weights do not fit."""
    home = next(parent for parent in path.parents if parent.exists())
    free, needed = shutil.disk_usage(home).free, weight_bytes + _SPARE_BYTES
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No room for the model: it needs {needed / 1e9:.2f} GB and {home} has {free / 1e9:.2f} GB",
        )
    return free


def move(temp: Path, path: Path) -> None:
    """Renames a directory, to what may be an empty one."""
    if path.exists():
        path.rmdir()
    os.rename(temp, path)


def digests(path: Path, below: str = "") -> dict[str, str]:
    """{file below path, with `below` before it: "size:sha256"}."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[(below / file.relative_to(path)).as_posix()] = f"{file.stat().st_size}:{digest}"
    return found


def _checkpointer(tree: Any) -> Any:
    import orbax.checkpoint as ocp  # takes half a second

    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    limit = 1.01 * max(largest, _ORBAX_BYTES) / 1e9
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit))


def write_arrays(path: Path, flat: Mapping[str, Mapping[str, jax.Array]]) -> None:
    """Writes arrays, {name: {field: array}}, to the new directory `path`, all or nothing."""
    import orbax.checkpoint as ocp

    tree = unflatten(flat)
    with _checkpointer(tree) as checkpointer:
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, save_args=chunks))


def read_arrays(path: Path, expected: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> dict[str, Fields]:
    """What `write_arrays` wrote. Raises ValueError when it is not as expected, but for the type of floats."""
    import orbax.checkpoint as ocp

    def args(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape)

    tree = unflatten(expected)
    try:
        with _checkpointer(tree) as checkpointer:
            restored = checkpointer.restore(
                path.absolute(), args=ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(args, tree))
            )
    except Exception as error:  # whatever Orbax and TensorStore raise
        raise ValueError(f"The arrays in {path} cannot be read: {error}") from error
    flat = flatten(restored)
    arrays: dict[str, Fields] = {key: {} for key in expected}
    for key in expected:
        for field, leaf in expected[key].items():
            array = arrays[key][field] = flat.pop(f"{key}/{field}")
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                raise ValueError(f"{path}: {key} is stored as {array.dtype}{array.shape}, not {leaf}.")
    return arrays
