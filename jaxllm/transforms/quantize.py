"""Quantisation: fewer bits a weight."""

from __future__ import annotations

import functools

import jax

from jaxllm import arrays
from jaxllm.arrays import QArray
from jaxllm.lm import LM, Transform, record, require_order
from jaxllm.params import flatten, map_weights, select

_quantize = functools.partial(jax.jit, static_argnums=1)(arrays.quantize)


def quantize_int8(match: str = r".*") -> Transform:
    """Stores weights as int8 with one float32 scale for each output channel; activations stay as they are.

    match: regular expression for whole weight paths; the default takes every matrix, embedding and head included.
        Norms and biases are never quantised.

    Raises ValueError when `match` names no weight that is still float, and lists what is there.
    """

    def transform(lm: LM) -> LM:
        require_order(lm, "quantize_int8")
        flat = flatten(lm.params)
        paths = select(lm.info, match)
        todo = [path for path in paths if not isinstance(flat[path], QArray)]
        if not todo:
            raise ValueError(f"All {len(paths)} weights that {match!r} matches are quantised already.")
        params = map_weights(lambda path, w: _quantize(w, lm.info[path].contracted), lm.params, todo)
        return record(lm, "quantize_int8", {"match": match}, todo, params=params)

    return transform
