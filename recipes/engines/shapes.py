"""The shapes that bench_gpu measures; with random weights, as values do not change how fast a GPU reads them."""

from jaxllm.config import ModelConfig

SHAPES = {
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffw_dim=1536,
        max_len=8192,
        rope_theta=1e5,
        tie_embeddings=True,
        dtype="bfloat16",
    ),
    "llama-3-8b": ModelConfig(
        vocab_size=128256,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffw_dim=14336,
        max_len=8192,
        rope_theta=5e5,
        dtype="bfloat16",
    ),
}
