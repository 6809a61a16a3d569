"""compressed-tensors: the quantised safetensors that vLLM, SGLang and transformers read.

Source of the format: github.com/vllm-project/compressed-tensors, `QuantizationConfig` and the compressors
pack-quantized, int-quantized and float-quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.arrays import QArray
from jaxllm.checkpoint import tensors
from jaxllm.checkpoint.names import listing, stored_name, stored_shape
from jaxllm.checkpoint.tensors import Header, Read, Stored, Tensor
from jaxllm.config import ModelConfig
from jaxllm.formats import Format, Inputs, Values
from jaxllm.lm import LM
from jaxllm.params import flatten

METHOD = "compressed-tensors"
SUPPORTED = (
    "pack-quantized int4 and int8 by channel or group with float activations, "
    "int-quantized int8 with activations in int8 (dynamic by token, or static by tensor) or float, "
    "and float-quantized float8 by channel with float activations"
)
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")
_FUSED = (("attn/q", "attn/k", "attn/v"), ("mlp/gate", "mlp/up"))  # one matmul in vLLM, hence one scheme


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is quantised, and whether its values are packed into int32."""

    fmt: Format
    packed: bool

    @property
    def layout(self) -> str:
        if self.packed:
            return "pack-quantized"
        return "float-quantized" if self.fmt.values == "float8_e4m3fn" else "int-quantized"

    def headers(self, shape: tuple[int, int], scale: str) -> dict[str, Header]:
        """{part: type and shape} of a weight [out, in] whose scales are of the type `scale`."""
        out, inputs = shape
        groups = 1 if self.fmt.group is None else inputs // self.fmt.group
        found: dict[str, Header] = {"weight_scale": (scale, (out, groups))}
        if self.packed:
            found["weight_packed"] = "I32", (out, _words(inputs, self.fmt.bits))
            found["weight_shape"] = "I64", (2,)
        else:
            found["weight"] = "F8_E4M3" if self.layout == "float-quantized" else "I8", shape
        if self.fmt.affine:
            zeros: Header = ("I32", (_words(out, self.fmt.bits), groups))
            found["weight_zero_point"] = zeros if self.packed else ("I8", (out, groups))
        if self.fmt.inputs == "static":
            found["input_scale"] = "F32", (1,)
        return found

    def config(self, targets: Collection[str]) -> dict[str, Any]:
        """A config group."""
        kind = "float" if self.fmt.values == "float8_e4m3fn" else "int"
        common = {"num_bits": self.fmt.bits, "type": kind}
        weights = common | {
            "symmetric": not self.fmt.affine,
            "strategy": "channel" if self.fmt.group is None else "group",
            "group_size": self.fmt.group,
            "dynamic": False,
        }
        inputs = None
        if self.fmt.inputs != "float":
            dynamic = self.fmt.inputs == "dynamic"
            inputs = common | {"symmetric": True, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.layout,
        }


