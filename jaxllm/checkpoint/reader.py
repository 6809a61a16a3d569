"""What every format gives: the headers of a checkpoint first, then its weights a group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.arrays import Weight
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, Entry, param_info
from jaxllm.params import unflatten
from jaxllm.text import Tokenizer
from jaxllm.transforms.layerwise import groups

Lazy = Mapping[str, Callable[[], Weight]]  # of one group, by path within it; each is called once


@dataclasses.dataclass(frozen=True)
class Reader:
    """A checkpoint whose headers were read and checked, and of whose weights none was.

    read(group): the leaves of one of `layerwise.groups(cfg)`, each read when it is called for. Raises ValueError when a
        weight is not as the headers say.
    files: what they are read from.
    bits: a weight, scales included, by path, of those that are not of cfg.dtype.
    shapes: the weights as jax.ShapeDtypeStruct, by path; None where only reading them tells.
    """

    cfg: ModelConfig
    ledger: tuple[Entry, ...]
    tokenizer: Tokenizer | None
    files: tuple[Path, ...]
    read: Callable[[str], Lazy]
    bits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, Any] | None = None

    def lm(self) -> LM:
        """The model. Memory: its weights and a tensor more, or a group of jaxllm's own format."""
        flat = {}
        for group in groups(self.cfg):
            flat |= {f"{group}/{name}": load() for name, load in self.read(group).items()}
        return LM(self.cfg, unflatten(flat), self.ledger, self.tokenizer)


def in_group(group: str, paths: Iterable[str]) -> dict[str, str]:
    """{path within the group: path} of those paths that are in it."""
    return {path.removeprefix(f"{group}/"): path for path in paths if path.startswith(f"{group}/")}


def float_shapes(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a model that nothing has quantised, by path."""
    return {path: jax.ShapeDtypeStruct(info.shape, jnp.dtype(cfg.dtype)) for path, info in param_info(cfg).items()}
