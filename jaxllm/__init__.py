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
from jaxllm.losses import Objective
from jaxllm.replay import load_recipe, transforms_of
from jaxllm.sample import Sampling
from jaxllm.search import search
from jaxllm.shard import make_mesh
from jaxllm.teachers import cache_teacher, open_teacher
from jaxllm.textfiles import read_text
from jaxllm.training import Training
from jaxllm.transforms.compact import compact
from jaxllm.transforms.distill import distill, smaller
from jaxllm.transforms.prune import cubic_schedule, prune
from jaxllm.transforms.quantize import quantize, quantize_kv

__all__ = [
    "LM",
    "Engine",
    "Entry",
    "ModelConfig",
    "Objective",
    "Quality",
    "Result",
    "Sampling",
    "Training",
    "Transform",
    "bisect",
    "cache_teacher",
    "calibration_text",
    "chain",
    "compact",
    "compare",
    "compile",
    "cubic_schedule",
    "distill",
    "evaluation_text",
    "export_compressed",
    "export_hf",
    "init",
    "load",
    "load_bundle",
    "load_recipe",
    "logits",
    "make_mesh",
    "open_teacher",
    "optimize_checkpoint",
    "perplexity",
    "prune",
    "quantize",
    "quantize_kv",
    "read_text",
    "save",
    "search",
    "sliding_windows",
    "smaller",
    "token_windows",
    "transforms_of",
]