def plan(lm: LM, log: Callable[[str], None] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What to write: {stored name: tensor} and the quantization_config. See `checkpoint.export_compressed`."""
    tell = log or (lambda line: None)
    info, flat = lm.info, flatten(lm.params)
    if wrong := [path for path in flat.keys() | info.keys() if path not in flat or path not in info]:
        raise ValueError(f"This model's weights are not those of its config: {listing(sorted(wrong))}.")
    if wrong := [path for path, leaf in flat.items() if leaf.shape != info[path].shape]:
        raise ValueError(f"These weights are not of the shape that the config makes them: {listing(wrong)}.")
    schemes = {
        path: _scheme(path, leaf)
        for path, leaf in flat.items()
        if isinstance(leaf, QArray) and path.startswith("layers_")
    }
    if not schemes:
        raise ValueError("No weight of a layer is quantised: export_hf writes this model. Or use quantize first.")
    _check_fused(lm.cfg.num_layers, {path: schemes.get(path) for path in flat})
    if ends := [path for path, leaf in flat.items() if isinstance(leaf, QArray) and path not in schemes]:
        tell(f"{' and '.join(ends)}: written dequantised, in {lm.cfg.dtype}; vLLM quantises linear layers only.")
    if lm.cfg.kv_dtype is not None:
        tell(f"The {lm.cfg.kv_dtype} KV cache is left out: the format has one scale a tensor or head, not one a token.")
    out: dict[str, Tensor] = {}
    for path, leaf in flat.items():
        name, shape = stored_name(path, "hf"), stored_shape(info[path])
        if path in schemes:
            assert isinstance(leaf, QArray)
            out |= _tensors(name.removesuffix(".weight"), schemes[path], leaf)
        else:
            out[name] = tensors.dense(leaf, shape, lm.cfg.dtype)
    linear = [path for path in info if path.startswith("layers_") and info[path].contracted]
    return out, _config({path: schemes.get(path) for path in linear})


def _scheme(path: str, w: QArray) -> Scheme:
    fmt = tensors.format_of(w)
    plain = fmt.group is None and not fmt.affine
    if fmt.values == "float8_e4m3fn" and (not plain or fmt.inputs != "float"):
        raise ValueError(f"{path}: float8 by group, with zero points or int8 activations has no form in {METHOD}.")
    if fmt.inputs != "float" and (not plain or fmt.values != "int8"):
        raise ValueError(f"{path}: int8 activations go with symmetric int8 weights by channel in {METHOD}.")
    return Scheme(fmt, packed=fmt.inputs == "float" and fmt.values != "float8_e4m3fn")


def _check_fused(num_layers: int, schemes: Mapping[str, Scheme | None]) -> None:
    for i in range(num_layers):
        for together in _FUSED:
            found = {name: schemes[f"layers_{i}/{name}/w"] for name in together}
            if len(set(found.values())) > 1:
                shown = ", ".join(f"{name} {s.fmt.name if s else 'float'}" for name, s in found.items())
                raise ValueError(
                    f"layers_{i}: vLLM runs {', '.join(together)} as one matmul of one format, and here they are "
                    f"{shown}. Quantise them alike."
                )


def _config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    def module(path: str) -> str:
        return stored_name(path, "hf").removesuffix(".weight")

    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    by_scheme = {scheme: [module(path) for path, own in schemes.items() if own == scheme] for scheme in used}
    layouts = {scheme.layout for scheme in used}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme.config(["Linear"] if len(used) == 1 else by_scheme[scheme])
            for i, scheme in enumerate(used)
        },
        "ignore": [*(module(path) for path, scheme in schemes.items() if scheme is None), "lm_head"],
        "kv_cache_scheme": None,
    }


def _tensors(module: str, scheme: Scheme, w: QArray) -> dict[str, Tensor]:
    rows = math.prod(w.shape[: w.scale.ndim - 1])
    shape, bits = (rows, w.size // rows), scheme.fmt.bits

    def host(part: Any, dtype: Any = None) -> np.ndarray:
        """[out, ...]. A jax.Array keeps the host copy it once made; that of a new one dies with it."""
        return np.asarray((part if dtype is None else part.astype(dtype)).reshape(rows, -1))

    make: dict[str, Callable[[], np.ndarray]] = {
        "weight": lambda: host(w.values),
        "weight_packed": lambda: tensors.pack(tensors.unsigned(host(w.values, jnp.int8), bits), bits),
        "weight_scale": lambda: host(w.scale),
        "weight_shape": lambda: np.array(shape, np.int64),
        "weight_zero_point": lambda: tensors.pack(tensors.unsigned(host(w.zero_point), bits).T, bits).T,
        "input_scale": lambda: np.asarray(w.x_scale).reshape(1),
    }
    headers = scheme.headers(shape, tensors.code(w.scale.dtype))
    return {f"{module}.{part}": tensors.Tensor(*header, make[part]) for part, header in headers.items()}


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 32)


def find(config: Mapping[str, Any], cfg: ModelConfig, headers: Mapping[str, Header], read: Read) -> dict[str, Stored]:
    """{module: its quantised weight}, from headers; only the few numbers of weight_shape are read.

    The tensors themselves say how a module is quantised. It has to be one of the config's groups, whose targets are
    not looked at: they may be regular expressions, and a stranger's could run for ever.
    Raises ValueError for what is not supported, and for tensors that belong to no group.
    """
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = config.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):  # "dense" is no sparsity
            raise ValueError(f"quantization_config has a {name}, which is not supported.")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("quantization_config lacks config_groups, an object of objects.")
    schemes: list[Scheme] = []
    for name, group in groups.items():
        try:
            schemes.append(_parse(group, group.get("format") or config.get("format")))
        except ValueError as error:
            raise ValueError(f"{error} in {name}. Supported: {SUPPORTED}.") from error
    quantised = {name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in _PARTS[1:]}
    return {module: _stored(module, schemes, headers, read) for module in sorted(quantised)}


def _parse(group: Mapping[str, Any], layout: Any) -> Scheme:
    """The scheme of a config group; what it leaves out has the library's default."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    allowed: dict[Any, tuple[Values, ...]] = {
        "pack-quantized": ("int4", "int8"),
        "int-quantized": ("int8",),
        "float-quantized": ("float8_e4m3fn",),
        "naive-quantized": ("int8", "float8_e4m3fn"),
    }
    if not isinstance(layout, str) or layout not in allowed:
        raise ValueError(f"The format is {layout!r}")
    if not isinstance(weights, dict):
        raise ValueError("No weights are quantised")
    if group.get("output_activations"):
        raise ValueError("Output activations are quantised")
    values: dict[Any, Values] = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
    kind = str(weights.get("type", "int")), weights.get("num_bits", 8)
    packed, affine = layout == "pack-quantized", weights.get("symmetric", True) is not True
    if not isinstance(kind[1], int) or values.get(kind) not in allowed[layout]:
        raise ValueError(f"{layout} weights are {kind[0]} of {kind[1]!r} bits")
    if weights.get("dynamic") or weights.get("actorder") in ("group", "dynamic"):
        raise ValueError("Weights have dynamic=true, or actorder='group', which permutes their inputs,")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if strategy not in ("channel", "group"):
        raise ValueError(f"Weights have the strategy {strategy!r}")
    if strategy == "group" and not (isinstance(group_size, int) and 0 < group_size < 2**31):
        raise ValueError(f"The group size is {group_size!r}")
    how: Inputs = "float" if inputs is None else _inputs(inputs)
    fmt = Format(values[kind], group_size if strategy == "group" else None, affine, how)
    if (fmt.values == "float8_e4m3fn" and (affine or fmt.group or how != "float")) or (
        how != "float" and (packed or fmt.group)
    ):
        raise ValueError(f"{layout} has {fmt.values} weights by {strategy} with {how} activations")
    return Scheme(fmt, packed)


