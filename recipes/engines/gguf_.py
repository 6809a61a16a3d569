"""A Hugging Face directory of a Llama to a GGUF file, as llama.cpp's own converter writes it."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(source: Path, file: Path, kind: str) -> None:
    """kind: of matrices, "F32", "BF16" or "Q8_0"; vectors are float32 in any case."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"))
    _write_tokenizer(writer, source)
    quantisation = gguf.GGMLQuantizationType[kind]
    for shard in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(shard).items():
            stem = name.removesuffix(".weight")
            if layer := stem.startswith("model.layers."):
                _, _, layer, stem = stem.split(".", 3)
            renamed = f"{f'blk.{layer}.{_NAMES[stem]}' if layer else _ENDS[stem]}.weight"
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                # Rotation turns neighbours in these files, and the two halves of a head in Hugging Face's.
                halves = weight.reshape(-1, 2, config["head_dim"] // 2, weight.shape[-1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            kept = quantisation if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(renamed, gguf.quantize(weight.astype(np.float32), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """Byte-level BPE. Benchmarks feed token ids; engines only want that there is one."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"] | special
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    named = json.loads((source / "tokenizer_config.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary[named["bos_token"]])
    writer.add_eos_token_id(vocabulary[named["eos_token"]])
    writer.add_add_bos_token(False)
