"""jaxllm on a CPU beside other engines: the same weights, prompts and threads, in one run and in turns.

SmolLM2-135M-Instruct in float32, bfloat16, int8 and int4, beside llama.cpp, onnxruntime-genai, OpenVINO GenAI,
CTranslate2 and transformers (torch.compile; int8 by torchao). Each engine is a process of its own, stopped while others
are measured. Every peer gets its own converter's output, made from our export of the weights and kept in --folder; one
that is not installed is skipped, one that fails is reported with the reason.

decode: greedy, tokens a second of all rows together, after the first; "decode 128" has a prompt of 64 tokens and 64 new
ones. prefill: from the prompt to the first token. Start-up: from the process's start to the first token, weights
converted and caches filled; torch's is without compiling, which comes with the second token. Memory: the most that was
resident by the end of the first case. Of the bound: the time that reading weights and cache takes at the bandwidth
measured between the rounds, over a step's. Same tokens: how many agree with the first engine's before one differs.
Ratios are ours over the best peer of a class, above 1 where ours is better. Other work on the machine changes who wins:
"others_cores" says how many cores it took while engines had their turns, and should be near 0.

Expected (2 cores with AVX-512 VNNI that read 29 to 33 GB/s, 2026-11-27, two to nine rounds): at batch 1 ours in int8
185, int4 242, bfloat16 98 tokens/s, 1.5, 1.4 and 1.1 times the best peer of the class; at batch 8 1.6, at 32 1.4 to 1.7
times the best of all, at a context of 4096 3.4 times; at a prompt of 512 tokens 1.2 times. transformers decodes 29
tokens/s in bfloat16, 47 in int8.
Run: pip install -e '.[bench]' && python recipes/bench_cpu.py [--engines ours,llama.cpp-Q8_0] [--rounds 5] [--json]
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from engines import summary
from engines.rounds import Plan, Spec, measure
from engines.summary import Case
from rich.console import Console
from tokenizers import Tokenizer

import jaxllm
from jaxllm.hub import cache_dir

_LLAMA_CPP = ("llama-cpp-python", "gguf")
_ORT = ("onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers")
_TORCH = ("transformers", "torch", "torchao")

ENGINES = (
    Spec("ours-float32", "float32", "engines.ours", "float32", ("jaxllm",)),
    Spec("ours-bfloat16", "16-bit", "engines.ours", "bfloat16", ("jaxllm",)),
    Spec("ours-int8", "int8", "engines.ours", "int8", ("jaxllm",)),
    Spec("ours-int4", "int4", "engines.ours", "int4", ("jaxllm",)),
    Spec("llama.cpp-bf16", "16-bit", "engines.llamacpp", "BF16", _LLAMA_CPP),
    Spec("llama.cpp-Q8_0", "int8", "engines.llamacpp", "Q8_0", _LLAMA_CPP),
    Spec("llama.cpp-Q4_0", "int4", "engines.llamacpp", "Q4_0", _LLAMA_CPP),
    Spec("ort-int8", "int8", "engines.ort", "int8", _ORT),
    Spec("ort-int4", "int4", "engines.ort", "int4", _ORT),
    Spec("openvino-int8", "int8", "engines.openvino_", "int8", ("openvino-genai", "gguf")),
    Spec("ct2-int8", "int8", "engines.ct2", "int8", ("ctranslate2", "torch", "transformers")),
    Spec("torch-bf16", "16-bit", "engines.torch_", "bfloat16", _TORCH),
    Spec("torch-int8", "int8", "engines.torch_", "int8", _TORCH),
)


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="", help="names or their beginnings, such as ours,llama.cpp-Q8_0; all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="how often start-up is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=numbers, default="1,8,32", help="of decode, at the first context")
    parser.add_argument(
        "--contexts", type=numbers, default="128,4096", help="of decode at batch 1, new tokens included"
    )
    parser.add_argument("--prefill", type=numbers, default="64,512,2048", help="prompt lengths, at batch 1")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=float, default=300, help="seconds that an engine may take for a turn")
    parser.add_argument("--minutes", type=float, default=90, help="after which no other round begins")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "bench_cpu", help="of converted weights")
    parser.add_argument("--json", action="store_true", help="nothing on stdout but the JSON line")
    parser.add_argument("--plot", type=Path, default=Path("bench_cpu.png"))
    args = parser.parse_args()
    wanted = [part for part in args.engines.split(",") if part]
    args.specs = [spec for spec in ENGINES if not wanted or spec.name.startswith(tuple(wanted))]
    if unknown := [part for part in wanted if not any(spec.name.startswith(part) for spec in ENGINES)]:
        parser.error(f"no engine is named {unknown[0]!r}; there are {', '.join(spec.name for spec in ENGINES)}")
    if not args.batches or not args.contexts or min(args.contexts) <= args.new_tokens or args.new_tokens < 2:
        parser.error("--batches and --contexts need a number each; contexts are longer than --new-tokens, at least 2")
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The first is what start-up and memory are measured with."""
    batches = [Case("decode", batch, args.contexts[0]) for batch in args.batches]
    contexts = [Case("decode", 1, length) for length in args.contexts[1:]]
    return [*batches, *contexts, *(Case("prefill", 1, length) for length in args.prefill)]


def log(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped processes do not stay behind
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    if not source.exists():
        log("exporting the weights")
        jaxllm.export_hf(jaxllm.load("smollm2-135m", "float32", log=log), source)
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(jaxllm.calibration_text()).ids
    plan = Plan(
        cases_of(args),
        source,
        ids,
        folder,
        rounds=args.rounds,
        starts=args.starts,
        threads=args.threads,
        new_tokens=args.new_tokens,
        limit_s=args.limit,
        minutes=args.minutes,
    )
    found = measure(args.specs, plan, log)
    result: dict[str, Any] = {
        "machine": summary.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
        **found,
        "ratios": summary.ratios(found["engines"], plan.cases),
    }
    summary.plot(result, plan.cases, args.plot)
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 180).print(summary.table(result, plan.cases))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
