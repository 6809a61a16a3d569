"""Make a language model smaller and faster in JAX, compile it for TPU, GPU or CPU, and run it."""

from jaxllm.bisect import bisect
from jaxllm.bundle import load_bundle
from jaxllm.checkpoint import export_compressed, export_hf, load, optimize_checkpoint, save
from jaxllm.config import ModelConfig
from jaxllm.evaluate import (
    Quality,
    calibration_text,
    compare,
    evaluation_text,
    perplexity,
    sliding_windows,
    token_windows,
)
from jaxllm.generate import Engine, Result, compile
from jaxllm.lm import LM, Entry, Transform, chain, init, logits
from jaxllm.replay import load_recipe, transforms_of
from jaxllm.sample import Sampling
from jaxllm.search import search
from jaxllm.shard import make_mesh
from jaxllm.textfiles import read_text
from jaxllm.transforms.compact import compact
from jaxllm.transforms.prune import cubic_schedule, prune
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
    "bisect",
    "calibration_text",
    "chain",
    "compact",
    "compare",
    "compile",
    "cubic_schedule",
    "evaluation_text",
    "export_compressed",
    "export_hf",
    "init",
    "load",
    "load_bundle",
    "load_recipe",
    "logits",
    "make_mesh",
    "optimize_checkpoint",
    "perplexity",
    "prune",
    "quantize",
    "quantize_kv",
    "read_text",
    "save",
    "search",
    "sliding_windows",
    "token_windows",
    "transforms_of",
]
