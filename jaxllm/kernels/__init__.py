"""Kernels for what XLA does badly, each with its plain-XLA twin, and the choice between them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.arrays import Fast, Kernel, Packed, QArray
from jaxllm.kernels import cpu
from jaxllm.params import Params, flatten, unflatten

_log = logging.getLogger(__name__)


def choose(params: Params, platform: str, batch: Sequence[str] = ()) -> dict[str, Kernel]:
    """{path: kernel} of the weights that have one on a platform; XLA contracts the others. A line of the log tells.

    params: shapes are enough; with shardings where there is a mesh. batch: the axes of the mesh that split the batch;
    what they split of a weight is gathered, as XLA would.
    """
    if platform == "cpu":
        return _choose_cpu(params)
    if platform == "gpu":
        return _choose_gpu(params)
    if platform != "tpu":
        return {}
    from jaxllm.kernels.tpu import weights  # with Pallas, whose import others need not wait for

    return weights.choose(params, batch)


def _choose_cpu(params: Params) -> dict[str, Kernel]:
    return {} if cpu.library() is None else _choose(params, "CPU", cpu.refuses, cpu.contract)


def _choose_gpu(params: Params) -> dict[str, Kernel]:
    """For one device."""
    from jaxllm.kernels.gpu import matvec

    return _choose(params, "GPU", matvec.refuses, matvec.contract)


def _choose(params: Params, name: str, refuses: Callable[[Any], str], contract: Kernel) -> dict[str, Kernel]:
    matrices = {path: w for path, w in flatten(params).items() if path.endswith("/w") and len(w.shape) > 1}
    reasons = {path: reason for path, w in matrices.items() if (reason := refuses(w))}
    example = "".join(f" ({path}: {reason})" for path, reason in [*reasons.items()][:1])
    taken = len(matrices) - len(reasons)
    _log.info("%s kernels contract %d weights, XLA %d%s", name, taken, len(reasons), example)
    return {path: contract for path in matrices if path not in reasons}


def prepare(params: Params, platform: str) -> Params:
    """The weights of one device, or their shapes, as its kernels read them."""
    if platform != "cpu" or cpu.library() is None:
        return params

    flat = flatten(params)
    packable = {path: w for path, w in flat.items() if isinstance(w, QArray) and not cpu.unfit(w)}
    shapes = {path: _packed_shapes(w) for path, w in packable.items()}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return unflatten(flat | shapes)

    def fill(rooms: Sequence[np.ndarray]) -> None:
        left = iter(rooms)
        for w in packable.values():  # one at a time
            for part in jax.tree.leaves(cpu.pack(jax.tree.map(np.asarray, w), np)):
                next(left)[...] = part

    leaves, structure = jax.tree.flatten([*shapes.values()])  # a dict's would be in order of names
    packed = jax.tree.unflatten(structure, cpu.in_huge_pages(leaves, fill))
    flat |= dict(zip(shapes, packed, strict=True))
    cpu.ask_for_huge_pages(w for w in flat.values() if isinstance(w, jax.Array))
    return unflatten(flat)


def _packed_shapes(w: QArray) -> Packed:
    leaves, structure = jax.tree.flatten(w)
    return _trace_pack(structure, *((leaf.shape, leaf.dtype) for leaf in leaves))


@functools.cache  # many weights of a model are alike
def _trace_pack(structure: Any, *leaves: tuple[tuple[int, ...], Any]) -> Packed:
    return jax.eval_shape(cpu.pack, jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]))


def settle(state: Any) -> None:
    """Where the state of one device lies, its kernels are to read it fast."""
    if jax.default_backend() == "cpu" and cpu.library() is not None:
        cpu.ask_for_huge_pages(jax.tree.leaves(jax.block_until_ready(state)))


def equip(params: Params, kernels: Mapping[str, Kernel], platform: str) -> Params:
    """The same weights, those with a kernel as `Fast`."""
    if not kernels:
        return params
    look_up = cpu.take if platform == "cpu" else None

    def one(path: str, w: Any) -> Any:
        return Fast(w, kernels[path], platform, look_up) if path in kernels else w

    return unflatten({path: one(path, w) for path, w in flatten(params).items()})
