"""jaxllm on a GPU beside transformers with torch.compile: the same shapes, in turns on one card.

SmolLM2-135M's and Llama 3 8B's shapes with random weights, in bfloat16 and int8, at several batches; transformers has a
static cache and CUDA graphs (torch.compile's "reduce-overhead"). Each engine is a process of its own; they compile side
by side and are measured one after the other, round by round. Decoding is greedy, of prompts of 128 tokens.

ms: of a step. Of the card: what a step has to read, weights and the whole cache, over its time, as a share of the rate
at which the card reads memory, measured in the same run. An engine that is not installed, fails or is not ready in time
is left out, with the reason.

Expected (one NVIDIA H200, jax 0.11.2, torch 2.11, transformers 5.17, 2026-11-27), tokens/s in bfloat16, in int8 and of
transformers: Llama 3 8B's shapes 248, 402 and 189 at batch 1, 1742, 2765 and 1358 at 8, 5958, 8309 and 3985 at 32, and
17944, 15235 and 8032 at 128; SmolLM2-135M's 1842, 1714 and 746 at batch 1, and 98932, 90691 and 42456 at 128.
Run: pip install -e '.[cuda]' torch transformers && python recipes/bench_gpu.py [--models llama-3-8b] [--batches 1,32]
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines.driver import Worker, WorkerError
from engines.shapes import SHAPES
from rich.console import Console
from rich.table import Table

ENGINES = {
    "ours bfloat16": ("engines.ours_gpu", "bfloat16"),
    "ours int8": ("engines.ours_gpu", "int8"),
    "transformers bfloat16": ("engines.torch_gpu", "bfloat16"),
}
PROMPT = 128


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--engines", default=",".join(ENGINES), help="of them, those whose names begin so")
    parser.add_argument("--batches", type=numbers, default="1,8,32,128")
    parser.add_argument("--new-tokens", type=int, default=129, help="of which the first is not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600, help="seconds that an engine may take to get ready")
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing new begins")
    parser.add_argument("--json", action="store_true", help="nothing on stdout but the JSON line")
    args = parser.parse_args()
    args.models, args.engines = args.models.split(","), tuple(args.engines.split(","))
    if unknown := [name for name in args.models if name not in SHAPES]:
        parser.error(f"no shape is named {unknown[0]!r}; there are {', '.join(SHAPES)}")
    if unknown := [part for part in args.engines if not any(name.startswith(part) for name in ENGINES)]:
        parser.error(f"no engine is named {unknown[0]!r}; there are {', '.join(ENGINES)}")
    if min(args.batches) < 1 or args.new_tokens < 2 or args.rounds < 1:
        parser.error("--batches and --rounds are at least 1, --new-tokens at least 2")
    return args


def log(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


class Bench:
    """Engines by model and name, and what they did."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.deadline = args, time.monotonic() + args.minutes * 60
        self.workers: dict[tuple[str, str], Worker] = {}
        self.found: list[dict[str, Any]] = []
        self.read_gb_s: list[float] = []
        for name, (module, variant) in ENGINES.items():
            if not name.startswith(args.engines):
                continue
            if module.endswith("torch_gpu") and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
                log(f"{name}: skipped: torch or transformers is not installed")
                continue
            for model in args.models:
                (home := folder / f"{model} {name}".replace(" ", "-")).mkdir()
                cores = os.cpu_count() or 1
                self.workers[model, name] = Worker(module, f"{model} {variant}", home, cores, home / "log", "cuda")

    def drop(self, key: tuple[str, str], batch: int, error: WorkerError) -> None:
        log(f"{' '.join(key)}, batch {batch}: {error}")
        self.found.append({"model": key[0], "engine": key[1], "batch": batch, "reason": str(error)[:200]})
        if error.dead:
            self.workers.pop(key).close()

    def decode(self, key: tuple[str, str], batch: int, limit: float) -> float:
        """Seconds of a step. Raises WorkerError."""
        prompts = [[(7 * i + row) % 1000 for i in range(PROMPT)] for row in range(batch)]
        new = self.args.new_tokens
        seconds, tokens = self.workers[key].call("decode", limit, prompts=prompts, new_tokens=new)
        if len(tokens) != new:
            raise WorkerError(f"gave {len(tokens)} tokens, not {new}", dead=False)
        return seconds / (new - 1)

    def get_ready(self, key: tuple[str, str], batch: int) -> dict[str, Any] | WorkerError:
        limit = min(self.args.limit, max(1.0, self.deadline - time.monotonic()))
        began = time.monotonic()
        try:
            facts = self.workers[key].call("open", limit, batch=batch, max_len=PROMPT + self.args.new_tokens - 1)
            self.decode(key, batch, limit)
        except WorkerError as error:
            return error
        log(f"{' '.join(key)}, batch {batch}: ready in {time.monotonic() - began:.0f} s")
        return facts

    def measure(self, batch: int) -> None:
        with ThreadPoolExecutor(len(self.workers) or 1) as pool:
            answers = pool.map(lambda key: self.get_ready(key, batch), self.workers)
            ready = dict(zip(list(self.workers), answers, strict=True))
        times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
        for number in range(self.args.rounds + 1):
            for key, facts in list(ready.items()):
                try:
                    if isinstance(facts, WorkerError):
                        raise facts
                    if number == 0 and key[1].startswith("ours"):
                        self.read_gb_s.append(self.workers[key].call("read", self.args.limit))
                    elif number:
                        times[key].append(self.decode(key, batch, self.args.limit))
                except WorkerError as error:
                    self.drop(key, batch, error)
                    del ready[key]
        for key, facts in ready.items():
            assert isinstance(facts, dict)
            steps = [seconds * 1e3 for seconds in times[key]]
            one = {"model": key[0], "engine": key[1], "batch": batch, "ms": statistics.median(steps)}
            self.found.append(one | {"ms_low": min(steps), "ms_high": max(steps)} | facts)
            log(f"{' '.join(key)}, batch {batch}: {one['ms']:.3f} ms a step")

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def summarise(found: list[dict[str, Any]], read_gb_s: float | None) -> None:
    """Adds tokens a second, the share of the card's rate, and ratios to the other engines."""
    ms = {(one["model"], one["engine"], one["batch"]): one["ms"] for one in found if "ms" in one}
    for one in found:
        if "ms" not in one:
            continue
        one["tokens_per_s"] = one["batch"] / one["ms"] * 1e3
        if "step_bytes" in one and read_gb_s:
            one["of_the_card"] = one["step_bytes"] / (one["ms"] / 1e3) / (read_gb_s * 1e9)
        for peer in ("transformers bfloat16", "ours bfloat16"):
            other = ms.get((one["model"], peer, one["batch"]))
            if other and peer != one["engine"]:
                one[f"over {peer}"] = other / one["ms"]


