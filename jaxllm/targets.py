"""Machines that programs are compiled for, whether or not they are at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, as the vendor states it.

    axes: of the grids that chips are connected in.
    hbm_bytes: that a program may use; the compiler refuses more. memory_bytes_per_s: of HBM.
    flops, int8_flops: of matmuls a second; equal where int8 is no faster.
    clock_hz: of the cycles that the compiler estimates.
    link_bytes_per_s: of a link to a neighbouring chip, in one direction.
    """

    axes: int
    hbm_bytes: float
    memory_bytes_per_s: float
    flops: float
    int8_flops: float
    clock_hz: float
    link_bytes_per_s: float


# From Google's pages of each generation and jax's table for Pallas kernels; the clocks are inferred, from peak FLOPs
# and the size of the matmul units.
CHIPS = {
    "v4": Chip(3, 15.75 * _GiB, 0.614e12, 137e12, 137e12, 1.05e9, 45e9),
    "v5e": Chip(2, 15.75 * _GiB, 0.82e12, 197e12, 394e12, 1.5e9, 45e9),
    "v5p": Chip(3, 94.75 * _GiB, 2.46e12, 459e12, 918e12, 1.75e9, 90e9),
    "v6e": Chip(2, 31.25 * _GiB, 1.64e12, 920e12, 1840e12, 1.75e9, 90e9),
    "tpu7x": Chip(3, 94.75 * _GiB, 3.7e12, 1155e12, 1155e12, 1.75e9, 90e9),
}
_GRIDS = {
    2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
    3: [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)],
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice: chips of one kind in a grid. count: of such slices, joined by the network of their hosts."""

    kind: str
    grid: tuple[int, ...]
    count: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.grid)

    def part(self, parts: int) -> Target:
        """What each of so many equal parts has: a slice, or one cut across its longest axes.

        Raises ValueError where there are no such parts.
        """
        cuts, rest = divmod(parts, self.count)
        grid = list(self.grid)
        while not rest and cuts > 1:
            prime = next(n for n in range(2, cuts + 1) if cuts % n == 0)
            axis = max(range(len(grid)), key=lambda axis: (grid[axis] % prime == 0, grid[axis], axis))
            grid[axis], rest = divmod(grid[axis], prime)
            cuts //= prime
        if rest or not cuts:
            raise ValueError(f"{self} has no {parts} equal parts that are grids. Each of its slices may have some.")
        return Target(self.kind, tuple(sorted(grid)) if len(grid) == 2 else tuple(grid))

    @property
    def host(self) -> tuple[int, ...]:
        """The chips of one host. Eight share one only where they are the whole slice."""
        if self.chip.axes == 2 and self.grid[0] <= 2 and self.grid[1] <= 4:
            return self.grid
        return tuple(math.gcd(size, part) for size, part in zip(self.grid, (2, 2, 1), strict=False))

    def __str__(self) -> str:
        return f"{f'{self.count}x' if self.count > 1 else ''}{self.kind}:{'x'.join(map(str, self.grid))}"

    def devices(self) -> list[Any]:
        """jax devices to make a mesh of and compile for; nothing can run on them.

        Raises RuntimeError where the TPU compiler is not installed, ValueError for a slice that it does not know.
        """
        return _devices(self)


def parse(name: str) -> Target:
    """ "v5e:2x4" is a slice, "2xv5e:2x4" are two, "v5e" is a single chip.

    Raises ValueError for anything else, saying what there is.
    """
    found = re.fullmatch(rf"(?:([1-9]\d?)x)?({'|'.join(CHIPS)})(?::(\d{{1,2}}(?:x\d{{1,2}}){{1,2}}))?", name)
    axes = CHIPS[found[2]].axes if found else 0
    grid = tuple(int(n) for n in found[3].split("x")) if found and found[3] else (1,) * axes
    if not found or len(grid) != axes or 0 in grid:
        raise ValueError(
            f"{name!r} is no target. Expected a chip, one of {', '.join(CHIPS)}, and its slice: v5e:2x4, v5p:2x2x1; "
            "or several: 2xv5e:4x4."
        )
    return Target(found[2], grid, int(found[1] or 1))


def slices(kind: str, most: int) -> list[Target]:
    """The usual slices of a chip that have at most so many, smallest first."""
    return [Target(kind, grid) for grid in _GRIDS[CHIPS[kind].axes] if math.prod(grid) <= most]


# Of a compiler that is to find no TPU: it asks nobody for one, writes no logs, and shares the library.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Without jax's compilation cache, which can write programs for machines that are not here, but not read them."""
    name, enabled = "jax_enable_compilation_cache", jax.config.values["jax_enable_compilation_cache"]
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # what jax remembers of the setting
    try:
        yield
    finally:
        jax.config.update(name, enabled)
        compilation_cache.reset_cache()


@functools.lru_cache(maxsize=64)
def _devices(target: Target) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("Compiling for a TPU needs its compiler: pip install 'jaxllm[tpu]'.")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    try:
        bounds = (*target.host, 1)[:3]
        found = topologies.get_topology_desc(str(target), "tpu", chips_per_host_bounds=bounds).devices
    except Exception as error:  # of a type that differs between releases
        raise ValueError(f"The TPU compiler does not know the slice {target}: {error}") from error
    return list(found)
