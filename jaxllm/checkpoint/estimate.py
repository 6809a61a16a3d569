"""What a streamed compression will take, from headers and plans alone."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from jaxllm.calibrate import SITES
from jaxllm.checkpoint.reader import Reader, in_group
from jaxllm.config import ModelConfig
from jaxllm.lm import param_info
from jaxllm.transforms.layerwise import Stage, groups

_PROGRAM_BYTES = 600 * 1000**2  # Python, JAX, compiled programs, and the buffers of Orbax


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `optimize_checkpoint` reads, writes and holds.

    groups: parts that are written one by one. bytes_in: of the files that weights are read from.
    bytes_out: of the result's weights; zeros are counted, though files leave them out where there are many.
    stream_bytes: of the residual streams that are kept on disk meanwhile.
    peak_bytes: of memory, roughly. free_bytes: on the disk that is written to.
    """

    groups: int
    bytes_in: int
    bytes_out: int
    stream_bytes: int
    peak_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        sizes = (self.bytes_in, self.bytes_out, self.peak_bytes, self.free_bytes)
        read, written, peak, free = (f"{size / 1e9:.2f} GB" for size in sizes)
        return f"{self.groups} groups, {read} to read, {written} to write, {free} free, about {peak} of memory"


def estimate(reader: Reader, stages: Sequence[Stage], cfg: ModelConfig, out: Path) -> Estimate:
    """cfg: of the result."""
    bits = dict(reader.bits)
    for stage in stages:
        bits |= stage.plan.bits
    before = _sizes(reader.cfg, reader.bits)
    after = _sizes(cfg, bits)
    calibrated = [stage for stage in stages if stage.walk]
    tokens = sum(stage.plan.tokens_NT.size for stage in stages if stage.plan.tokens_NT is not None)
    stream = tokens * cfg.embed_dim * jnp.dtype(cfg.dtype).itemsize
    held = 0
    for group in groups(cfg):
        inside, new = (list(in_group(group, sizes).values()) for sizes in (before, after))
        largest = max(before[path] for path in inside)
        statistics = max((_statistics(reader.cfg, stage, group) for stage in calibrated), default=0)
        kept = sum(after[path] for path in new)
        if calibrated:
            kept += sum(before[path] for path in inside) + statistics
        # A weight is twice there while it goes from the file to the device, and its result while parts are joined.
        held = max(held, kept + max(2 * largest, largest + max(after[path] for path in new)))
    home = next(parent for parent in out.parents if parent.exists())
    return Estimate(
        groups=len(groups(cfg)),
        bytes_in=sum(file.stat().st_size for file in reader.files),
        bytes_out=sum(after.values()),
        stream_bytes=2 * stream,  # before and after a layer
        peak_bytes=_PROGRAM_BYTES + stream + held,
        free_bytes=shutil.disk_usage(home).free,
    )


def _sizes(cfg: ModelConfig, bits: Mapping[str, float]) -> dict[str, int]:
    """Bytes of each weight, by path."""
    item = 8 * jnp.dtype(cfg.dtype).itemsize
    return {path: math.ceil(math.prod(i.shape) * bits.get(path, item) / 8) for path, i in param_info(cfg).items()}


def _statistics(cfg: ModelConfig, stage: Stage, group: str) -> int:
    """Bytes: a Hessian of each site, and two more of the largest for its factor. All else is a few rows."""
    if "hessian" not in stage.plan.kinds:
        return 0
    info, squares = param_info(cfg), []
    for site in stage.plan.sites.get(group, ()):
        entry = info[f"{group}/{SITES[site][0]}"]
        squares.append(4 * math.prod(entry.shape[len(entry.shape) - entry.contracted :]) ** 2)
    return sum(squares) + 2 * max(squares, default=0)
