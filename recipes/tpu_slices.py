"""Named models on named TPU slices: what the compiler predicts of each, or a bundle that the slice starts at once.

Predictions, nothing was run on a TPU: int8 weights, batch 8, context 2048, libtpu 0.0.42. GB of a chip, of those it
has; ms of a decode step, from the roofline to the compiler's estimate; TTFT of 8 prompts of 512 tokens; tokens a second
of all sequences together; the batch that would fit at this context.

    recipe                 GB a chip      ms a step     TTFT ms     tokens/s   max batch
    llama-3.1-8b-v5e-4     3.0 of 16.9    3.00-4.62     78-211     1731-2663   171
    llama-3.1-8b-v6e-1    11.1 of 33.6    6.00-8.42     92-207      950-1332    73
    llama-3.1-70b-v5e-16   5.9 of 16.9    6.42-8.70    188-658      920-1247   134
    llama-3.1-70b-v6e-8   10.5 of 33.6    5.82-8.49     86-351      943-1375   216
    qwen3-0.6b-v5e-1       3.0 of 16.9    3.10-7.10     67-157     1127-2577    59
    qwen3-1.7b-v5e-1       4.2 of 16.9    4.50-7.97     70-204     1004-1779    54
    qwen3-4b-v5e-1         7.4 of 16.9    8.02-12.62   176-493      634-997     33
    qwen3-8b-v5e-4         3.2 of 16.9    3.11-5.16     79-232     1551-2575   154
    qwen3-14b-v6e-1       18.7 of 33.6   10.31-15.90   151-366      503-776     42
    qwen3-32b-v6e-4       10.2 of 33.6    5.64-8.63     90-274      928-1419   143

Run: python recipes/tpu_slices.py                               the table, anew
     python recipes/tpu_slices.py llama-3.1-8b-v5e-4            all programs of one, whole, held to their contract
     python recipes/tpu_slices.py llama-3.1-8b-v5e-4 --out DIR  and written as a bundle, from its checkpoint
"""

import argparse
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxllm import cli, plan, targets
from jaxllm.checkpoint.hf import read_config

CONFIGS = Path(__file__).parent / "configs"
LLAMA, QWEN = "meta-llama/Llama-3.1-{}-Instruct", "Qwen/Qwen3-{}"
# name: (config, Hugging Face id, slice, batch)
SLICES = {
    "llama-3.1-8b-v5e-4": ("llama-3.1-8b", LLAMA.format("8B"), "v5e:2x2", 8),
    "llama-3.1-8b-v6e-1": ("llama-3.1-8b", LLAMA.format("8B"), "v6e:1x1", 8),
    "llama-3.1-70b-v5e-16": ("llama-3.1-70b", LLAMA.format("70B"), "v5e:4x4", 8),
    "llama-3.1-70b-v6e-8": ("llama-3.1-70b", LLAMA.format("70B"), "v6e:2x4", 8),
    "qwen3-0.6b-v5e-1": ("qwen3-0.6b", QWEN.format("0.6B"), "v5e:1x1", 8),
    "qwen3-1.7b-v5e-1": ("qwen3-1.7b", QWEN.format("1.7B"), "v5e:1x1", 8),
    "qwen3-4b-v5e-1": ("qwen3-4b", QWEN.format("4B"), "v5e:1x1", 8),
    "qwen3-8b-v5e-4": ("qwen3-8b", QWEN.format("8B"), "v5e:2x2", 8),
    "qwen3-14b-v6e-1": ("qwen3-14b", QWEN.format("14B"), "v6e:1x1", 8),
    "qwen3-32b-v6e-4": ("qwen3-32b", QWEN.format("32B"), "v6e:2x2", 8),
}
CONTEXT = 2048


def predictions() -> Table:
    table = Table(caption="Predictions by the TPU compiler; nothing was run.")
    for column in ("recipe", "mesh", "GB a chip", "ms a step", "limit", "TTFT ms", "tokens/s", "max batch"):
        table.add_column(column, justify="left" if column in ("recipe", "mesh", "limit") else "right")
    for name, (config, _, target, batch) in SLICES.items():
        print(f"compiling {name}", file=sys.stderr, flush=True)
        cfg = read_config(CONFIGS / f"{config}.json", "bfloat16")[0]
        c = next(plan.sweep(cfg, [targets.parse(target)], ["int8"], [batch], [CONTEXT]))
        size = f"{(c.argument_bytes + c.temp_bytes + c.program_bytes) / 1e9:.1f} of {c.hbm_bytes / 1e9:.1f}"
        steps, first = f"{c.step_ms_low:.2f}-{c.step_ms_high:.2f}", f"{c.ttft_ms_low:.0f}-{c.ttft_ms_high:.0f}"
        rates = f"{c.tokens_per_s_low:.0f}-{c.tokens_per_s_high:.0f}"
        mesh = " x ".join(str(size) for size in c.mesh.values())
        table.add_row(name, mesh, size, steps, c.bottleneck, first, rates, str(c.largest_batch))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SLICES)
    parser.add_argument("--model", help="a checkpoint; by default the one on Hugging Face, where --out is given")
    parser.add_argument("--out", help="directory of the bundle")
    args = parser.parse_args()
    if args.name is None:
        jax.config.update("jax_platforms", "cpu")
        Console(width=None if sys.stdout.isatty() else 140).print(predictions())
        return 0
    config, model, target, batch = SLICES[args.name]
    source = args.model or (model if args.out else str(CONFIGS / f"{config}.json"))
    argv = ["compile", source, "--target", target, "--quantize", "int8", "--dtype", "bfloat16", "--check"]
    argv += ["--batch", str(batch), "--context", str(CONTEXT)]
    return cli.main(argv + (["--out", args.out] if args.out else []))


if __name__ == "__main__":
    sys.exit(main())
