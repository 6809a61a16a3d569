"""The shape of a model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")
WIDTHS = ("num_heads", "num_kv_heads", "ffw_dim")  # the fields that may differ from layer to layer


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's frequency scaling: long wavelengths are stretched by `factor`, short ones kept.

    Source: Llama Team 2024, "The Llama 3 Herd of Models"; the ramp is that of Meta's reference code.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of the Llama family, and the type it computes in.

    dtype is that of activations and of unquantised weights, kv_dtype that of the KV cache: None for dtype, or "int8".
    `max_len` is the longest context, in tokens, that the model was trained for; `sliding_window` the number of
    positions that attention looks back on, None for all. Widths are one number, or a tuple of one for each layer.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    num_kv_heads: int | tuple[int, ...]
    head_dim: int
    ffw_dim: int | tuple[int, ...]
    max_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | LinearRope | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None

    def __post_init__(self):
        for name in ("vocab_size", "embed_dim", "num_layers", "head_dim", "max_len", *WIDTHS):
            value = getattr(self, name)
            values = value if name in WIDTHS and isinstance(value, tuple) else (value,)
            if any(not isinstance(v, int) or isinstance(v, bool) or not 0 < v < 2**31 for v in values):
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")
        for name in WIDTHS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != self.num_layers:
                    raise ValueError(f"{name} has {len(value)} widths; the model has {self.num_layers} layers.")
                if len(set(value)) == 1:  # one way to write a model
                    object.__setattr__(self, name, value[0])
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; expected a positive number.")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if isinstance(heads, int) and isinstance(kv_heads, int):
            pairs = [(heads, kv_heads)]  # num_layers may be a stranger's word: no tuple of that length
        else:
            pairs = zip(self.widths("num_heads"), self.widths("num_kv_heads"), strict=True)
        for heads, kv_heads in pairs:
            if heads % kv_heads:
                raise ValueError(
                    f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}; "
                    "grouped-query attention gives every KV head the same number of query heads."
                )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; expected a positive number of tokens or None.")
        if self.kv_dtype not in (None, "int8"):
            raise ValueError(f'kv_dtype is {self.kv_dtype!r}; expected None, for dtype, or "int8".')

    def widths(self, name: str) -> tuple[int, ...]:
        """Of each layer; name: "num_heads", "num_kv_heads" or "ffw_dim"."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.num_layers

    def layer(self, i: int) -> ModelConfig:
        """The model of layer i alone. Layers of one shape give equal configs, and so share a compiled program."""
        return _layer(self, i)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"Unknown config fields {sorted(unknown)}; a newer jaxllm may have written them.")
        values = dict(values)
        if scaling := values.get("rope_scaling"):
            values["rope_scaling"] = (Llama3Rope if "original_max_len" in scaling else LinearRope)(**scaling)
        for name in WIDTHS:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)


@functools.lru_cache(maxsize=4096)
def _layer(cfg: ModelConfig, i: int) -> ModelConfig:
    widths = {name: value[i] if isinstance(value := getattr(cfg, name), tuple) else value for name in WIDTHS}
    return dataclasses.replace(cfg, num_layers=1, **widths)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`.

    Raises ValueError for an architecture or a feature that the decoder does not have, naming what it has.
    """
    architecture = (hf.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"Architecture {architecture!r} is not supported. Supported: {', '.join(ARCHITECTURES)}.")

    def need(name: str) -> Any:
        if hf.get(name) is None:
            raise ValueError(f"config.json of {architecture} lacks {name!r}; is the file complete?")
        return hf[name]

    def refuse(feature: str, value: Any) -> None:
        raise ValueError(f"config.json asks for {feature} = {value!r}, which jaxllm does not have for {architecture}.")

    if hf.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", hf["hidden_act"])
    if hf.get("mlp_bias"):
        refuse("mlp_bias", True)
    if hf.get("quantization_config"):
        refuse("quantization_config", hf["quantization_config"].get("quant_method"))
    qwen = architecture.startswith("Qwen")
    if qwen and hf.get("use_sliding_window"):
        refuse("use_sliding_window", True)
    if architecture != "Qwen2ForCausalLM" and hf.get("attention_bias"):
        refuse("attention_bias", True)  # it would put a bias on the output projection as well
    num_heads = need("num_attention_heads")
    # transformers 5 moved rope_theta into rope_parameters, which also took the place of rope_scaling.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return ModelConfig(
        vocab_size=need("vocab_size"),
        embed_dim=need("hidden_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or need("hidden_size") // num_heads,
        ffw_dim=need("intermediate_size"),
        max_len=need("max_position_embeddings"),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=None if qwen else hf.get("sliding_window"),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
    )


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | LinearRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Rope(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_len=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported. Supported: default, linear, llama3.")


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` that makes transformers build this model.

    Raises ValueError when no single Hugging Face architecture has the model's combination of features, or layers
    differ in width.
    """
    if uneven := [name for name in WIDTHS if isinstance(getattr(cfg, name), tuple)]:
        raise ValueError(f"The layers differ in {', '.join(uneven)}; a Hugging Face config has one width for all.")
    features = (cfg.qkv_bias, cfg.qk_norm, cfg.sliding_window is not None)
    by_features = {
        (False, False, False): "Llama",
        (False, False, True): "Mistral",
        (True, False, False): "Qwen2",
        (False, True, False): "Qwen3",
    }
    if features not in by_features:
        raise ValueError(
            f"No Hugging Face architecture has qkv_bias={cfg.qkv_bias}, qk_norm={cfg.qk_norm} and "
            f"sliding_window={cfg.sliding_window} together."
        )
    name = by_features[features]
    scaling: dict[str, Any] | None = None
    if isinstance(cfg.rope_scaling, LinearRope):
        scaling = {"rope_type": "linear", "factor": cfg.rope_scaling.factor}
    elif isinstance(cfg.rope_scaling, Llama3Rope):
        scaling = {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rope_scaling.original_max_len,
        }
    hf = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.ffw_dim,
        "max_position_embeddings": cfg.max_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": cfg.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": cfg.dtype,
    }
    if cfg.sliding_window is not None:
        hf["sliding_window"] = cfg.sliding_window
    return hf
