"""Names and logical axes of a model's weights, and rules that choose among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from flax.core import meta

Params = Mapping[str, Any]  # nested dicts of arrays.Weight; a leaf's path is its keys joined by "/"


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What the axes of a weight mean.

    axes: a logical axis for each dimension: "vocab", "embed", "heads", "kv_heads", "head_dim" or "ffw".
    contracted: how many of the last axes are summed over when the weight is applied; 0 for norms and biases.
    shape: of the weight.
    """

    axes: tuple[str, ...]
    contracted: int
    shape: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boxed(meta.AxisMetadata):
    """How a Linen module declares a parameter: the value with its ParamInfo."""

    value: Any
    info: ParamInfo = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Boxed:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Boxed:
        raise NotImplementedError("Layers are an unrolled loop; no transform adds an axis to a weight.")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Boxed:
        raise NotImplementedError("Layers are an unrolled loop; no transform takes an axis from a weight.")


def boxed(axes: tuple[str, ...], contracted: int = 0) -> Callable[..., Any]:
    """For `self.param`: declares the weight with its axes; Linen takes it out of its box. `jaxllm.init` fills it."""

    def init_boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Boxed:
        return Boxed(jax.numpy.zeros(shape, dtype), ParamInfo(axes, contracted, shape))

    return init_boxed


def flatten(params: Params) -> dict[str, Any]:
    """{"layers_0/mlp/gate/w": leaf, …}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def select(info: Mapping[str, ParamInfo], match: str) -> list[str]:
    """Paths of the matmul weights whose whole path matches the regular expression `match`.

    Raises ValueError when there is none, listing what is there: a pattern that does nothing is a mistake.
    """
    known = [path for path, entry in info.items() if entry.contracted]
    try:
        found = [path for path in known if re.fullmatch(match, path)]
    except re.error as error:
        raise ValueError(f"{match!r} is not a regular expression: {error}.") from error
    if not found:
        shown = sorted({re.sub(r"\d+", "N", path) for path in known})
        raise ValueError(f"No weight path matches {match!r}. Weights here: {', '.join(shown)}.")
    return found


def assign(rules: Mapping[str, Any], info: Mapping[str, ParamInfo]) -> dict[str, Any]:
    """{path: value} of the matmul weights, in the model's order, by rules of which the first that matches holds.

    rules: {regular expression for whole weight paths: value, None to leave the weight alone and out of the result}.
    Raises ValueError for an expression that matches no weight, or only weights that earlier rules took.
    """
    out: dict[str, Any] = {}
    for pattern, value in rules.items():
        new = [path for path in select(info, pattern) if path not in out]
        if not new:
            raise ValueError(f"The rule {pattern!r} is never used: earlier rules match all of its weights.")
        out |= dict.fromkeys(new, value)
    if all(value is None for value in out.values()):
        raise ValueError(f"The rules {[*rules]} leave every weight alone.")
    return {path: out[path] for path in info if out.get(path) is not None}
