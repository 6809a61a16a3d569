"""SmolLM2-135M by every method of compression: what each costs in quality, and what it weighs.

Expected: see the table in README.md, which this prints; about 25 minutes on 2 CPU cores, all one-shot, nothing trained.
Calibrated on the text that ships for it (32 windows of 512 tokens), measured on another (16 windows).
Run: python recipes/every_method.py [--json] [ROW …]
"""

import dataclasses
import json
import logging
import math
import sys
import time

import jax
from rich.console import Console
from rich.table import Table

import jaxllm

ROWS = {
    "magnitude 50 %": jaxllm.prune(0.5),
    "Wanda 50 %": jaxllm.prune(0.5, "wanda"),
    "SparseGPT 50 %": jaxllm.prune(0.5, "sparsegpt"),
    "magnitude 2:4": jaxllm.prune(pattern="2:4"),
    "Wanda 2:4": jaxllm.prune(pattern="2:4", method="wanda"),
    "SparseGPT 2:4": jaxllm.prune(pattern="2:4", method="sparsegpt"),
    "SparseGPT 4:8": jaxllm.prune(pattern="4:8", method="sparsegpt"),
    "FFN channels 75 %": jaxllm.compact(ffn=0.75),
    "FFN channels 75 %, not corrected": jaxllm.compact(ffn=0.75, correct=False),
    "int8": jaxllm.quantize("int8"),
    "fp8": jaxllm.quantize("fp8"),
    "W8A8": jaxllm.quantize("w8a8"),
    "W8A8 SmoothQuant": jaxllm.quantize("w8a8", "smoothquant"),
    "int4-g32": jaxllm.quantize("int4-g32"),
    "int4-g32 AWQ": jaxllm.quantize("int4-g32", "awq", "mse"),
    "int4-g32 GPTQ": jaxllm.quantize("int4-g32", "gptq", "mse"),
    "int4-g32 AWQ + GPTQ": jaxllm.quantize("int4-g32", "awq+gptq", "mse"),
    "int8 KV cache": jaxllm.quantize_kv(),
    "SparseGPT 50 % + int4-g32 GPTQ": jaxllm.chain(
        jaxllm.prune(0.5, "sparsegpt"), jaxllm.quantize("int4-g32", "gptq", "mse")
    ),
    "FFN 75 % + int8 + int8 KV cache": jaxllm.chain(
        jaxllm.compact(ffn=0.75), jaxllm.quantize("int8"), jaxllm.quantize_kv()
    ),
}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxllm").setLevel(logging.INFO)
    asked = [row for row in sys.argv[1:] if not row.startswith("--")] or [*ROWS]
    if unknown := [row for row in asked if row not in ROWS]:
        sys.exit(f"No row {unknown[0]!r}; there are {', '.join(ROWS)}.")
    original = jaxllm.load("smollm2-135m")
    tokens = jaxllm.token_windows(original, jaxllm.evaluation_text(), length=512, count=16)
    start = jaxllm.compare(original, original, tokens)
    results = [{"name": "original", "seconds": 0.0, "bytes": original.weight_bytes, **dataclasses.asdict(start)}]
    for name in asked:
        began = time.perf_counter()
        lm = ROWS[name](original)
        jax.block_until_ready(lm.params)
        seconds = time.perf_counter() - began
        quality = jaxllm.compare(lm, original, tokens)
        results.append({"name": name, "seconds": seconds, "bytes": lm.weight_bytes, **dataclasses.asdict(quality)})
        print(f"{name}: {seconds:.0f} s, perplexity {quality.perplexity:.2f}", file=sys.stderr, flush=True)

    caption = (
        f"{original.ledger[0].args['origin']}; {tokens.size} tokens of evaluation text in windows of 512, one-shot"
    )
    table = Table(caption=caption)
    for column in ("", "MB", "perplexity", "Δ log ppl", "KL", "top-1", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for row in results:
        loss = math.log(row["perplexity"] / start.perplexity)
        cells = f"{row['perplexity']:.2f}", f"{loss:+.4f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"
        table.add_row(row["name"], f"{row['bytes'] / 1e6:.0f}", *cells, f"{row['seconds']:.0f}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if "--json" in sys.argv:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
