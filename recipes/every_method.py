"""SmolLM2-135M by every method of compression: what each costs in quality, and what it weighs.

Expected: README's table, which this prints; one-shot, nothing is trained. Rows that were measured before are read from
--out, so a run that was stopped goes on.
Run: python recipes/every_method.py [--calibration-windows 32] [--windows 16] [--out every_method.jsonl] [ROW …]
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import jaxllm


def rows(calibration):
    """{name: transform}."""
    on = {"calibration": calibration}
    gptq = jaxllm.quantize("int4-g32", "gptq", "mse", **on)
    narrow = jaxllm.compact(ffn=0.75, **on)
    return {
        "original": lambda lm: lm,
        "magnitude 50 %": jaxllm.prune(0.5),
        "Wanda 50 %": jaxllm.prune(0.5, "wanda", **on),
        "Wanda 50 %, by sensitivity": jaxllm.prune(0.5, "wanda", scope="sensitivity", **on),
        "SparseGPT 50 %": jaxllm.prune(0.5, "sparsegpt", **on),
        "magnitude 2:4": jaxllm.prune(pattern="2:4"),
        "Wanda 2:4": jaxllm.prune(pattern="2:4", method="wanda", **on),
        "SparseGPT 2:4": jaxllm.prune(pattern="2:4", method="sparsegpt", **on),
        "SparseGPT 4:8": jaxllm.prune(pattern="4:8", method="sparsegpt", **on),
        "FFN channels 75 %": narrow,
        "FFN channels 75 %, not corrected": jaxllm.compact(ffn=0.75, correct=False, **on),
        "int8": jaxllm.quantize("int8"),
        "fp8": jaxllm.quantize("fp8"),
        "W8A8": jaxllm.quantize("w8a8"),
        "W8A8 SmoothQuant": jaxllm.quantize("w8a8", "smoothquant", **on),
        "int4-g32": jaxllm.quantize("int4-g32"),
        "int4-g32 AWQ": jaxllm.quantize("int4-g32", "awq", "mse", **on),
        "int4-g32 GPTQ": gptq,
        "int4-g32 AWQ + GPTQ": jaxllm.quantize("int4-g32", "awq+gptq", "mse", **on),
        "int8 KV cache": jaxllm.quantize_kv(),
        "SparseGPT 50 % + int4-g32 GPTQ": jaxllm.chain(jaxllm.prune(0.5, "sparsegpt", **on), gptq),
        "FFN 75 % + int8 + int8 KV cache": jaxllm.chain(narrow, jaxllm.quantize("int8"), jaxllm.quantize_kv()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("every_method.jsonl"))
    parser.add_argument("row", nargs="*")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxllm").setLevel(logging.INFO)

    lm = jaxllm.load("smollm2-135m")
    methods = rows(jaxllm.token_windows(lm, jaxllm.calibration_text(), count=args.calibration_windows))
    if unknown := [row for row in args.row if row not in methods]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(methods)}")
    tokens = jaxllm.token_windows(lm, jaxllm.evaluation_text(), count=args.windows)
    protocol = {"calibration_windows": args.calibration_windows, "windows": args.windows}
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {row["name"]: row for row in done if protocol.items() <= row.items()}
    for name in ["original", *(args.row or methods)]:
        if name in done:
            continue
        began = time.perf_counter()
        made = methods[name](lm)
        jax.block_until_ready(made.params)
        seconds = time.perf_counter() - began
        quality = dataclasses.asdict(jaxllm.compare(made, lm, tokens))
        done[name] = {"name": name, **protocol, "seconds": seconds, "bytes": made.weight_bytes, **quality}
        with args.out.open("a") as out:
            print(json.dumps(done[name]), file=out)
        print(f"{name}: {seconds:.0f} s, perplexity {quality['perplexity']:.2f}", file=sys.stderr, flush=True)

    origin = lm.ledger[0].args["origin"]
    table = Table(
        caption=f"{origin}; calibrated on {args.calibration_windows}, measured on {args.windows} windows of 512"
    )
    for column in ("", "MB", "perplexity", "Δ log ppl", "KL", "top-1", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in done.items():
        loss = math.log(row["perplexity"] / done["original"]["perplexity"])
        cells = f"{row['perplexity']:.2f}", f"{loss:+.4f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"
        table.add_row(name, f"{row['bytes'] / 1e6:.0f}", *cells, f"{row['seconds']:.0f}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    main()
