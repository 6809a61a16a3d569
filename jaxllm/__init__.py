"""Make a language model smaller and faster in JAX, compile it for TPU, GPU or CPU, and run it."""

from jaxllm.checkpoint import export_hf, load, save
from jaxllm.config import ModelConfig
from jaxllm.evaluate import Quality, calibration_text, compare, evaluation_text, perplexity, token_windows
from jaxllm.generate import Engine, Result, compile
from jaxllm.lm import LM, Entry, Transform, chain, init, logits
from jaxllm.sample import Sampling
from jaxllm.shard import make_mesh
from jaxllm.transforms.compact import compact
from jaxllm.transforms.prune import prune
from jaxllm.transforms.quantize import quantize, quantize_kv

__all__ = [
    "LM",
    "Engine",
    "Entry",
    "ModelConfig",
    "Quality",
    "Result",
    "Sampling",
    "Transform",
    "calibration_text",
    "chain",
    "compact",
    "compare",
    "compile",
    "evaluation_text",
    "export_hf",
    "init",
    "load",
    "logits",
    "make_mesh",
    "perplexity",
    "prune",
    "quantize",
    "quantize_kv",
    "save",
    "token_windows",
]
