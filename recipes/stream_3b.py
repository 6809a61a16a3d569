"""A model of three billion parameters, made int8 in less memory than its file has bytes.

Writes a bfloat16 Hugging Face checkpoint of Llama-3.2-3B's shape with random weights (6.4 GB), streams it to int8, and
asserts that the process that does so stays below 3 GB. Needs 10 GB of disk; removes what it wrote.

Measured: 6.43 GB of bfloat16 became 2.90 GB of int8 in 123 s; peak 1.81 GB (2.57 GB estimated). November 2026,
jax 0.10.2, two CPU cores that other programs used as well.
Run: python recipes/stream_3b.py [DIRECTORY]
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, EMBED, FFW, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 28, 3072, 8192, 24, 8, 128, 128256
LIMIT_BYTES = 3_000_000_000


def write_checkpoint(path: Path) -> None:
    """A shard for each layer, one for the rest, so that no more than that is in memory."""
    rng, weight_map = np.random.default_rng(0), {}

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for key, shape in shapes.items():
            w = rng.standard_normal(shape, np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
            tensors[key] = (w * np.float32(shape[-1] ** -0.5 if len(shape) > 1 else 1)).astype(ml_dtypes.bfloat16)
            weight_map[key] = name
        save_file(tensors, path / name)

    matrices = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, EMBED),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, EMBED),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, EMBED),
        "self_attn.o_proj": (EMBED, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFW, EMBED),
        "mlp.up_proj": (FFW, EMBED),
        "mlp.down_proj": (EMBED, FFW),
        "input_layernorm": (EMBED,),
        "post_attention_layernorm": (EMBED,),
    }
    for i in range(LAYERS):
        shard(f"layer-{i}.safetensors", {f"model.layers.{i}.{name}.weight": s for name, s in matrices.items()})
    shard("ends.safetensors", {"model.embed_tokens.weight": (VOCAB, EMBED), "model.norm.weight": (EMBED,)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFW,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))


def stream(source: str, out: str) -> None:
    """In a process of its own, whose peak is that of this work alone."""
    import jaxllm
    from jaxllm.checkpoint import optimize_checkpoint

    start = time.monotonic()
    done = optimize_checkpoint(source, [jaxllm.quantize("int8")], out, log=lambda line: print(line, file=sys.stderr))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    print(json.dumps({"peak_bytes": peak, "estimated_bytes": done.peak_bytes, "s": time.monotonic() - start}))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as home:
        source, out = Path(home) / "bfloat16", Path(home) / "int8"
        source.mkdir()
        writer = [sys.executable, __file__, "write", str(source)]
        subprocess.run(writer, check=True)
        done = subprocess.run(
            [sys.executable, __file__, "stream", str(source), str(out)], check=True, stdout=-1, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        read, written, peak, estimated = (
            f"{n / 1e9:.2f} GB" for n in (size(source), size(out), found["peak_bytes"], found["estimated_bytes"])
        )
        print(f"{read} of bfloat16 became {written} of int8 in {found['s']:.0f} s; peak {peak} ({estimated} estimated)")
        assert found["peak_bytes"] < LIMIT_BYTES, found


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write_checkpoint(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["stream"]:
        stream(sys.argv[2], sys.argv[3])
    else:
        main()