def table(result: dict[str, Any]) -> Table:
    made = Table(caption=f"{result['device']}; reads {result['read_gb_s'] or 0:.0f} GB/s", caption_justify="left")
    columns = ["", "batch", "tokens/s", "ms", "of the card", "over ours bfloat16", "over transformers"]
    for column in columns:
        made.add_column(column, justify="right" if column else "left")

    def number(value: float | None, how: str) -> str:
        return "–" if value is None else format(value, how)

    for one in result["measured"]:
        made.add_row(
            f"{one['model']} {one['engine']}",
            str(one["batch"]),
            *([one["reason"]] if "reason" in one else [f"{one['tokens_per_s']:.0f}", f"{one['ms']:.3f}"]),
            number(one.get("of_the_card"), ".0%"),
            number(one.get("over ours bfloat16"), ".2f"),
            number(one.get("over transformers bfloat16"), ".2f"),
        )
    return made


def main() -> None:
    args = arguments()
    if shutil.which("nvidia-smi") is None:
        sys.exit("bench_gpu measures an NVIDIA GPU, and nvidia-smi was not found; bench_cpu.py measures a CPU.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped processes do not stay behind
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the engines share the card
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        try:
            for batch in args.batches:
                if time.monotonic() > bench.deadline:
                    log(f"batch {batch}: no time was left")
                else:
                    bench.measure(batch)
        finally:
            bench.close()
    found = bench.found
    read_gb_s = max(bench.read_gb_s, default=None)
    summarise(found, read_gb_s)
    device = next((one["device"] for one in found if "device" in one), "no GPU")
    result = {"device": device, "read_gb_s": read_gb_s, "new_tokens": args.new_tokens, "measured": found}
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 160).print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