def _inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, dict):
        kind = inputs.get("type", "int"), inputs.get("num_bits", 8), inputs.get("symmetric", True)
        inputs = kind, (inputs.get("strategy") or "tensor", inputs.get("dynamic", False))
        if inputs == (("int", 8, True), ("token", True)):
            return "dynamic"
        if inputs == (("int", 8, True), ("tensor", False)):
            return "static"
    raise ValueError(f"Activations are {inputs!r}")


def _stored(module: str, schemes: list[Scheme], headers: Mapping[str, Header], read: Read) -> Stored:
    found = {part: headers[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in headers}
    if "weight_packed" in found:
        if found.get("weight_shape", ("", ()))[0] not in ("I64", "I32") or found["weight_shape"][1] != (2,):
            raise ValueError(f"{module} has weight_packed, and no weight_shape of two integers.")
        found["weight_shape"] = "I64", (2,)
        shape = tuple(int(size) for size in read(f"{module}.weight_shape"))
    else:
        shape = found.get("weight", ("", ()))[1]
    if len(shape) != 2 or not all(0 < size < 2**31 for size in shape):
        raise ValueError(f"{module} has {_shown(found)} and no weight of two dimensions, or one of {shape}.")
    if found.get("input_scale", ("", ()))[1] == ():
        found = {part: ("F32", (1,)) if part == "input_scale" else header for part, header in found.items()}
    scale = found.get("weight_scale", ("", ()))[0]
    fits = [
        scheme
        for scheme in dict.fromkeys(schemes)
        if shape[1] % (scheme.fmt.group or 1) == 0 and scale in tensors.FLOATS and scheme.headers(shape, scale) == found
    ]
    if not fits:
        expected = "; or ".join(_shown(scheme.headers(shape, "F32")) for scheme in schemes[:4])
        raise ValueError(f"{module} is {shape} and has {_shown(found)}. By its config it would have {expected}.")
    kinds = {(scheme.fmt.values, scheme.fmt.inputs) for scheme in fits}
    if len(kinds) > 1:
        raise ValueError(f"{module} may belong to several config groups, which differ: {sorted(kinds)}.")
    scheme = fits[0]
    parts = tuple(f"{module}.{part}" for part in found)

    def unpack(read: Read) -> QArray:
        def part(name: str) -> np.ndarray:
            return read(f"{module}.{name}")

        bits, zero_point = scheme.fmt.bits, None
        if scheme.packed:
            numbers = tensors.unpack(part("weight_packed"), bits).reshape(shape[0], -1)[:, : shape[1]]
            values = tensors.signed(numbers, bits)
        else:
            values = part("weight")
        if scheme.fmt.affine:
            zero_point = part("weight_zero_point")
            if scheme.packed:
                numbers = tensors.unpack(zero_point.T, bits).reshape(zero_point.shape[1], -1)
                zero_point = np.ascontiguousarray(tensors.signed(numbers, bits).T[: shape[0]])
        x_scale = part("input_scale").reshape(()) if scheme.fmt.inputs == "static" else None
        arrays = values.astype(scheme.fmt.values), part("weight_scale"), zero_point, x_scale
        return QArray(*arrays, int8_inputs=scheme.fmt.inputs != "float")  # pyright: ignore[reportArgumentType]

    return Stored((shape[0], shape[1]), parts, unpack)


def _shown(headers: Mapping[str, Header]) -> str:
    return ", ".join(f"{part} {code}{list(shape)}" for part, (code, shape) in sorted(headers.items()))
