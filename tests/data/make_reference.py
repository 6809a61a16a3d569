"""Writes what transformers says of small random models and of SmolLM2-135M, for test_parity.py to compare with.

The tests then need neither torch nor transformers. Run from the repository, with the `peer` extra installed:
python tests/data/make_reference.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

import jaxllm

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama3": transformers.LlamaConfig(**SHAPE, rope_parameters=SCALING),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=9),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
}
NEW_TOKENS = 48


def reference(model, tokens):
    """Logits [T, V] and the greedy continuation."""
    tokens = torch.tensor(np.asarray(tokens)[None], dtype=torch.long)
    with torch.no_grad():
        logits = model(tokens).logits[0].float().numpy()
        for _ in range(NEW_TOKENS):  # plain and without a cache: nothing to get wrong
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return logits, tokens[0, -NEW_TOKENS:].numpy().astype(np.int32)


def main():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name, config in FAMILIES.items():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases are initialised to constants
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        tokens = rng.integers(0, config.vocab_size, 40).astype(np.int32)
        logits, greedy = reference(model, tokens)
        save_file({"tokens": tokens, "logits": logits, "greedy": greedy}, HERE / name / "reference.safetensors")

    lm = jaxllm.load("smollm2-135m")
    tokens = np.asarray(lm.tokenizer.encode("The three largest cities of Portugal are"), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        jaxllm.export_hf(lm, Path(folder) / "hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32).eval()
        logits, greedy = reference(model, tokens)
    ids = np.arange(0, lm.cfg.vocab_size, 61, dtype=np.int32)  # all of them would be 1.6 MB
    arrays = {"tokens": tokens, "ids": ids, "logits": np.ascontiguousarray(logits[:, ids]), "greedy": greedy}
    save_file(arrays, HERE / "smollm2-135m.safetensors")


if __name__ == "__main__":
    main()
